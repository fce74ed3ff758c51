"""What was lost before it had said anything is asked again; a backend that plays scripts, then the real server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import retry
from gateway.backend import Delta, Submission
from gateway.retry import RETRIES, Retry, when_ready
from pipelines.errors import StageError
from pipelines.terms import DEFAULT, Terms
from tests.product import Product, wait_for

ACCEPTED = Delta([], prompt_tokens=3)
LAST = Delta([" world"], "stop", 3, 2)
LOST = StageError("gone", code="unavailable", stage="generate")
UNHEALTHY = StageError("hangs", code="unhealthy", stage="preprocess")
ASKED = Submission("a", "m", {"text": "hello"}, "{}", None)


class Stream:
    def __init__(self, steps: list[Any]) -> None:
        self.steps, self.cancelled = list(steps), False

    async def next(self) -> Delta:
        step = self.steps.pop(0)
        if isinstance(step, StageError):
            raise step
        if isinstance(step, float):
            await asyncio.sleep(step)
            return await self.next()
        return step

    def cancel(self) -> None:
        self.cancelled = True


class Backend:
    """Each submission plays the next script; one that is an error is refused at once."""

    def __init__(self, *scripts: list[Any] | StageError) -> None:
        self.scripts = list(scripts)
        self.streams: list[Stream] = []
        self.submissions: list[Submission] = []
        self.is_ready = True

    def pipelines(self) -> dict[str, Any]:
        return {}

    def ready(self, pipeline: str) -> bool:
        return self.is_ready

    async def submit(self, submission: Submission) -> Stream:
        self.submissions.append(submission)
        script = self.scripts.pop(0)
        if isinstance(script, StageError):
            raise script
        self.streams.append(Stream(script))
        return self.streams[-1]


class Heard:
    """What a client's request hears: its deltas, the losses that it was spared, and the error that it was not."""

    def __init__(self, backend: Backend, **options: Any) -> None:
        self.backend, self.deltas, self.losses, self.error = backend, [], [], None
        given = {"able": when_ready(backend), "patience_s": 5.0, "left": lambda: DEFAULT, "whole": False, **options}
        self.retry = Retry(backend, retried=self.losses.append, **given)
        asyncio.run(asyncio.wait_for(self._listen(), 20))

    async def _listen(self) -> None:
        stream = await self.retry.submit(ASKED)
        try:
            while not (self.deltas and self.deltas[-1].finish_reason):
                self.deltas.append(await stream.next())
        except StageError as error:
            self.error = error
        finally:
            stream.cancel()
        self.first_text_at = stream.first_text_at

    @property
    def text(self) -> str:
        return "".join(text for delta in self.deltas for text in delta.texts)


@pytest.fixture(autouse=True)
def quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if "narrow" not in request.fixturenames:
            patch.setattr(retry, "PAUSE_S", 0.0)
        yield


@pytest.mark.parametrize("loss", [LOST, UNHEALTHY])
@pytest.mark.parametrize("before", [[], [ACCEPTED], [ACCEPTED, Delta([]), Delta([""])]])
@pytest.mark.parametrize("whole", [False, True])
def test_what_had_said_nothing_is_asked_again(loss: StageError, before: list[Delta], whole: bool) -> None:
    heard = Heard(Backend([*before, loss], [ACCEPTED, Delta(["hello"]), LAST]), whole=whole)
    assert (heard.text, heard.error, heard.losses) == ("hello world", None, [loss])
    assert [submission.id for submission in heard.backend.submissions] == ["a", "a.1"]
    assert replace(heard.backend.submissions[1], id="a") == ASKED
    assert all(stream.cancelled for stream in heard.backend.streams)  # the lost one too: it may only seem so


def test_what_was_said_is_not_taken_back() -> None:
    heard = Heard(Backend([ACCEPTED, Delta(["hello"]), LOST]))
    assert (heard.text, heard.error, heard.losses) == ("hello", LOST, [])


def test_a_whole_answer_begins_again() -> None:
    first, second = [ACCEPTED, Delta(["hel"]), Delta(["lo"]), LOST], [ACCEPTED, Delta(["good"]), LAST]
    heard = Heard(Backend(first, second), whole=True)
    assert (heard.text, heard.error, heard.losses) == ("good world", None, [LOST])
    assert heard.first_text_at


def test_what_the_pipeline_refuses_is_refused() -> None:
    refusal = StageError("too long", code="context_length_exceeded")
    for whole in (False, True):
        heard = Heard(Backend([ACCEPTED, refusal]), whole=whole)
        assert (heard.error, heard.losses) == (refusal, [])
    heard = Heard(Backend([LOST], refusal))
    assert (heard.error, heard.losses) == (refusal, [LOST])


def test_what_kills_everything_that_takes_it_is_told_in_the_end() -> None:
    heard = Heard(Backend(*[[ACCEPTED, LOST]] * (RETRIES + 1)))
    assert (heard.error, heard.losses, heard.backend.scripts) == (LOST, [LOST] * RETRIES, [])


def test_a_backend_that_is_not_ready_after_all_is_one_more_loss() -> None:
    heard = Heard(Backend([LOST], UNHEALTHY, [ACCEPTED, LAST]))
    assert (heard.text, heard.losses) == (" world", [LOST, UNHEALTHY])


def test_a_first_submission_is_refused_at_once() -> None:
    with pytest.raises(StageError, match="gone"):
        Heard(Backend(LOST))


def test_it_waits_until_the_pipeline_can_take_it() -> None:
    backend = Backend([LOST], [LAST])
    backend.is_ready = False
    looked = []

    async def able(pipeline: str) -> None:
        looked.append(pipeline)
        asyncio.get_running_loop().call_later(0.1, setattr, backend, "is_ready", True)
        await when_ready(backend)(pipeline)

    assert Heard(backend, able=able).text == " world"
    assert looked == ["m"]


def test_a_pipeline_that_does_not_come_back_is_the_loss_itself() -> None:
    backend = Backend([LOST])
    backend.is_ready = False
    assert Heard(backend, patience_s=0.05).error is LOST


def test_no_wait_is_longer_than_the_request_has() -> None:
    backend = Backend([LOST])
    backend.is_ready = False
    lefts = iter([Terms(timeout_ms=50)])

    def left() -> Terms:
        if found := next(lefts, None):
            return found
        raise StageError("time is up", code="timeout")

    assert Heard(backend, left=left, patience_s=3600.0).error.code == "timeout"


def test_a_retry_has_what_is_left_of_the_time() -> None:
    heard = Heard(Backend([LOST], [LAST]), left=lambda: Terms(2, timeout_ms=70))
    assert heard.backend.submissions[1].terms == Terms(2, 70)


def test_whoever_leaves_during_a_retry_leaves_nothing_behind() -> None:
    """Also where the wait had just ended, and with it the chance to hear of it."""
    backend = Backend([LOST], [3600.0])

    async def main() -> None:
        reached = asyncio.Event()

        async def able(pipeline: str) -> None:
            reached.set()

        stream = await Retry(backend, able, 5.0, lambda: DEFAULT, lambda lost: None, whole=False).submit(ASKED)
        asking = asyncio.ensure_future(stream.next())
        await reached.wait()
        asking.cancel()
        stream.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert all(stream.cancelled for stream in backend.streams)


ENDS = st.sampled_from([LOST, UNHEALTHY, StageError("no", code="internal"), LAST])
SCRIPTS = st.lists(st.tuples(st.lists(st.sampled_from(["", "a", "b"])), ENDS), min_size=RETRIES + 1, max_size=8)


@given(SCRIPTS, st.booleans())
def test_an_answer_is_of_one_attempt(scripts: list[tuple[list[str], Any]], whole: bool) -> None:
    """Nothing is said twice or mixed, and a loss is told only where it must be."""
    heard = Heard(
        Backend(*([ACCEPTED, *(Delta([text]) for text in texts), end] for texts, end in scripts)), whole=whole
    )
    texts, end = scripts[len(heard.losses)]
    said = "".join(texts)
    if end is LAST:
        assert (heard.text, heard.error) == (said + " world", None)
    else:
        assert heard.error is end
        assert heard.text == ("" if whole else said)
        assert not end.lost or len(heard.losses) == RETRIES or (said and not whole)


# The real server.


@pytest.fixture
def narrow(tmp_path: Path, catalog: Path) -> Iterator[Product]:
    """A pipeline that runs one request at a time: the others wait, without a token."""
    own = tmp_path / "catalog"
    own.mkdir()
    (own / "echo-one.toml").write_text((catalog / "echo-slow.toml").read_text() + "max_running = 1\n")
    env = {"TRIPTYCH_CATALOG": f"{catalog}:{own}", "TRIPTYCH_ACCEPT_TIMEOUT_S": "120"}  # a repair may be slow here
    product = Product(tmp_path, "echo-one", env=env)
    try:
        yield product.wait_ready()
    finally:
        product.stop()


def test_a_stage_is_killed_and_who_had_no_token_is_answered_all_the_same(narrow: Product) -> None:
    """One stream has text, one whole answer has begun, and four requests of either kind have had nothing yet."""
    url = f"{narrow.url}/v1/completions"

    def ask(body: dict[str, Any]) -> httpx.Response:
        return httpx.post(url, json={"model": "echo-one", "max_tokens": 6, **body}, timeout=180)

    lines: list[str] = []
    with ThreadPoolExecutor(8) as threads, httpx.Client() as http:
        running = {"model": "echo-one", "prompt": "a b c", "max_tokens": 4000, "stream": True}
        with http.stream("POST", url, json=running, timeout=180) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 4:
                    whole = [threads.submit(ask, {"prompt": f"w {name}"}) for name in "de"]
                    streams = [threads.submit(ask, {"prompt": f"s {name}", "stream": True}) for name in "fg"]
                    wait_for(lambda: narrow.counters("echo-one-generate")["waiting"] == 4, 30)
                    os.kill(narrow.stub("echo-one-generate"), signal.SIGKILL)
        answers = [call.result() for call in [*whole, *streams]]
    data = [line for line in lines if line.startswith("data: ")]
    assert json.loads(data[-1][6:])["error"]["code"] == "unavailable"
    assert not any("[DONE]" in line for line in lines)

    assert [answer.status_code for answer in answers] == [200] * 4
    for answer, prompt in zip(answers[:2], ["w d", "w e"], strict=True):
        assert answer.json()["choices"][0]["text"] == (prompt * 3)[: len(answer.json()["choices"][0]["text"])]
        assert answer.json()["usage"]["completion_tokens"] == 6
    for answer, prompt in zip(answers[2:], ["s f", "s g"], strict=True):
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        assert (text, events[-1]) == ((prompt * 3)[: len(text)], "[DONE]")
        assert len(text) >= len(prompt)
    metrics = httpx.get(f"{narrow.url}/metrics", timeout=30).text
    assert 'triptych_requests_retried_total{pipeline="echo-one"} 4.0' in metrics
    trace = httpx.get(f"{narrow.url}/admin/traces/{answers[0].headers['x-request-id']}", timeout=30).json()
    spans = [span for part in trace["resourceSpans"] for scope in part["scopeSpans"] for span in scope["spans"]]
    (asked,) = [span for span in spans if span["name"].startswith("text_completion ")]
    assert {"key": "triptych.retries", "value": {"intValue": "1"}} in asked["attributes"]
    assert "asked again" in [event["name"] for event in asked["events"]]


def test_a_whole_answer_that_had_begun_is_begun_again(narrow: Product) -> None:
    body = {"model": "echo-one", "prompt": "a b c", "max_tokens": 60}
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(lambda: httpx.post(f"{narrow.url}/v1/completions", json=body, timeout=180))
        wait_for(lambda: narrow.counters("echo-one-generate")["output_tokens"] >= 5, 30)
        os.kill(narrow.stub("echo-one-generate"), signal.SIGKILL)
        answer = call.result()
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 60)
    assert answer.json()["choices"][0]["text"].startswith("a b c")
