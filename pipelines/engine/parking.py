"""A model's weights out of memory, and back to where they were: whoever holds them or their addresses notices nothing.

On a CPU whole pages are given back to the kernel and read again from a file; what is smaller stays. A GPU's wait in the
host's memory. Knows tensors; no model, and not when this may be done.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor, UntypedStorage

LEAST = 1 << 16  # bytes: smaller tensors stay
_PART = 1 << 24  # bytes read or written at once
_THREADS = 4  # that read: it is half copying, half waiting for a disk
_LIBC = ctypes.CDLL(None, use_errno=True)


class Pages(NamedTuple):
    """Whole pages of this process's memory, and where in a file is what was in them."""

    address: int
    length: int
    offset: int


class Parking:
    """The weights among `tensors`. Those of a CPU are written, once, to a file without a name in `folder`."""

    def __init__(self, tensors: Iterable[Tensor], folder: Path | None = None) -> None:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        large = [storage for storage in storages.values() if storage.nbytes() >= LEAST]
        self._held = large  # so that their memory is nobody else's
        self._pages = _pages([storage for storage in large if storage.device.type == "cpu"])
        self._on_gpu = [InHost(storage) for storage in large if storage.device.type != "cpu"]
        self._folder = folder
        self._file: IO[bytes] | None = None

    def park(self) -> None:
        """Where it fails, of a full disk for instance, all is as it was."""
        if self._pages and self._file is None:
            self._file = _written(self._pages, self._folder)
        try:
            for storage in self._on_gpu:
                storage.park()
        except BaseException:
            self.wake()
            raise
        for pages in self._pages:
            if _LIBC.madvise(ctypes.c_void_p(pages.address), ctypes.c_size_t(pages.length), mmap.MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), "madvise refused to give memory back")

    def wake(self) -> None:
        if self._file is not None:
            _read(self._file.fileno(), self._pages)
        for storage in self._on_gpu:
            storage.wake()


class InHost:
    """A storage whose bytes wait in the host's memory, locked there for the copies where there is a GPU."""

    def __init__(self, storage: UntypedStorage) -> None:
        self._storage = storage
        self._size = storage.nbytes()
        self._parts: list[Tensor] = []

    def park(self) -> None:
        pinned = torch.cuda.is_available()
        # In parts of a power of two: torch would round the locked memory of a whole one up to that.
        for part in torch.split(self._bytes(), _PART):
            self._parts.append(torch.empty(len(part), dtype=torch.uint8, pin_memory=pinned).copy_(part))
        self._storage.resize_(0)

    def wake(self) -> None:
        """Nothing where it is not parked."""
        if not self._parts:
            return
        self._storage.resize_(self._size)
        for part, kept in zip(torch.split(self._bytes(), _PART), self._parts, strict=True):
            part.copy_(kept)
        self._parts = []

    def _bytes(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._storage.device).set_(self._storage)


def _pages(storages: Iterable[UntypedStorage]) -> list[Pages]:
    """The whole pages of each; what may be memory of two storages is once."""
    found: list[Pages] = []
    free = offset = 0
    for start, end in sorted((storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages):
        first = -(-max(start, free) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (end - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            found.append(Pages(first, length, offset))
            free, offset = first + length, offset + length
    return found


def _written(pages: Sequence[Pages], folder: Path | None) -> IO[bytes]:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        file = opened.enter_context(tempfile.TemporaryFile(dir=folder))
        for part in _parts(pages):
            _all(lambda memory, at: os.pwrite(file.fileno(), memory, at), part)
        opened.pop_all()
    return file


def _read(file: int, pages: Sequence[Pages]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda part: _all(lambda memory, at: os.preadv(file, [memory], at), part), _parts(pages)))


def _parts(pages: Iterable[Pages]) -> list[Pages]:
    return [
        Pages(each.address + at, min(_PART, each.length - at), each.offset + at)
        for each in pages
        for at in range(0, each.length, _PART)
    ]


def _all(move: Callable[[memoryview, int], int], pages: Pages) -> None:
    memory = memoryview((ctypes.c_char * pages.length).from_address(pages.address)).cast("B")
    done = 0
    while done < pages.length:
        moved = move(memory[done:], pages.offset + done)
        if moved == 0:
            raise OSError("the file of the parked weights has become shorter")
        done += moved
