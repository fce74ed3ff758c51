"""Stages are forked from the zygote, end as if Triton had started them, and start without it where it is away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from gateway import installed
from gateway.zygote import zygote_for
from pipelines import zygote
from tests.product import Product, alive, wait_for

ECHO = {"model": "echo-slow", "prompt": "a b c", "max_tokens": 3}


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def zygotes(product: Product) -> list[int]:
    """The first, and then the one with torch, if there is one."""
    return sorted(pid for pid, command in product.family().items() if command.startswith("triptych zygote"))


def stand_ins(product: Product) -> list[int]:
    return [pid for pid, command in product.family().items() if command.startswith("triptych stand-in")]


def answers(product: Product) -> bool:
    response = httpx.post(f"{product.url}/v1/completions", json=ECHO, timeout=60)
    return response.status_code == 200 and bool(response.json()["usage"]["completion_tokens"] == 3)


def reload(product: Product, pipeline: str = "echo-slow") -> None:
    product.tell(pipeline, "unload")
    wait_for(lambda: product.state(pipeline)["state"] == "cold", 60)
    product.tell(pipeline, "load")
    wait_for(lambda: product.state(pipeline)["state"] == "ready", 120)


def test_stages_are_forked_and_triton_has_what_it_started(own_product: Product) -> None:
    [first] = zygotes(own_product)  # nobody needs torch, and nobody has imported it
    stages = [own_product.stub(f"echo-slow-{stage}") for stage in ("preprocess", "generate", "postprocess")]
    assert {parent(stage) for stage in stages} == {first}
    assert {parent(pid) for pid in stand_ins(own_product)} == {own_product.triton()}
    assert len(stand_ins(own_product)) == 8
    assert answers(own_product)
    reload(own_product)
    assert not any(alive(stage) for stage in stages)
    assert parent(own_product.stub("echo-slow-generate")) == first
    assert len(stand_ins(own_product)) == 8
    assert answers(own_product)


def test_what_torch_takes_is_forked_from_the_second(product: Product) -> None:
    first, second = zygotes(product)
    assert parent(second) == first
    assert parent(product.stub("generate")) == second
    assert parent(product.stub("preprocess")) == first
    assert "libtorch" not in Path(f"/proc/{product.stub('preprocess')}/maps").read_text()
    assert parent(product.stub("echo-generate")) == first


def test_a_stage_ends_with_what_triton_started_for_it(own_product: Product) -> None:
    """Also one that is stopped: the kernel ends it."""
    stage = own_product.stub("echo-slow-postprocess")
    os.kill(stage, signal.SIGSTOP)
    [mine] = [pid for pid in stand_ins(own_product) if str(stage) in waited_for(pid)]
    os.kill(mine, signal.SIGKILL)
    wait_for(lambda: not alive(stage), 10)
    wait_for(lambda: own_product.events().get(("echo-slow", "repaired")) == 1, 60)
    assert answers(own_product)


def waited_for(pid: int) -> list[str]:
    """The processes that this one has a descriptor of."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fdinfo").iterdir():
        found += [line.split()[1] for line in descriptor.read_text().splitlines() if line.startswith("Pid:")]
    return found


def test_the_zygote_dies_and_stages_do_not(own_product: Product) -> None:
    [first] = zygotes(own_product)
    stage = own_product.stubs_anywhere()["echo-slow-generate"]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: own_product.events().get(("", "zygote_died")) == 1, 10)
    assert alive(stage)
    assert answers(own_product)
    reload(own_product)  # with another one, or without any
    assert answers(own_product)
    wait_for(lambda: zygotes(own_product) not in ([], [first]), 30)
    [another] = zygotes(own_product)

    def forked() -> bool:
        reload(own_product)
        return parent(own_product.stubs_anywhere()["echo-slow-generate"]) == another

    wait_for(forked, 60)
    assert answers(own_product)
    family = [stage, *own_product.family(), *own_product.stubs_anywhere().values()]
    own_product.stop()
    wait_for(lambda: not any(alive(pid) for pid in family), 10)
    assert own_product.shm() == []


def test_one_that_hangs_does_not_keep_a_load(own_product: Product) -> None:
    """A load is asked for beside it: what is stopped cannot say that it is."""
    [first] = zygotes(own_product)
    os.kill(first, signal.SIGSTOP)
    own_product.tell("echo-slow", "unload")
    wait_for(lambda: own_product.state("echo-slow")["state"] == "cold", 60)
    own_product.tell("echo-slow", "load")
    wait_for(lambda: own_product.state("echo-slow")["state"] == "ready", 120)
    assert parent(own_product.stub("echo-slow-generate")) == own_product.triton()
    os.kill(first, signal.SIGCONT)
    assert answers(own_product)
    wait_for(lambda: len(own_product.stubs_anywhere()) == 8, 10)  # those asked for in vain have ended


def test_without_one_triton_starts_the_stages(tmp_path: Path, catalog: Path) -> None:
    product = Product(tmp_path, "echo-slow", env={"TRIPTYCH_CATALOG": str(catalog), "TRIPTYCH_ZYGOTE": "0"})
    try:
        product.wait_ready()
        assert zygotes(product) == stand_ins(product) == []
        assert parent(product.stub("echo-slow-generate")) == product.triton()
        assert answers(product)
    finally:
        product.stop()


def test_without_a_compiler_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert zygote_for(8001) is None
    assert "every load imports everything anew, which takes seconds: there is no C++ compiler" in caplog.text


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """Beside a stub that says what it was started with."""
    program = tmp_path / "triton_python_backend_stub"
    program.symlink_to(installed.stand_in())
    (tmp_path / "stub").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    (tmp_path / "stub").chmod(0o755)
    return program


def words(server: int) -> list[str]:
    return ["…/a b-generate/1/model.py", "region", "1", "2", str(server), "", "3"]


@pytest.mark.parametrize("where", [None, "", "none.sock", "full of nothing", "x" * 200])
def test_who_finds_no_zygote_becomes_the_stub(stand_in: Path, tmp_path: Path, where: str | None) -> None:
    environ = {key: value for key, value in os.environ.items() if key != zygote.SOCKET}
    if where is not None:
        environ[zygote.SOCKET] = str(tmp_path / where)
    if where == "full of nothing":
        (tmp_path / where).write_text("")
    done = subprocess.run(
        [stand_in, *words(os.getpid())], env=environ, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "".join(f"{word}|" for word in words(os.getpid()))


def test_a_zygote_that_forks_nothing_is_done_without(stand_in: Path, tmp_path: Path) -> None:
    """It is asked in the stub's words, and gives up without an answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "zygote.sock"))
        listener.listen()
        environ = {**os.environ, zygote.SOCKET: str(tmp_path / "zygote.sock")}
        with subprocess.Popen(
            [stand_in, *words(os.getpid())], env=environ, stdout=subprocess.PIPE, text=True
        ) as asking:
            connection, _ = listener.accept()
            assert connection.recv(4096).split(b"\0")[1:] == [word.encode() for word in [*words(os.getpid()), ""]]
            connection.close()
            assert asking.communicate(timeout=30)[0].startswith("…/a b-generate/1/model.py|region|")


def test_by_hand_it_says_what_it_is(stand_in: Path) -> None:
    done = subprocess.run([stand_in], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, f"{stand_in}: not started by Triton\n")


@pytest.mark.parametrize(
    ("model", "takes"),
    [
        ("generate", True),
        ("preprocess", False),
        ("postprocess", False),
        ("orchestrator", False),
        ("shapes-vlm-generate", True),
        ("shapes-vlm-preprocess", True),  # pictures are prepared by transformers
        ("shapes-vlm-postprocess", False),
        ("smollm2-135m-instruct-generate", True),
        ("echo-generate", False),
        ("nobody-generate", False),
        ("generate-", False),
    ],
)
def test_which_stages_take_torch(model: str, takes: bool) -> None:
    request = f"/stub\0/models/{model}/1/model.py\0region\0".encode()
    assert zygote._takes_torch(request) is takes
    assert zygote._takes_torch(b"stub") is False
