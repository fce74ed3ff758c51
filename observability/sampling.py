"""Which traces are exported from their start: the standard variables OTEL_TRACES_SAMPLER and …_ARG. Pure.

Knows nothing of what is recorded: a trace that is not sampled may be, and be exported for how it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

Sampler = Callable[[str, "bool | None"], bool]  # a trace's id, and whether its parent is sampled (None: a root)

_LOWER_64 = 2**64 - 1


def sampler(environ: Mapping[str, str]) -> Sampler:
    """Raises ValueError, which names the variable, for a sampler or a ratio that it does not know."""
    name = environ.get("OTEL_TRACES_SAMPLER", "").strip().lower() or "parentbased_always_on"
    of_root = _of_root(name.removeprefix("parentbased_"), environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip())
    if of_root is None:
        raise ValueError(
            f"OTEL_TRACES_SAMPLER={name} is not supported: use always_on, always_off or traceidratio, or one of them "
            "after parentbased_."
        )
    if name.startswith("parentbased_"):
        return lambda trace_id, parent: of_root(trace_id) if parent is None else parent
    return lambda trace_id, parent: of_root(trace_id)


def _of_root(name: str, argument: str) -> Callable[[str], bool] | None:
    if name == "always_on":
        return lambda trace_id: True
    if name == "always_off":
        return lambda trace_id: False
    if name == "traceidratio":
        try:
            ratio = float(argument or 1)
        except ValueError:
            ratio = -1
        if not 0 <= ratio <= 1:
            raise ValueError(f"OTEL_TRACES_SAMPLER_ARG={argument} must be a ratio, 0 to 1.")
        bound = round(ratio * (_LOWER_64 + 1))  # as the SDKs do it, so that services agree
        return lambda trace_id: int(trace_id[16:], 16) < bound
    return None
