"""Log lines carry the ids they were given, and nothing else of the request."""

from __future__ import annotations

import asyncio
import io
import json
import logging

import pytest

from observability import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _root():
    loggers = [logging.getLogger(name) for name in ("", "gateway", "observability", "pipelines")]
    handlers, levels = list(loggers[0].handlers), [logger.level for logger in loggers]
    yield
    loggers[0].handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_half_a_character_is_told_too():
    out = io.StringIO()
    logs.configure("info", stream=out)
    logging.getLogger("gateway.test").warning("half of it: \ud83d", extra={"status": 500})
    assert json.loads(out.getvalue())["message"] == "half of it: \ud83d"


def test_a_json_line_has_the_ids_and_no_other_extra():
    out = io.StringIO()
    logs.configure("info", stream=out)
    extra = {
        "trace_id": "t",
        "span_id": "s",
        "request_id": "r",
        "status": 200,
        "prompt": "secret",
        "stage": None,
    }
    logging.getLogger("gateway.app").info("done in %d ms\nnew", 5, extra=extra)
    (line,) = out.getvalue().splitlines()
    fields = json.loads(line)
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "info",
        "logger": "gateway.app",
        "message": "done in 5 ms\nnew",
        "trace_id": "t",
        "span_id": "s",
        "request_id": "r",
        "status": 200,
    }


def test_an_exception_is_one_json_line():
    out = io.StringIO()
    logs.configure("info", "json", out)
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("a").exception("failed")
    fields = json.loads(out.getvalue())
    assert fields["error_type"] == "KeyError"
    assert "Traceback" in fields["traceback"]


def test_a_terminal_gets_a_plain_line():
    out = Terminal()
    logs.configure("debug", stream=out)
    logging.getLogger("a").debug("hello", extra={"request_id": "r"})
    assert out.getvalue().endswith(" debug a: hello  request_id=r\n")
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("a").exception("failed")
    assert out.getvalue().endswith("KeyError: 'x'\n")


def test_levels_are_kept_and_bad_settings_refused():
    out = io.StringIO()
    logs.configure("warning", "text", out)
    logging.getLogger("a").info("quiet")
    assert out.getvalue() == ""
    with pytest.raises(ValueError, match="'loud' must be debug"):
        logs.configure("loud")
    with pytest.raises(ValueError, match="'xml' must be auto"):
        logs.configure("info", "xml")


def test_ids_of_a_request_are_on_all_its_lines():
    out = io.StringIO()
    logs.configure("info", "json", out, source="gateway")

    async def request(name):
        logs.about(request_id=name, trace_id=f"trace of {name}", span_id=None)
        await asyncio.sleep(0)
        logging.getLogger("gateway.x").info("from within")
        logging.getLogger("gateway.x").info("its own", extra={"request_id": "another"})

    async def both():
        await asyncio.gather(request("one"), request("two"))
        logging.getLogger("gateway.x").info("outside")

    asyncio.run(both())
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    found = [(line["message"], line.get("request_id"), line.get("trace_id")) for line in lines]
    assert sorted(found, key=str) == [
        ("from within", "one", "trace of one"),
        ("from within", "two", "trace of two"),
        ("its own", "another", "trace of one"),
        ("its own", "another", "trace of two"),
        ("outside", None, None),
    ]
    assert all(line["source"] == "gateway" and "span_id" not in line for line in lines)


def test_others_are_told_from_warning_on():
    out = io.StringIO()
    logs.configure("info", "text", out)
    logging.getLogger("a.library").info("of its own workings")
    logging.getLogger("gateway.x").info("ours")
    assert out.getvalue().endswith("info gateway.x: ours\n")
    assert "workings" not in out.getvalue()
    logs.configure("debug", "text", out)
    logging.getLogger("a.library").info("of its own workings")
    assert "workings" in out.getvalue()
