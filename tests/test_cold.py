"""Pipelines that come when they are asked for and go when they are idle, against the real server.

The rules are `gateway.lifecycle`'s and tested there: here it is seen that Triton does what they say.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pipelines.pipeline import get_pipeline, load_pipeline
from pipelines.sources import pull
from tests.loads import Left, left, resident_kb
from tests.models import build
from tests.otlp_receiver import Receiver
from tests.product import Product, wait_for
from tests.test_cli import triptych

LOAD_S = 120
ASK = {"prompt": "a b c", "max_tokens": 3}


def declared(**keys: object) -> str:
    """An echo's file."""
    echo = get_pipeline("echo")
    digests = ", ".join(f'"{file}" = "{digest}"' for file, digest in echo.sha256.items())
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    return f'engine = "echo"\nsource = "{echo.source}"\nsha256 = {{ {digests} }}\nmemory_mb = 200\n{lines}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2_home: Path) -> Path:
    folder = tmp_path_factory.mktemp("cold-catalog")
    (folder / "cold.toml").write_text(declared())
    (folder / "brief.toml").write_text(declared(keep_alive=1, keep_parked=1))
    for name, share in (("heavy", 1), ("broken-weights", 2)):  # which end in the middle
        model = folder / f"{name}-model"
        build("llama").save_pretrained(model)
        for part in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(smollm2_home / part, model / part)
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // share])
        (folder / f"{name}.toml").write_text(f'source = "path:{model}"\nmemory_mb = 500\n')
        pull(load_pipeline(folder / f"{name}.toml"))
    return folder


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory, folder: Path, otlp: Receiver) -> Iterator[Product]:
    env = {
        "TRIPTYCH_CATALOG": str(folder),
        "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    product = Product(tmp_path_factory.mktemp("cold"), env=env, cold=True)
    try:
        yield product.wait_ready()
    finally:
        product.stop()
        print(product.log_text()[-2000:])


def unloaded(product: Product, name: str) -> None:
    product.tell(name, "unload")
    wait_for(lambda: product.state(name)["state"] == "cold", 60)
    assert not any(f"/{name}-" in command for command in product.family().values())


def ask(product: Product, name: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{product.url}/v1/completions", json={"model": name, **ASK}, headers=headers, timeout=LOAD_S)


def test_the_whole_catalog_is_listed_and_nothing_of_it_is_loaded(cold: Product) -> None:
    _, listed = cold.get("/v1/models")
    found = {model["id"]: model for model in listed["data"]}
    assert {"smollm2-135m-instruct", "qwen3-vl-8b", "cold", "brief"} <= set(found)
    assert {model["state"] for model in found.values()} <= {"cold", "failed", "ready", "parked", "draining"}
    assert found["qwen3-vl-8b"]["pulled"] is False
    assert found["qwen3-vl-8b"]["input_modalities"] == ["text", "image"]
    assert found["cold"]["context_length"] > 0
    assert "temperature" in found["cold"]["supported_parameters"]
    assert cold.get("/health/ready")[0] == 200
    missing = ask(cold, "qwen3-vl-8b")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_pulled")
    assert "triptych pull qwen3-vl-8b" in missing.json()["error"]["message"]


def test_the_first_request_loads_it_and_its_trace_shows_the_load(cold: Product, otlp: Receiver) -> None:
    unloaded(cold, "cold")
    trace_id, parent = "c01d" * 8, "c01d" * 4
    first = ask(cold, "cold", traceparent=f"00-{trace_id}-{parent}-01")
    assert first.json()["choices"][0]["text"].split() == ["a", "b", "c"]
    assert int(first.headers["x-cold-start-ms"]) > 0
    assert "model.load;dur=" in first.headers["server-timing"]
    assert "x-cold-start-ms" not in ask(cold, "cold").headers
    stages = {"preprocess", "queue", "prefill", "decode", "postprocess", "model.load"}
    root = otlp.tree(trace_id, expect=stages, remote_parent=parent, timeout=20)
    admission = root.find("admission")
    assert [child.name for child in admission.children] == ["model.load"]
    told = admission.children[0].attributes
    assert told["triptych.load.phases"] == ["triton", "spawn", "import", "weights", "warm_up", "lane"]
    assert len(told["triptych.load.phases_ms"]) == 6
    assert sum(told["triptych.load.phases_ms"]) > 0
    drawn = triptych("trace", trace_id, "--url", cold.url).stdout
    assert drawn.startswith("It came to a cold pipeline: "), drawn
    assert "model.load" in drawn


def test_a_hundred_who_ask_at_once_cause_one_load(cold: Product) -> None:
    unloaded(cold, "cold")
    began = cold.log_text().count("cold is loading")
    with httpx.Client(timeout=0.5) as impatient, pytest.raises(httpx.TimeoutException):
        impatient.post(f"{cold.url}/v1/completions", json={"model": "cold", **ASK})  # whoever causes it leaves
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: ask(cold, "cold"), range(100)))
    assert {answer.status_code for answer in answers} == {200}
    assert cold.log_text().count("cold is loading") == began + 1


def test_a_stream_hears_how_far_it_is(cold: Product) -> None:
    unloaded(cold, "cold")
    body = {"model": "cold", **ASK, "stream": True}
    with httpx.stream("POST", f"{cold.url}/v1/completions", json=body, timeout=LOAD_S) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[0].startswith(": not ready yet: stage=")
    assert "eta_s=" in lines[0]
    assert lines[-1] == "data: [DONE]"
    comments = [line for line in lines if line.startswith(":")]
    assert comments[-1].startswith(": ready: cold_start_ms=")


def test_who_gives_it_no_time_is_told_when_to_come_back(cold: Product) -> None:
    unloaded(cold, "cold")
    refused = ask(cold, "cold", **{"x-request-timeout-ms": "100"})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after-ms"]) > 0
    assert "being loaded" in refused.json()["error"]["message"]
    wait_for(lambda: cold.state("cold")["state"] == "ready", LOAD_S)  # the load goes on without it


def test_idle_it_is_parked_then_unloaded_and_comes_back(cold: Product) -> None:
    states: list[str] = []

    def seen(state: str) -> bool:
        states.append(cold.state("brief")["state"])
        return states[-1] == state

    assert ask(cold, "brief").status_code == 200
    wait_for(lambda: seen("parked"), 60)
    wait_for(lambda: seen("cold"), 60)
    assert not any("/brief-" in command for command in cold.family().values())
    assert ask(cold, "brief").status_code == 200


def test_parked_it_wakes_for_a_request(cold: Product) -> None:
    ask(cold, "cold")
    cold.tell("cold", "park")
    wait_for(lambda: (cold.state("cold")["state"], cold.state("cold")["doing"]) == ("parked", None), 30)
    processes = {pid for pid, command in cold.family().items() if "/cold-generate/" in command}
    woken = ask(cold, "cold")
    assert woken.json()["choices"][0]["text"].split() == ["a", "b", "c"]
    assert "model.wake;dur=" in woken.headers["server-timing"]
    assert {pid for pid, command in cold.family().items() if "/cold-generate/" in command} == processes


def test_weights_that_cannot_be_read_fail_with_their_reason_and_nothing_else_notices(cold: Product) -> None:
    ask(cold, "cold")
    unloaded(cold, "brief")  # which would go by itself meanwhile
    shm = len(cold.shm())
    failed = ask(cold, "broken-weights")
    assert failed.status_code == 503
    assert "SafetensorError" in failed.json()["error"]["message"]
    assert "Traceback" not in failed.text
    shown = cold.state("broken-weights")
    assert (shown["state"], shown["failures"]) == ("failed", 1)
    assert "SafetensorError" in shown["reason"]
    again = ask(cold, "broken-weights")  # within its backoff, or after a second failure
    assert again.status_code == 503
    assert "retry-after-ms" in again.headers
    assert cold.get("/health/ready/broken-weights")[0] == 503
    assert cold.get("/health/ready")[0] == 200
    assert ask(cold, "cold").status_code == 200
    wait_for(lambda: len(cold.shm()) == shm, 30)


def test_the_command_says_why_a_load_has_failed(cold: Product, folder: Path) -> None:
    told = triptych("pipelines", "load", "broken-weights", "--url", cold.url)
    assert (told.returncode, told.stdout.splitlines()[0]) == (1, "broken-weights is loading")
    assert told.stderr.startswith("triptych: broken-weights is not ready, but failed: ")
    assert "SafetensorError" in told.stderr
    listed = triptych("pipelines", "--url", cold.url, TRIPTYCH_CATALOG=str(folder)).stdout.splitlines()
    (why,) = [line for line in listed if line.startswith("broken-weights failed, and is tried again in ")]
    assert "SafetensorError" in why


def test_a_stage_that_is_killed_while_it_loads_fails_and_comes_back(cold: Product) -> None:
    """As by the kernel, when memory runs out: in the midst of importing torch."""
    ask(cold, "cold")
    unloaded(cold, "brief")
    shm = len(cold.shm())

    def imports() -> bool:
        stubs = [pid for pid, command in cold.family().items() if "/heavy-generate/1/" in command]
        return any(resident_kb(pid) > 150_000 for pid in stubs)

    cold.tell("heavy", "load")
    wait_for(imports, 60)
    os.kill(cold.stub("heavy-generate"), signal.SIGKILL)
    wait_for(lambda: cold.state("heavy")["state"] == "failed", 60)
    shown = cold.state("heavy")
    assert shown["failures"] == 1
    assert "generate" in shown["reason"]
    refused = ask(cold, "heavy")  # within its backoff
    assert (refused.status_code, "retry-after-ms" in refused.headers) == (503, True)
    assert ask(cold, "cold").status_code == 200
    wait_for(lambda: len(cold.shm()) == shm, 30)
    cold.tell("heavy", "load")
    wait_for(lambda: cold.state("heavy")["state"] == "ready", 60)
    unloaded(cold, "heavy")


@pytest.mark.parametrize("stage", ["generate", "orchestrator"])
def test_a_stage_that_dies_as_soon_as_it_is_loaded_fails_the_load(cold: Product, stage: str) -> None:
    """Between the server's calling it ready and the gateway's hearing of that, for which the gateway is stopped."""
    unloaded(cold, "cold")
    cold.tell("cold", "load")
    wait_for(lambda: f"cold-{stage}" in cold.stubs_anywhere(), 30)
    os.kill(cold.pid, signal.SIGSTOP)
    client = cold.client()
    try:
        wait_for(lambda: client.is_model_ready(f"cold-{stage}"), 30)
        os.kill(cold.stubs_anywhere()[f"cold-{stage}"], signal.SIGKILL)
    finally:
        os.kill(cold.pid, signal.SIGCONT)
        client.close()
    wait_for(lambda: cold.state("cold")["state"] == "failed", 30)
    assert cold.state("cold")["reason"] == f"its {stage} stage died as soon as it was loaded"
    cold.tell("cold", "load")
    wait_for(lambda: cold.state("cold")["state"] == "ready", 30)
    assert ask(cold, "cold").status_code == 200


def test_a_file_that_is_added_edited_or_removed_is_noticed(cold: Product, folder: Path) -> None:
    file = folder / "added.toml"
    body = {"model": "cold", "prompt": "a b c", "max_tokens": 3000, "stream": True}
    file.write_text(declared(echo_tokens_per_s=400))
    wait_for(lambda: cold.get("/v1/models/added")[0] == 200, 20)
    assert ask(cold, "added").status_code == 200
    file.write_text("source = 7")
    wait_for(lambda: any("added.toml" in name for name in cold.get("/admin/pipelines")[1]["broken_files"]), 20)
    assert ask(cold, "added").status_code == 200  # as it was
    # Edited while a stream of it runs: that ends, and then it is loaded anew.
    with httpx.stream("POST", f"{cold.url}/v1/completions", json={**body, "model": "added"}, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        file.write_text(declared(echo_tokens_per_s=500))
        wait_for(lambda: cold.state("added")["state"] == "draining", 20)
        assert list(lines)[-2:][0] == "data: [DONE]"
    wait_for(lambda: cold.state("added")["state"] == "cold", 60)
    file.unlink()
    wait_for(lambda: cold.get("/v1/models/added")[0] == 404, 20)
    assert ask(cold, "added").status_code == 404


def test_operations_are_for_those_who_administer(cold: Product) -> None:
    ask(cold, "cold")
    assert cold.tell("cold", "pin") == 202
    assert cold.state("cold")["pinned"] is True
    assert cold.state("cold")["idle_in_s"] is None
    cold.tell("cold", "unpin")
    unknown = httpx.post(f"{cold.url}/admin/pipelines/cold/explode")
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "operation")
    assert httpx.post(f"{cold.url}/admin/pipelines/nobody/load").status_code == 404
    elsewhere = {"origin": "https://example.com"}
    assert httpx.post(f"{cold.url}/admin/pipelines/cold/unload", headers=elsewhere).status_code == 403


def test_loads_and_unloads_leave_nothing_behind(cold: Product) -> None:
    """Of memory, descriptors, shared memory and processes; `python -m tests.loads` does it a thousand times."""

    def loaded_and_unloaded(times: int) -> Left:
        for _ in range(times):
            ask(cold, "cold")
            unloaded(cold, "cold")
        return left(cold)

    before = loaded_and_unloaded(6)
    after = loaded_and_unloaded(6)
    wait_for(lambda: (left(cold).segments, left(cold).zombies) == (before.segments, before.zombies), 10)
    assert after.descriptors <= before.descriptors + 2
    assert after.server_kb < 1.01 * before.server_kb
    assert after.gateway_kb < 1.01 * before.gateway_kb
    assert after.zygote_kb < 1.01 * before.zygote_kb


def test_a_stream_outlives_the_loads_of_others(cold: Product) -> None:
    ask(cold, "cold")
    body = {"model": "cold", "prompt": "a b c", "max_tokens": 20, "stream": True}
    texts: list[str] = []

    def stream() -> None:
        for _ in range(5):
            with httpx.stream("POST", f"{cold.url}/v1/completions", json=body, timeout=60) as response:
                texts.append(response.read().decode())

    thread = threading.Thread(target=stream)
    thread.start()
    ask(cold, "brief")
    thread.join()
    assert all("[DONE]" in text for text in texts)
