"""The kernels in `kernels/`: built by this machine's compiler when weights are prepared, loaded when a model is.

    python -m pipelines.engine.native

builds them by hand. A model's start builds nothing, since it would wait for the compiler: it takes what is there, and
without it goes without. Knows no weight and no torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import platform
import sys
from pathlib import Path

from pipelines import compiler
from pipelines.pipeline import cache_dir

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "kernels"
VERSION = 1  # of the functions: `triptych_kernels` says the same
_OPTIONS = ("-O3", "-march=native", "-std=c++17", "-pthread", "-w")

# The functions' arguments: p: a pointer, i: a whole number, f: a float
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_FUNCTIONS = {
    "linear": "pii pppf p iii pii",
    "rows": "pi pppf iii pi",
    "rms_norm": "pii pff i pi",
    "attention": "pii pp iiii pp iiiii ff pi",
}


class NoKernels(Exception):
    """They cannot be built or loaded here; the message is a clause that says why."""


class Kernels:
    """The functions of the library, as `kernels/*.cpp` describe them. Pointers are integers (`Tensor.data_ptr`).

    `threads` is how many compute, the caller included; 0 is as many as torch has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.threads = 0
        try:
            library = ctypes.CDLL(str(path))
            version = library.triptych_kernels()
        except (OSError, AttributeError) as error:
            raise NoKernels(str(error)) from None
        if version != VERSION:
            raise NoKernels(f"{path} is of version {version}, not {VERSION}")
        self.wide = bool(library.triptych_wide())  # AVX-512; else AVX2
        functions = {name: getattr(library, f"triptych_{name}") for name in _FUNCTIONS}
        self.linear, self.rows = functions["linear"], functions["rows"]
        self.rms_norm, self.attention = functions["rms_norm"], functions["attention"]
        for name, function in functions.items():
            function.argtypes = [_KINDS[kind] for kind in _FUNCTIONS[name] if kind != " "]
            function.restype = ctypes.c_int64 if name == "rows" else None


def place() -> Path:
    """Where this machine's library is, built or not: sources, options and processor name it.

    The compiler does not: its versions make the same functions, and where weights are served there may be none.
    """
    told = hashlib.sha256("\0".join((*_OPTIONS, *compiler.WITHOUT_OTHERS, processor())).encode())
    for source in sorted(SOURCES.iterdir()):
        told.update(source.read_bytes())
    return cache_dir() / "kernels" / f"{told.hexdigest()[:16]}.so"


def processor() -> str:
    """What it can do: a cache may be shared by machines, and these instructions end a process that lacks them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kept = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *dict.fromkeys(line for line in lines if line.startswith(kept))])


def build() -> Path:
    """Compiles them, unless that is done. Whole or not at all, whoever else builds at the same time."""
    library = place()
    if library.exists():
        return library
    try:
        compiler.build(library, sorted(SOURCES.glob("*.cpp")), (*_OPTIONS, *compiler.SHARED))
    except compiler.CompilerError as error:
        raise NoKernels(str(error)) from None
    return library


@functools.cache
def load() -> Kernels | None:
    """The kernels, or None where there are none; the log says why, once."""
    try:
        return _load(place())
    except NoKernels as error:
        log.warning("no native kernels: %s", error)
        return None


def _load(library: Path) -> Kernels:
    if not library.exists():
        raise NoKernels(f"{library} is not built (python -m pipelines.engine.native)")
    return Kernels(library)


def main() -> int:
    try:
        print(build())
    except NoKernels as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
