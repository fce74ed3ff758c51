"""Nothing of the product stays behind, whatever ends it; and while it breaks, it says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from gateway.installed import environment
from gateway.triton import remove_stale_shm
from pipelines.repository import CHECKED_IN
from tests.orchestrator_call import OrchestratorCall
from tests.product import Product, alive, free_triple, wait_for

IMPATIENT = {"x-request-timeout-ms": "100"}
SLOW = {"model": "echo-slow", "prompt": "a b c", "max_tokens": 4000, "stream": True}
SLOW_WHOLE = {**SLOW, "stream": False}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything(own_product: Product, number: int) -> None:
    family = own_product.family()
    assert sum("backend_stub " in command for command in family.values()) == 8
    assert own_product.shm()
    own_product.stop(number)
    wait_for(lambda: not any(alive(pid) for pid in family), 10)
    assert own_product.shm() == []


def test_a_signal_while_loading_ends_everything(tmp_path: Path, catalog: Path) -> None:
    product = Product(tmp_path, "echo-slow", env={"TRIPTYCH_CATALOG": str(catalog)})
    wait_for(lambda: any("backend_stub " in command for command in product.family().values()), 60)
    family = product.family()
    product.stop()
    wait_for(lambda: not any(alive(pid) for pid in family), 15)
    assert product.shm() == []


def test_kill_9_of_serve_leaves_nothing_running(own_product: Product) -> None:
    family = own_product.family()
    os.kill(own_product.pid, signal.SIGKILL)
    own_product.process.wait()
    wait_for(lambda: not any(alive(pid) for pid in family), 20)
    remove_stale_shm()
    assert own_product.shm() == []


def test_a_request_in_flight_is_finished_on_sigterm(own_product: Product) -> None:
    answers: list[httpx.Response] = []
    body = {"model": "echo-slow", "prompt": "a b c", "max_tokens": 60}
    call = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{own_product.url}/v1/completions", json=body, timeout=30))
    )
    call.start()
    wait_for(lambda: own_product.counters("echo-slow-generate")["running"] == 1, 10)
    assert own_product.stop() == 0
    call.join(timeout=10)
    assert answers[0].json()["usage"]["completion_tokens"] == 60


def test_triton_killed_mid_stream_is_restarted(own_product: Product) -> None:
    """Its streams get an error event and no [DONE], 503 meanwhile, and then everything is as before."""
    family, shm = own_product.family(), len(own_product.shm())
    lines: list[str] = []
    with httpx.Client() as http:
        with http.stream("POST", f"{own_product.url}/v1/completions", json=SLOW, timeout=30) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 4:
                    os.kill(own_product.triton(), signal.SIGKILL)
    data = [line for line in lines if line.startswith("data: ")]
    assert json.loads(data[-1][6:])["error"]["code"] == "unavailable"
    assert not any("[DONE]" in line for line in lines)
    assert own_product.get("/health/ready")[0] == 503
    refused = httpx.post(f"{own_product.url}/v1/completions", json=SLOW_WHOLE, headers=IMPATIENT, timeout=30)
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)

    wait_for(lambda: own_product.get("/health/ready")[0] == 200, 90)
    again = httpx.post(f"{own_product.url}/v1/completions", json={**SLOW_WHOLE, "max_tokens": 4}, timeout=30)
    assert again.json()["usage"]["completion_tokens"] == 4
    gone = [pid for pid, command in family.items() if not command.startswith("triptych zygote")]
    assert not any(alive(pid) for pid in gone)
    assert len(own_product.shm()) == shm
    assert own_product.events() == {("", "triton_died"): 1, ("", "triton_restarted"): 1}
    assert httpx.get(f"{own_product.url}/metrics/triton", timeout=30).status_code == 200
    assert own_product.stop() == 0
    assert own_product.shm() == []


@pytest.mark.parametrize("stage", ["preprocess", "generate", "postprocess", "orchestrator"])
def test_a_stage_that_is_killed_is_replaced(own_product: Product, stage: str) -> None:
    """Its streams get an error event and no [DONE], other pipelines do not notice, and it comes back by itself."""
    shm = len(own_product.shm())
    beside: list[str] = []
    other = {"model": "echo-small", "prompt": "a b c", "max_tokens": 3}

    def ask_the_other() -> None:
        for _ in range(20):
            beside.append(httpx.post(f"{own_product.url}/v1/completions", json=other, timeout=30).text)

    thread = threading.Thread(target=ask_the_other)
    lines: list[str] = []
    with httpx.Client() as http:
        with http.stream("POST", f"{own_product.url}/v1/completions", json=SLOW, timeout=30) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 4:
                    os.kill(own_product.stub(f"echo-slow-{stage}"), signal.SIGKILL)
                    thread.start()
    data = [line for line in lines if line.startswith("data: ")]
    failure = json.loads(data[-1][6:])["error"]
    assert (failure["code"], failure["stage"]) == ("unavailable", stage)
    assert not any("[DONE]" in line for line in lines)

    def is_back() -> bool:
        """An orchestrator takes less than the time of a request."""
        return own_product.events().get(("echo-slow", "repaired")) == 1

    assert own_product.get("/health/ready") == (503, {"status": "not ready", "not_ready": ["echo-slow"]}) or is_back()
    refused = httpx.post(f"{own_product.url}/v1/completions", json=SLOW_WHOLE, headers=IMPATIENT, timeout=30)
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True) or is_back()

    wait_for(lambda: own_product.get("/health/ready")[0] == 200, 60)
    again = httpx.post(f"{own_product.url}/v1/completions", json={**SLOW_WHOLE, "max_tokens": 4}, timeout=30)
    assert again.json()["usage"]["completion_tokens"] == 4
    thread.join()
    assert len({json.loads(text)["choices"][0]["text"] for text in beside}) == 1
    wait_for(lambda: len(own_product.shm()) == shm, 10)
    assert sum("backend_stub " in command for command in own_product.family().values()) == 8
    events = own_product.events()
    assert events.pop(("echo-slow", "repaired")) == 1
    assert events.pop(("echo-slow", "stub_died")) >= 1  # the orchestrator goes with whichever it was
    assert not events
    if stage == "generate":  # what the ensemble is without it, in the server's words and in our log
        wait_for(lambda: any("echo-slow-ensemble" in line["message"] for line in own_product.logged("triton")), 10)
    assert own_product.stop() == 0  # and is not held up by what was in flight there, of which Triton keeps count
    assert "Exit timeout expired" not in own_product.triton_log()
    assert own_product.shm() == []


@pytest.mark.parametrize("stage", ["generate", "postprocess", "orchestrator"])
def test_a_stage_that_hangs_is_replaced(own_product: Product, stage: str) -> None:
    """A stopped one answers nothing: the stream gets an error event, and another takes its place."""
    stub = own_product.stub(f"echo-slow-{stage}")
    lines: list[str] = []
    with httpx.Client() as http:
        with http.stream("POST", f"{own_product.url}/v1/completions", json=SLOW, timeout=60) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 4:
                    os.kill(stub, signal.SIGSTOP)
    assert '"error"' in next(line for line in reversed(lines) if line)
    assert not any("[DONE]" in line for line in lines)
    not_ready = (503, {"status": "not ready", "not_ready": ["echo-slow"]})
    wait_for(lambda: own_product.get("/health/ready") == not_ready, 10)  # it is ended once it is told of
    wait_for(lambda: own_product.get("/health/ready")[0] == 200, 90)
    assert not alive(stub)
    again = httpx.post(f"{own_product.url}/v1/completions", json={**SLOW_WHOLE, "max_tokens": 4}, timeout=30)
    assert again.json()["usage"]["completion_tokens"] == 4


def test_a_triton_that_hangs_is_replaced(own_product: Product) -> None:
    triton = own_product.triton()
    os.kill(triton, signal.SIGSTOP)
    wait_for(lambda: own_product.get("/health/ready")[0] == 503, 60)
    wait_for(lambda: own_product.get("/health/ready")[0] == 200, 120)
    assert own_product.triton() != triton
    again = httpx.post(f"{own_product.url}/v1/completions", json={**SLOW_WHOLE, "max_tokens": 4}, timeout=30)
    assert again.json()["usage"]["completion_tokens"] == 4


def test_a_preprocess_that_hangs_is_replaced(own_product: Product) -> None:
    """Triton gives it up after a second; a new one takes its place, and the request that had met it."""
    os.kill(own_product.stub("echo-slow-preprocess"), signal.SIGSTOP)
    body = {**SLOW, "stream": False, "max_tokens": 3}
    answer = httpx.post(f"{own_product.url}/v1/completions", json=body, timeout=180)
    assert answer.json()["usage"]["completion_tokens"] == 3
    events = own_product.events()
    assert (events["echo-slow", "stub_unhealthy"], events["echo-slow", "repaired"]) == (1, 1)
    wait_for(lambda: own_product.get("/health/ready")[0] == 200, 60)


def test_a_cancelled_stream_leaves_no_request_behind(own_product: Product) -> None:
    """The server keeps a request until its final response: at its end there must be none, and no wait for one."""
    before = own_product.counters("echo-slow-generate")
    calls = [
        OrchestratorCall(own_product, "echo-slow-orchestrator", {"text": "a b c", "sampling": '{"max_tokens": 5000}'})
        for _ in range(5)
    ]
    for call in calls:
        call.responses.get(timeout=30)
        call.close()
    wait_for(lambda: own_product.counters("echo-slow-generate")["cancelled"] == before["cancelled"] + 5, 10)
    assert own_product.stop() == 0
    assert "Found 0 model versions that have in-flight inferences" in own_product.triton_log()


def test_a_port_in_use_is_one_sentence(product: Product) -> None:
    command = [sys.executable, "-m", "gateway.cli", "serve", "--port", str(product.port), "--pipeline", "echo"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith(f"triptych: port {product.port} is in use")


def test_tritonserver_alone_serves_the_default_pipeline(smollm2_home: Path, tmp_path: Path) -> None:
    """No gateway, no options of ours: the binary, the checked-in repository and a backend folder."""
    import tritonclient.grpc as triton_grpc

    from gateway.installed import backend_directory, server_home
    from tests.product import bytes_input

    port = free_triple()
    command = [str(server_home() / "bin" / "tritonserver"), f"--model-repository={CHECKED_IN}"]
    command += [f"--backend-directory={backend_directory()}", f"--grpc-port={port}"]
    command += [f"--http-port={port - 1}", f"--metrics-port={port + 1}"]
    command += [f"--{service}-address=127.0.0.1" for service in ("grpc", "http", "metrics")]
    with (tmp_path / "triton.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
    try:
        client = triton_grpc.InferenceServerClient(f"127.0.0.1:{port}")

        def ready() -> bool:
            assert server.poll() is None, (tmp_path / "triton.log").read_text()[-2000:]
            try:
                return bool(client.is_model_ready("ensemble"))
            except triton_grpc.InferenceServerException:
                return False

        wait_for(ready, 120)
        names = {model.name for model in client.get_model_repository_index().models}
        assert names == {"preprocess", "generate", "postprocess", "ensemble", "orchestrator"}
        inputs = [
            bytes_input("prompt", "What is the capital of France?"),
            bytes_input("sampling", '{"temperature": 0}'),
        ]
        answer = client.infer("ensemble", inputs, client_timeout=120)
        assert answer.as_numpy("generated_text")[0] == b"The capital of France is Paris."
        client.close()
    finally:
        server.terminate()
        server.wait(timeout=60)
