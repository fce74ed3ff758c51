"""The bytes of bodies that are held at once: never more than there is room for, and none is forgotten."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.room import FREE, Room
from gateway.settings import Settings
from pipelines.errors import StageError
from tests.scripted import ACCEPTED, CHAT_PATH, FOREVER, HELLO, ScriptedBackend, Server, wait_for

SIZES = st.lists(st.integers(0, 3 * FREE), max_size=6)


@given(st.integers(0, 10 * FREE), st.lists(SIZES, max_size=6))
def test_never_more_than_there_is_and_all_comes_back(size, bodies):
    room = Room(size)
    with contextlib.ExitStack() as stack:
        for body in bodies:
            share = stack.enter_context(room.share())
            for part in body:
                before = room.held
                with contextlib.suppress(StageError):
                    share.take(part)
                    continue
                assert room.held == before
                assert before + part > size
                break
            assert room.held <= size
    assert room.held == 0


def test_a_small_body_always_has_room():
    with Room(0).share() as share:
        share.take(FREE)
        with pytest.raises(StageError) as error:
            share.take(1)
        assert error.value.code == "overloaded"


def test_large_requests_share_the_room():
    """Also while they wait for their answer, and small ones go on."""
    limits = {"max_body_bytes": 300_000, "max_image_bytes": 0, "max_body_memory_bytes": 400_000}
    large = {**HELLO, "messages": [{"role": "user", "content": "x" * 280_000}]}
    backend = ScriptedBackend()
    with Server(backend, Settings(**limits)) as server:
        backend.steps = [ACCEPTED, FOREVER]
        with server.open(CHAT_PATH, large):
            wait_for(lambda: backend.streams)
            backend.reset()
            refused = server.post(CHAT_PATH, large)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
            assert refused.headers["retry-after"] == "1"
            assert server.post(CHAT_PATH, HELLO).status_code == 200
        wait_for(lambda: server.post(CHAT_PATH, large).status_code == 200)
        assert server.post(CHAT_PATH, large).status_code == 200
