"""Triton's file in our log: every kind of line at its level, whose it is, and never more than can be told."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from observability import metrics, triton_log
from observability.logs import JsonFormatter, TextFormatter
from observability.triton_log import Follower
from tests.product import Product, wait_for

SERVERS = 'E1121 17:28:02.000001 26397 model_repository_manager.cc:703] "Invalid \\"x\\":\\n no"\n'


@pytest.fixture
def told() -> Iterator[list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    root, handler = logging.getLogger(), Keep()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield records
    root.removeHandler(handler)
    root.setLevel(level)


def follow(file: Path, text: str, **options: Any) -> None:
    """A follower's whole life beside this text."""
    file.write_text(text)
    follower = Follower(file, **options)
    follower.start()
    follower.stop()


def said(records: list[logging.LogRecord]) -> list[tuple[str, str, str]]:
    return [(record.source, record.levelname, record.getMessage()) for record in records]  # type: ignore[attr-defined]


def test_the_servers_lines(tmp_path: Path, told: list[logging.LogRecord]) -> None:
    follow(
        tmp_path / "log",
        'I1121 14:06:52.022473 14402 model_lifecycle.cc:472] "loading: generate:1"\n'
        "+----+\n| Model | Version |\n\n"
        'W1121 14:06:52.022473 14402 other.cc:4] "careful"\n'
        "E1121 11:57:17.797789905    3725 chttp2_server.cc:1060]   UNKNOWN:No address\n"
        + SERVERS
        + "Signal (15) received.\nterminate called after throwing",  # and there it ends
    )
    assert said(told) == [
        ("triton", "WARNING", "careful"),
        ("triton", "ERROR", "UNKNOWN:No address"),
        ("triton", "ERROR", 'Invalid "x":\n no'),
        ("triton", "WARNING", "terminate called after throwing"),
    ]
    assert told[0].name == "triton.other.cc"


@pytest.mark.parametrize("driver", [True, False])
def test_that_there_is_no_gpu_is_an_error_only_where_there_is_one(
    tmp_path: Path, told: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch, driver: bool
) -> None:
    monkeypatch.setattr(triton_log, "_DRIVER", tmp_path if driver else tmp_path / "none")
    lines = 'E1121 14:06:51.990428 14402 server.cc:241] "CudaDriverHelper has not been initialized."\n'
    follow(tmp_path / "log", lines + "Error: Failed to initialize NVML\n")
    assert len(told) == (2 if driver else 0)


STAGE = """
import logging
from observability import logs
logs.configure_stage("generate", "echo")
logging.getLogger("pipelines.x").debug("quiet")
logging.getLogger("other").info("a library's")
logging.getLogger("pipelines.x").info("loaded\\nall", extra={"request_id": "r", "prompt": "secret"})
try:
    raise KeyError("x")
except KeyError:
    logging.getLogger("pipelines.x").exception("failed")
"""


def test_a_stages_own_lines(tmp_path: Path, told: list[logging.LogRecord]) -> None:
    """What a stage's process writes to its stderr, read back with all that it said."""
    written = subprocess.run([sys.executable, "-c", STAGE], capture_output=True, text=True, check=True).stderr
    follow(tmp_path / "log", written + '{"not": "ours"}\n{broken\n')
    assert "secret" not in written
    first, second, *others = told
    assert said([first, second]) == [("generate", "INFO", "loaded\nall"), ("generate", "ERROR", "failed")]
    assert (first.name, first.pipeline, first.request_id) == ("pipelines.x", "echo", "r")  # type: ignore[attr-defined]
    assert "Traceback" in second.traceback  # type: ignore[attr-defined]
    assert second.error_type == "KeyError"  # type: ignore[attr-defined]
    assert json.loads(JsonFormatter().format(first)) == json.loads(written.splitlines()[0])
    assert "Traceback" in TextFormatter().format(second)
    assert said(others) == [("triton", "WARNING", '{"not": "ours"}'), ("triton", "WARNING", "{broken")]


def test_lines_are_told_as_they_come_and_whole(tmp_path: Path, told: list[logging.LogRecord]) -> None:
    file = tmp_path / "log"
    follower = Follower(file, every_s=0.01)
    follower.start()  # before there is a file
    with file.open("w") as log:
        log.write('W1121 14:06:52.022473 1 a.cc:1] "one"\nW1121 14:06:52.022473 1 a.cc:1] "tw')
        log.flush()
        wait_for(lambda: len(told) == 1, 10)
        log.write('o"\n')
        log.flush()
        wait_for(lambda: len(told) == 2, 10)
    follower.stop()
    assert [record.getMessage() for record in told] == ["one", "two"]


def lines_dropped() -> float:
    return metrics.REGISTRY.get_sample_value("triptych_log_lines_dropped_total") or 0


def test_what_comes_too_fast_is_counted(tmp_path: Path, told: list[logging.LogRecord]) -> None:
    before = lines_dropped()
    quiet = 'I1121 14:06:52.022473 1 a.cc:1] "x"\n'  # is not told anyway, so it takes nobody's place
    follow(tmp_path / "log", (quiet + SERVERS) * 1000, most_lines=30)
    assert len(told) == 31
    assert lines_dropped() - before == 1940
    assert "1940 lines of Triton's log came too fast" in told[-1].getMessage()


def test_nor_are_quiet_lines_looked_at_without_end(tmp_path: Path, told: list[logging.LogRecord]) -> None:
    before = lines_dropped()
    follow(tmp_path / "log", 'I1121 14:06:52.022473 1 a.cc:1] "x"\n' * 1000, most_lines=30)
    assert lines_dropped() - before == 700


def test_a_flood_is_left_but_for_its_end(tmp_path: Path, told: list[logging.LogRecord]) -> None:
    before = lines_dropped()
    lines = 20 * (1 << 20) // len(SERVERS)
    follow(tmp_path / "log", SERVERS * lines, most_lines=30)
    assert lines_dropped() - before == lines - 30
    assert len(told) == 31


def test_a_line_without_an_end_does_not_grow(tmp_path: Path, told: list[logging.LogRecord]) -> None:
    follow(tmp_path / "log", "x" * (3 << 20) + "\n" + SERVERS)
    assert all(len(record.getMessage()) <= 1 << 16 for record in told)
    assert said(told)[-1] == ("triton", "ERROR", 'Invalid "x":\n no')


def test_a_look_takes_little_memory(tmp_path: Path, told: list[logging.LogRecord]) -> None:
    """It is taken five times a second, and what is large leaves gaps in the heap."""
    tracemalloc.start()
    try:
        follow(tmp_path / "log", SERVERS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(told) == 1
    assert peak < 300_000


def test_the_logs_of_all_processes_are_one(product: Product) -> None:
    """JSON, since nobody looks: a stage's line as it loaded, and the gateway's with the ids of its request."""
    (loaded,) = [line for line in product.logged("generate") if " runs " in line["message"]]
    assert (loaded["level"], loaded["pipeline"]) == ("info", "smollm2-135m-instruct")
    assert loaded["logger"] == "pipelines.operations"
    body = {"model": "echo", "prompt": "not to be told", "max_tokens": 2}
    headers = {"x-request-id": "logged-1"}
    assert httpx.post(f"{product.url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200

    def mine() -> list[dict[str, Any]]:
        return [line for line in product.logged("gateway") if line.get("request_id") == "logged-1"]

    wait_for(lambda: bool(mine()), 10)
    (line,) = mine()
    assert len(line["trace_id"]) == 32
    assert len(line["span_id"]) == 16
    assert "not to be told" not in product.log_text()
