"""Admission, the lifespan, the settings, and what is imported; a backend that plays scripts."""

import contextlib
import subprocess
import sys

import pytest

from gateway.settings import Settings, SettingsError
from tests.scripted import ACCEPTED, ANSWER, CHAT_PATH, FOREVER, HELLO, MODEL, ScriptedBackend, Server, sample, wait_for

# Admission.


def test_one_over_the_queue_is_refused():
    backend = ScriptedBackend()
    backend.steps = [ACCEPTED, FOREVER]
    with Server(backend, Settings(max_concurrency=1, max_queue=1)) as server:
        running = server.open(CHAT_PATH, HELLO)
        wait_for(lambda: len(backend.streams) == 1)
        queued = server.open(CHAT_PATH, HELLO)
        wait_for(lambda: sample("triptych_requests_queued", pipeline=MODEL) == 1)
        response = server.post(CHAT_PATH, HELLO)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "overloaded"
        assert len(backend.streams) == 1
        running.close()  # its place goes to the one that waits
        wait_for(lambda: len(backend.streams) == 2)
        waiting = server.open(CHAT_PATH, HELLO)
        wait_for(lambda: sample("triptych_requests_queued", pipeline=MODEL) == 1)
        waiting.close()  # one that leaves the queue frees its place in it
        wait_for(lambda: sample("triptych_requests_queued", pipeline=MODEL) == 0)
        queued.close()
        wait_for(lambda: backend.streams[1].cancelled_at)
        backend.steps = ANSWER
        assert server.post(CHAT_PATH, HELLO).status_code == 200


def test_choices_are_admitted_together():
    backend = ScriptedBackend()
    backend.steps = [ACCEPTED, FOREVER]
    with Server(backend, Settings(max_concurrency=4)) as server:
        first = server.open(CHAT_PATH, {**HELLO, "n": 3})
        wait_for(lambda: len(backend.streams) == 3)
        second = server.open(CHAT_PATH, {**HELLO, "n": 2})
        wait_for(lambda: sample("triptych_requests_queued", pipeline=MODEL) == 1)
        assert len(backend.streams) == 3
        first.close()
        wait_for(lambda: len(backend.streams) == 5)
        second.close()
        backend.steps = ANSWER
        assert len(server.post(CHAT_PATH, {**HELLO, "n": 9}).json()["choices"]) == 9  # alone, it is let in


# The app and its settings.


def test_the_lifespan_surrounds_the_requests():
    seen = []

    @contextlib.asynccontextmanager
    async def lifespan():
        seen.append("start")
        yield
        seen.append("stop")

    with Server(ScriptedBackend(), Settings(), lifespan) as server:
        assert seen == ["start"]
        assert server.get("/health/live").status_code == 200
    assert seen == ["start", "stop"]


def test_settings_come_from_the_environment():
    settings = Settings.from_env({"TRIPTYCH_PORT": "81", "TRIPTYCH_TRITON_GRPC": "triton:8001", "TRIPTYCH_HOST": ""})
    assert settings == Settings(port=81, triton_grpc="triton:8001")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("PORT", "70000"),
        ("PORT", "http"),
        ("TRITON_GRPC", "localhost"),
        ("TRITON_GRPC", ":8001"),
        ("TRITON", "a:8001,b"),
        ("TRITON", "a:8001, a:8001"),
        ("MAX_BODY_BYTES", "0"),
        ("MAX_BODY_MEMORY_BYTES", "1000"),
        ("MAX_CONCURRENCY", "0"),
        ("MAX_QUEUE", "-1"),
        ("MAX_CHOICES", "0"),
        ("MAX_TIMEOUT_MS", "0"),
        ("KEY_REQUESTS_PER_MINUTE", "-1"),
        ("KEY_CONCURRENCY", "-1"),
        ("CORS_ORIGINS", "https://a.example/path"),
        ("TLS_KEY", "/without/a/certificate"),
        ("MAX_CONNECTIONS", "0"),
        ("MAX_HEADER_BYTES", "100"),
        ("HEADER_TIMEOUT_S", "0"),
        ("BODY_TIMEOUT_S", "0"),
        ("WRITE_TIMEOUT_S", "0"),
        ("IDLE_TIMEOUT_S", "0"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_a_bad_setting_names_its_key(key, value):
    with pytest.raises(SettingsError, match=f"TRIPTYCH_{key}"):
        Settings.from_env({f"TRIPTYCH_{key}": value})


def test_the_gateway_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'tokenizers', 'numpy'}"
    code = f"import sys, gateway.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.strip() == "[]"
