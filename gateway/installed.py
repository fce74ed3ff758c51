"""What is installed of Triton, and what this project builds to go with it: where the parts are, and their environment.

The binary, the python backend and its stubs come from the nvidia-pytriton package. Starts nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from pipelines import compiler
from pipelines.pipeline import cache_dir

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_STUB = "triton_python_backend_stub"  # as the backend calls it, which finds it beside its library
_PLAIN = "stub"  # as the stand-in calls it, beside itself
_OPTIONS = ("-O2", "-std=c++17", "-fno-threadsafe-statics")


class TritonError(RuntimeError):
    """Triton could not be started; the message says what to do."""


def server_home() -> Path:
    """The package's folder with bin/, backends/ and python_backend_stubs/."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise TritonError("nvidia-pytriton is not installed: run `make setup`")
    return Path(spec.submodule_search_locations[0]) / "tritonserver"


def stub() -> Path:
    """The program that runs a stage, of this Python."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = server_home() / "python_backend_stubs" / version / _STUB
    if not found.exists():
        raise TritonError(f"there is no Triton stub for Python {version}: use Python 3.10 to 3.13")
    return found


def backend_directory(stand_in: Path | None = None) -> Path:
    """A backends folder of our own: the python backend with the stub of this Python beside its library.

    With a `stand_in`, that is what the backend starts, and the stub is beside it.
    """
    package = importlib.metadata.version("nvidia-pytriton")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    kind = f"-{stand_in.name}" if stand_in else ""
    folder = cache_dir() / "triton" / f"{package}-py{version}{kind}"
    python = folder / "python"
    python.mkdir(parents=True, exist_ok=True)
    files = {file.name: file for file in (server_home() / "backends" / "python").iterdir() if file.is_file()}
    files |= {_STUB: stand_in, _PLAIN: stub()} if stand_in else {_STUB: stub()}
    for name, file in files.items():
        link = python / name
        if not (link.is_symlink() and link.readlink() == file):
            link.unlink(missing_ok=True)
            link.symlink_to(file)
    return folder


def server_libraries() -> list[Path]:
    """What is preloaded into the server: it takes over the locks of stages that are killed, and has one heap.

    None without a compiler: such a death may end the server, which then is restarted, and each load adds to it.
    """
    try:
        return [_built(name, compiler.SHARED) for name in ("orphaned_locks", "one_arena")]
    except compiler.CompilerError as error:
        log.warning("a stage that is killed may take tritonserver with it: %s", error)
        return []


def zygote_library() -> Path:
    """What makes a zygote of the stub. Raises CompilerError."""
    return _built("zygote", compiler.SHARED)


def stand_in() -> Path:
    """What asks the zygote in the stub's place. Raises CompilerError."""
    return _built("stand_in", ())


def _built(name: str, kind: Sequence[str]) -> Path:
    """From our source, when it is first wanted."""
    source = _HERE / f"{name}.cpp"
    told = hashlib.sha256(source.read_bytes() + (_HERE / "preloaded.h").read_bytes()).hexdigest()[:16]
    file = cache_dir() / "triton" / f"{name}-{told}"
    if not file.exists():
        compiler.build(file, [source], (*_OPTIONS, *kind))
    return file


def libpython() -> Path | None:
    """The shared libpython of this interpreter, which the stub loads; None if it was built without one."""
    name = str(sysconfig.get_config_var("INSTSONAME"))
    multiarch = str(sysconfig.get_config_var("MULTIARCH"))
    for folder in (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib", f"/usr/lib/{multiarch}", "/usr/lib64"):
        file = Path(str(folder)) / name
        if ".so" in name and file.exists():
            return file
    return None


def environment() -> dict[str, str]:
    """What the server and its stubs need: this virtual environment first, its libraries and libpython to be found."""
    library = libpython()
    if library is None:
        raise TritonError(
            "this Python has no shared libpython: use one that has it (Debian: python3-dev, pyenv: --enable-shared)"
        )
    libraries = [str(server_home().parent.parent / "nvidia_pytriton.libs"), str(library.parent)]
    current = os.environ.get("LD_LIBRARY_PATH", "")
    path = [str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(libraries + ([current] if current else [])),
        "PATH": ":".join(path),
        "VIRTUAL_ENV": sys.prefix,
    }
