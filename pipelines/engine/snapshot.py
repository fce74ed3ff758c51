"""A model as it is in memory, in one file: weights that had to be converted are converted once, and read after that.

    kept = place(home, "auto", "")            # by all that the model depends on
    reading = Reading(kept)                   # reads on threads of its own, while torch is imported
    model = reading.model()
    ...
    write(kept, model)

The file is code to whoever reads it (it has a pickle), as the kernels in the same cache are. Imports torch only where
it makes a model or a file. Knows no engine.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import mmap
import os
import pickle
import struct
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from pipelines.engine import native
from pipelines.pipeline import cache_dir

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_MAGIC = b"triptych"
_HEAD = struct.Struct("<8sQQQ")  # magic, and the bytes of: what is told, the pickle, the weights
_ALIGNED = 64  # a cache line: what kernels ask of their tensors
# Threads hide that memory is new (a page is zeroed when it is touched). They must stay near one another: what they read
# in large parts is no sequence to the kernel, which reads ahead little then. In parts of 16 MB: 0.42 of a plain read.
_PART = 1 << 20
_THREADS = 3
_KERNELS = "kernels"


class SnapshotError(ValueError):
    """The file cannot be read; the message says why."""


class _Spec(NamedTuple):
    """One tensor, as bytes of the weights."""

    at: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    parameter: bool


def place(home: Path, dtype: str, quantize: str, *, pictures: bool = False) -> Path:
    """Where the file is, if there is one: the model's files, how it is loaded, and what loads it name it."""
    told = hashlib.sha256(loaded_by())
    kernels = native.load()
    machine = kernels.path.name if kernels else native.processor()
    told.update(repr((dtype, quantize, pictures, machine)).encode())
    for file in sorted(home.iterdir()):
        if file.suffix in (".gguf", ".safetensors", ".json"):
            stat = file.stat()
            told.update(repr((file.name, stat.st_size, stat.st_mtime_ns)).encode())
    return cache_dir() / "snapshots" / f"{home.name}-{told.hexdigest()[:16]}"


@functools.cache
def loaded_by() -> bytes:
    """What the code that reads and writes them has of its own; once a process, since its code stays what it was."""
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]  # each reads a long file
    told = hashlib.sha256(repr((versions, sys.version_info[:2])).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        told.update(source.read_bytes())
    return told.digest()


def modules_of(path: Path) -> list[str]:
    """Where the classes of a kept model are. Raises FileNotFoundError, or SnapshotError."""
    with path.open("rb") as file:
        return _head(file, path)[0]


def _head(file: BinaryIO, path: Path) -> tuple[list[str], list[_Spec], bytes, int]:
    """Its modules, tensors, pickle and bytes of weights; what follows in the file are those."""
    try:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            raise SnapshotError(f"{path} is no snapshot")
        _, told, pickled, length = _HEAD.unpack(head)
        facts = json.loads(file.read(told))
        return facts["modules"], [_Spec(*spec) for spec in facts["tensors"]], file.read(pickled), length
    except ValueError as error:
        raise error if isinstance(error, SnapshotError) else SnapshotError(f"{path}: {error}") from None


class Reading:
    """The file, read from now on. What is wrong with it is a SnapshotError, now or when the model is asked for.

    A FileNotFoundError where there is none.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self.modules, self._specs, self._pickled, self._length = _head(file, path)
                start = _pages(file.tell())
                if os.fstat(file.fileno()).st_size < start + self._length:
                    raise SnapshotError(f"{path} has become shorter")
                descriptor = os.dup(file.fileno())
        except FileNotFoundError:
            raise
        except OSError as error:
            raise SnapshotError(f"{path}: {error}") from None
        self._memory = mmap.mmap(-1, max(1, self._length), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._pool = ThreadPoolExecutor(_THREADS, "snapshot")
        parts = range(0, self._length, _PART)
        self._parts: list[Future[None]] = [self._pool.submit(self._read, descriptor, start, at) for at in parts]
        self._pool.submit(self._end, descriptor)

    def model(self) -> Any:
        import torch

        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        unpickler = _Unpickler(io.BytesIO(self._pickled), [_tensor(whole, spec) for spec in self._specs])
        try:
            model = unpickler.load()
        except Exception as error:
            raise SnapshotError(f"{type(error).__name__}: {error}") from error
        finally:
            self.wait()
        return model

    def wait(self) -> None:
        """Until all is read."""
        try:
            for part in self._parts:
                part.result()
        except OSError as error:
            raise SnapshotError(str(error)) from None

    def _read(self, descriptor: int, start: int, at: int) -> None:
        into, done = memoryview(self._memory)[at : min(at + _PART, self._length)], 0
        while done < len(into):
            got = os.preadv(descriptor, [into[done:]], start + at + done)
            if not got:
                raise OSError("the snapshot has become shorter")
            done += got

    def _end(self, descriptor: int) -> None:
        for part in self._parts:
            part.exception()
        os.close(descriptor)
        self._pool.shutdown(wait=False)


def write(path: Path, model: Any) -> None:
    """Whole or not at all, and in place of what was there for the same home. Never fails: the log says what did."""
    try:
        pickler = _Pickler(file := io.BytesIO())
        pickler.dump(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        modules = sorted({type(part).__module__ for part in model.modules()} | {type(model.config).__module__})
        told = json.dumps({"modules": modules, "tensors": pickler.specs}).encode()
        with ExitStack() as stack:
            fresh = stack.enter_context(tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-"))
            fresh.write(_HEAD.pack(_MAGIC, len(told), len(file.getvalue()), pickler.length))
            fresh.write(told)
            fresh.write(file.getvalue())
            start = _pages(fresh.tell())
            for at, storage in pickler.storages.values():
                fresh.seek(start + at)
                fresh.write(_bytes(storage))
            fresh.truncate(start + pickler.length)
            fresh.flush()
            os.fsync(fresh.fileno())
            os.link(fresh.name, work := f"{fresh.name}.done")
            os.replace(work, path)
        for other in path.parent.glob(f"{path.name.rpartition('-')[0]}-*"):
            if other != path:
                other.unlink(missing_ok=True)
    except Exception as error:  # the model is there all the same
        log.warning("no snapshot of the model: %s: %s", type(error).__name__, error)


def _bytes(storage: Any) -> memoryview:
    import torch

    held: Any = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return memoryview(held)


def _pages(length: int) -> int:
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


def _tensor(whole: Tensor, spec: _Spec) -> Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, spec.dtype)
    found = torch.empty(0, dtype=dtype)
    found.set_(whole.untyped_storage(), spec.at // dtype.itemsize, spec.shape, spec.stride)
    return torch.nn.Parameter(found, requires_grad=False) if spec.parameter else found


class _Pickler(pickle.Pickler):
    """Tensors are told apart from the pickle, and the kernels are those of whoever reads it."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.specs: list[_Spec] = []
        self.storages: dict[int, tuple[int, Any]] = {}  # by where they are: from which byte, and what
        self.length = 0
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []  # what is numbered by its id must live

    def persistent_id(self, value: Any) -> Any:
        import torch

        if isinstance(value, native.Kernels):
            return _KERNELS
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.specs)
            self._kept.append(value)
            self.specs.append(self._spec(value))
        return self._numbers[id(value)]

    def _spec(self, value: Tensor) -> _Spec:
        import torch

        storage = value.untyped_storage()
        if value.device.type != "cpu":
            raise TypeError(f"a tensor is on {value.device}")
        if storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = self.length, storage
            self.length += -(-storage.nbytes() // _ALIGNED) * _ALIGNED
        at = self.storages[storage.data_ptr()][0] + int(value.storage_offset()) * value.element_size()
        dtype = str(value.dtype).removeprefix("torch.")
        return _Spec(at, dtype, tuple(value.shape), value.stride(), isinstance(value, torch.nn.Parameter))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, wanted: Any) -> Any:
        return native.load() if wanted == _KERNELS else self._tensors[wanted]
