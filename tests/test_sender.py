"""A sender is never touched after, nor asked beside, its final response: Triton would crash (see the module)."""

from __future__ import annotations

import threading
import time

from pipelines.sender import FINAL, Sender


class Raw:
    """Triton's sender as it is: to ask it after its end, or while that is sent, is the end of the server."""

    def __init__(self) -> None:
        self.freed = False
        self.crashes = 0
        self.sent: list[int] = []

    def send(self, response: object = None, flags: int = 0) -> None:
        if self.freed:
            self.crashes += 1
        self.sent.append(flags)
        if flags & FINAL:
            self.freed = True
        time.sleep(0.0002)

    def is_cancelled(self) -> bool:
        before = self.freed
        time.sleep(0.0002)
        if before or self.freed:
            self.crashes += 1
        return False


def test_nothing_after_the_end() -> None:
    raw = Raw()
    sender = Sender(raw)
    assert sender.send("a")
    assert sender.send(final=True)
    assert not sender.send("b")
    assert not sender.send(final=True)
    assert sender.is_cancelled() is False
    assert (raw.sent, raw.crashes) == ([0, FINAL], 0)


def test_asking_and_ending_at_once_never_meet() -> None:
    for _ in range(100):
        raw = Raw()
        sender = Sender(raw)
        threads = [threading.Thread(target=sender.is_cancelled) for _ in range(4)]
        threads += [threading.Thread(target=sender.send, kwargs={"final": True}) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert raw.crashes == 0
        assert raw.sent == [FINAL]
