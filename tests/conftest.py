"""What many tests share: the real weights, a running product, and an OTLP receiver beside it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import httpx._transports.default
import hypothesis
import pytest

from gateway.settings import Settings
from pipelines.pipeline import CATALOG, get_pipeline
from pipelines.sources import pull
from tests.otlp_receiver import Receiver
from tests.product import SERVERS, Product
from tests.scripted import ScriptedBackend, Server

# Pipelines of the tests' own: echoes with a pace, with a small context, with one event a token.
_CATALOG = {
    "echo-slow": "echo_tokens_per_s = 50",
    "echo-token": 'stream_event = "token"\nmax_running = 1024',
    "echo-small": "context = 64",
}
_KEPT = "keep_alive = -1\n"  # whatever the time between two tests: a parked one would have to be woken
SERVED = ("smollm2-135m-instruct", "echo", *_CATALOG)


@pytest.hookimpl(tryfirst=True)  # before -m selects by it
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SERVERS:
            item.add_marker("server")


@pytest.fixture(scope="session")
def smollm2_home() -> Path:
    return pull(get_pipeline("smollm2-135m-instruct"))


@pytest.fixture(scope="session")
def gemma3_home() -> Path:
    return pull(get_pipeline("gemma3-270m"))


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory, smollm2_home: Path) -> Path:
    """A catalog folder with the tests' own pipelines."""
    folder = tmp_path_factory.mktemp("catalog")
    echo = get_pipeline("echo")
    for name, lines in _CATALOG.items():
        digests = ", ".join(f'"{file}" = "{digest}"' for file, digest in echo.sha256.items())
        text = f'engine = "echo"\nsource = "{echo.source}"\nsha256 = {{ {digests} }}\n{_KEPT}{lines}\n'
        (folder / f"{name}.toml").write_text(text)
    for name in ("smollm2-135m-instruct", "echo"):
        shipped = (CATALOG / f"{name}.toml").read_text()
        (folder / f"{name}.toml").write_text(shipped.replace("\n[sha256]", f"\n{_KEPT}[sha256]"))
    return folder


@pytest.fixture(scope="session")
def otlp() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory, catalog: Path, otlp: Receiver) -> Iterator[Product]:
    """The default pipeline and echoes, traced. Shared: a test must leave it as it was."""
    env = {
        "TRIPTYCH_CATALOG": str(catalog),
        "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "TRIPTYCH_RECORD": "8",
    }
    product = Product(tmp_path_factory.mktemp("product"), *SERVED, env=env)
    try:
        yield product.wait_ready()
    finally:
        product.stop()
        print(product.log_text()[-2000:])


@pytest.fixture
def own_product(tmp_path: Path, catalog: Path) -> Iterator[Product]:
    """A pipeline of one's own to break, and one beside it that shall not notice."""
    env = {"TRIPTYCH_CATALOG": str(catalog), "TRIPTYCH_ACCEPT_TIMEOUT_S": "120"}  # a repair may be slow here
    product = Product(tmp_path, "echo-slow", "echo-small", env=env)
    try:
        yield product.wait_ready()
    finally:
        if product.process.poll() is None:
            product.stop()


@pytest.fixture(scope="module")
def module_server():
    with Server(ScriptedBackend(), Settings()) as running:
        yield running


@pytest.fixture
def server(module_server):
    module_server.backend.reset()
    return module_server


@pytest.fixture
def backend(server):
    return server.backend


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No test asserts a time, and hypothesis' own limit of 200 ms an example is one: a busy machine is slow now and then.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# Every httpx client, and with it every `httpx.get` and official client, reads the certificate authorities anew: 60 ms,
# to speak plain HTTP to this machine.
httpx._transports.default.create_ssl_context = functools.cache(httpx._transports.default.create_ssl_context)
