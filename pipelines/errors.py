"""The one exception that may reach a user, from any stage. Knows no HTTP: the gateway maps `code` to a status."""

from __future__ import annotations

import json


class StageError(Exception):
    """A request could not be served; `message` is a sentence for the user, `param` the input it names.

    `code` is one of: invalid_request, invalid_image, context_length_exceeded, unsupported_parameter, model_not_found,
    model_not_pulled, overloaded, unavailable, unhealthy, timeout, internal. `stage` is the stage that failed.
    `unavailable` and `unhealthy` are said of what should have answered (it is not there, has died or hangs), never of
    the request. `retry_after_s` is there where who refuses knows when it would not.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid_request",
        param: str | None = None,
        stage: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.stage = stage
        self.retry_after_s = retry_after_s

    @property
    def lost(self) -> bool:
        """Whether what worked on the request is gone, which is no verdict on the request: it may be asked again."""
        return self.code in ("unavailable", "unhealthy")

    def to_json(self) -> str:
        """As it travels through Triton, whose errors are strings without codes (research: gRPC in-band errors)."""
        return json.dumps({"message": self.message, "code": self.code, "param": self.param, "stage": self.stage})

    @classmethod
    def from_text(cls, text: str, *, stage: str) -> StageError:
        """The error behind a Triton error string; one that is none of ours is `stage`'s own failure."""
        start = text.find('{"message"')
        if start >= 0:
            try:
                fields = json.JSONDecoder().raw_decode(text, start)[0]
                return cls(
                    fields["message"], code=fields["code"], param=fields["param"], stage=fields["stage"] or stage
                )
            except (ValueError, KeyError, TypeError):
                pass
        return cls(f"stage {stage} failed: {text}", code=_code_of(text), stage=stage)


def _code_of(text: str) -> str:
    """By Triton's own words (2.51)."""
    if "is not healthy" in text:  # of a stub that is dead, or does not answer it within a second or so
        return "unhealthy"
    if "unknown model" in text or "is not ready" in text:  # of a model that is unloaded, or of one on its way out
        return "unavailable"
    return "internal"
