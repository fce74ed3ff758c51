"""The process that stages are forked from: their imports are done once, and not at every load.

Importing is most of a cold start: 3.4 of generate's 4 s of processor time, and as much for the other three stages
together as for all else. There are two: the first has what every stage needs, and is ready within a second; the second
is forked from it for what takes torch, when that is first asked for, so that nobody pays for it who serves none.

Neither runs a stage. Both end with whoever started the first; a stage ends with whoever asked for it (the channel it
was asked by). Knows how a stage's process is named, and nothing else of Triton; `gateway/zygote.cpp` runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import logging
import os
import signal
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path

from observability import tracing
from pipelines import phases
from pipelines.pipeline import DEFAULT, CatalogError, get_pipeline, read_catalog
from pipelines.sources import is_pulled

log = logging.getLogger(__name__)

SOCKET = "TRIPTYCH_ZYGOTE_SOCKET"  # the variable that says where it listens
WARM = b"torch"  # asked for in place of a stage: the second one, before it is needed

_MODULES = (
    "pipelines.operations",
    "pipelines.orchestrator",
    "pipelines.postprocess",
    "pipelines.preprocess",
    "pipelines.sender",
    "pipelines.constraint",
    "pipelines.merges",
    "jinja2.ext",
    "jinja2.meta",
    "jinja2.sandbox",
)
_TORCH_MODULES = (
    "pipelines.engine.batched",
    "pipelines.engine.compiled",
    "pipelines.engine.compiled_step",
    "pipelines.engine.native_layers",
    "pipelines.images.vision",
    "pipelines.images.reading",
    "torch.utils.serialization",
)
# For models that are made anew at every load.
_UNKEPT_MODULES = ("pipelines.engine.weights", "torch.fx.experimental.symbolic_shapes")
_MOST_BYTES = 65536  # of one request
_REQUEST_S = 1.0  # whoever connects asks at once
_HANDSHAKE_S = 10.0
_SET_SIGNAL = 10  # F_SETSIG, which fcntl does not name before Python 3.13
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def serve() -> None:
    """Returns in a process that is to run a stage, and only there."""
    place = os.environ.pop(SOCKET)
    _import((*_MODULES, *tracing.modules(os.environ)))
    _reap_children()
    with _listening(place) as listener:
        torch = _WithTorch(listener)
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(_REQUEST_S)
                try:
                    request = connection.recv(_MOST_BYTES)
                except OSError:
                    continue
                if request == WARM:
                    is_stage = torch.warm()
                elif _takes_torch(request):
                    is_stage = torch.hand(request, connection)
                else:
                    is_stage = _fork(request, connection)
                if is_stage:
                    torch.close()
                    return


def _listening(place: str) -> socket.socket:
    """Whoever connects is heard: the socket has its name only once it is one."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fresh = f"{place}.{os.getpid()}"
    listener.bind(fresh)
    listener.listen(64)
    os.rename(fresh, place)
    return listener


class _WithTorch:
    """The second zygote, as the first one knows it."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._channel: socket.socket | None = None

    def hand(self, request: bytes, connection: socket.socket) -> bool:
        """Passes a request on; True in the stage that comes of it. If that fails, whoever asked is on its own."""
        try:
            connection.send(WARM)  # whoever asked is heard, and need not be answered soon
        except OSError:
            return False
        for _ in range(2):  # it may have died
            if self.warm(connection):
                return True
            assert self._channel
            try:
                socket.send_fds(self._channel, [request], [connection.fileno()])
                return False
            except OSError as error:
                log.warning("the zygote with torch is gone, another one begins: %s", error)
                self.close()
        return False

    def close(self) -> None:
        if self._channel:
            self._channel.close()
            self._channel = None

    def warm(self, asking: socket.socket | None = None) -> bool:
        """Begins it, unless it has begun; True in a stage, which is one that asks later."""
        if self._channel:
            return False
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(_REQUEST_S)
        first = os.getpid()
        if os.fork():
            theirs.close()
            return False
        with _only_stages_leave():
            for inherited in (self._listener, self._channel, asking):
                if inherited:
                    inherited.close()
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
            if os.getppid() != first:
                os._exit(0)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _import_torch()
            _reap_children()
            _serve_with_torch(theirs)
        return True


def _serve_with_torch(channel: socket.socket) -> None:
    """Returns in a stage."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(channel, _MOST_BYTES, 1)
        if not request:
            os._exit(0)
        with socket.socket(fileno=descriptors[0]) as connection:
            if _fork(request, connection):
                channel.close()
                return


def _reap_children() -> None:
    """Nobody asks how one ended. Not while importing: that may start a program and ask."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def _fork(request: bytes, connection: socket.socket) -> bool:
    """True in the process that is to run the stage, once whoever asked for it has said that it is wanted."""
    if os.fork():
        return False
    with _only_stages_leave():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection.settimeout(_HANDSHAKE_S)
        connection.send(str(os.getpid()).encode())
        if connection.recv(1) != b"1":
            os._exit(0)
        _end_with(connection)
        phases.begin()
        become = ctypes.CDLL(None).triptych_become
        become.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        become(request, len(request))
    return True


def _end_with(connection: socket.socket) -> None:
    """Killed by the kernel once the other side is closed (fcntl(2), F_SETSIG): also if this process is stopped."""
    kept = os.dup(connection.fileno())
    fcntl.fcntl(kept, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(kept, _SET_SIGNAL, signal.SIGKILL)
    fcntl.fcntl(kept, fcntl.F_SETFL, fcntl.fcntl(kept, fcntl.F_GETFL) | fcntl.FASYNC | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        if not os.read(kept, 1):  # closed before
            os._exit(0)


@contextlib.contextmanager
def _only_stages_leave() -> Iterator[None]:
    """In a forked process: what goes wrong ends it, and never goes on as the zygote it is a copy of."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _takes_torch(request: bytes) -> bool:
    """Whether a stage does: of a pipeline with pictures also preprocess. `stub …/PIPELINE-MODEL/1/model.py …`"""
    with contextlib.suppress(LookupError, CatalogError):
        name = Path(os.fsdecode(request.split(b"\0")[1])).parent.parent.name
        named, _, model = name.rpartition("-")
        pipeline = get_pipeline(named or DEFAULT)
        return pipeline.engine != "echo" and (model == "generate" or (model == "preprocess" and pipeline.takes_images))
    return False


def _import_torch() -> None:
    """And what the models on this machine are made of: all of torch only where one is not kept as it is in memory."""
    from pipelines.engine import lean, snapshot
    from pipelines.operations import kept_at

    # A process that has asked the driver cannot be forked; the management library may be asked (torch.cuda, notes).
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    gc.disable()  # as in collector_off
    models: set[str] = set()
    pulled = [each for each in read_catalog()[0].values() if each.engine == "transformers" and is_pulled(each)]
    unkept = 0
    for pipeline in pulled:
        try:
            models.update(snapshot.modules_of(kept_at(pipeline)))
        except (OSError, snapshot.SnapshotError):
            unkept += 1
    lean.import_torch()
    lean.import_transformers(*sorted(models))
    _import(_TORCH_MODULES)
    if unkept:
        lean.complete_torch()
        _import(_UNKEPT_MODULES)


def _import(modules: tuple[str, ...]) -> None:
    gc.disable()
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # and stays shared with what is forked: a collection writes into all that it looks at
    gc.enable()
