"""`triptych doctor`: checks what serving needs. Each failure is one sentence with its remedy; nothing is changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gateway.installed import TritonError, backend_directory, libpython
from gateway.settings import Settings
from gateway.triton import port_is_free
from pipelines.pipeline import cache_dir

_SHM_NEEDED_MB = 128  # four stubs with 16 MB each, and room to grow
# Three stubs keep as much as the largest pictures in flight at once became: 50 MB of features, three times 80 MB.
_SHM_FOR_PICTURES_MB = 1024


class Failed(Exception):
    """A check failed: the sentence with the remedy."""


def check_python() -> str:
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise Failed(f"Python {sys.version.split()[0]} has no Triton stub: use Python 3.10 to 3.13.")
    return sys.version.split()[0]


def check_venv() -> str:
    if sys.prefix == sys.base_prefix:
        raise Failed(
            "This is not a virtual environment, and Triton's stubs take their packages from one: run `make setup`."
        )
    return sys.prefix


def check_libpython() -> str:
    library = libpython()
    if library is None:
        raise Failed(
            "This Python has no shared libpython, which Triton's stub loads: use one that has it "
            "(Debian: apt-get install python3-dev; pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared)."
        )
    return str(library)


def check_numpy() -> str:
    found = _version("numpy")
    if int(found.split(".")[0]) >= 2:
        raise Failed(f"numpy {found} does not work with Triton 2.51's stub: pip install 'numpy<2'.")
    return found


def check_torch() -> str:
    return _version("torch")


def check_triton() -> str:
    try:
        return str(backend_directory())
    except TritonError as error:
        raise Failed(f"{error}.") from None


def check_ports(settings: Settings) -> str:
    grpc = int(settings.triton_grpc.rpartition(":")[2])
    taken = [port for port in (settings.port, grpc - 1, grpc, grpc + 1) if not port_is_free(port)]
    if taken:
        raise Failed(
            f"Port {', '.join(map(str, taken))} is in use (by a running `triptych serve`?): "
            "choose others with --port and --triton-grpc-port."
        )
    return f"{settings.port}, {grpc - 1}-{grpc + 1} are free"


def check_shm() -> str:
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise Failed("/dev/shm is missing or not writable, and Triton's stubs talk through it: mount a tmpfs there.")
    free = shutil.disk_usage(folder).free // 2**20
    if free < _SHM_NEEDED_MB:
        raise Failed(f"/dev/shm has {free} MB free, {_SHM_NEEDED_MB} are needed: enlarge it (docker: --shm-size=1g).")
    enough = "" if free >= _SHM_FOR_PICTURES_MB else f"; with large pictures {_SHM_FOR_PICTURES_MB} may be needed"
    return f"{free} MB free{enough}"


def check_cache() -> str:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failed(f"{folder} cannot be made ({error.strerror}): set TRIPTYCH_CACHE to a folder of yours.") from None
    return f"{folder}, {shutil.disk_usage(folder).free // 2**20} MB free"


def check_gpu() -> str:
    """Having none is no failure; having one that torch cannot use is."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "none; the CPU is used"
    listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20)
    if listed.returncode or not listed.stdout.strip():
        return "none; the CPU is used"
    if "+cpu" in _version("torch"):
        raise Failed("There is a GPU, but torch is a CPU build: pip install 'torch==2.13.*' from the CUDA index.")
    return listed.stdout.splitlines()[0]


def doctor(settings: Settings) -> int:
    """Print every check; answers the exit code."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", check_python),
        ("venv", check_venv),
        ("libpython", check_libpython),
        ("numpy", check_numpy),
        ("torch", check_torch),
        ("triton", check_triton),
        ("ports", lambda: check_ports(settings)),
        ("/dev/shm", check_shm),
        ("cache", check_cache),
        ("gpu", check_gpu),
    ]
    failed = 0
    for name, check in checks:
        try:
            print(f"ok    {name:<10} {check()}")
        except Failed as failure:
            failed += 1
            print(f"FAIL  {name:<10} {failure}")
    return 1 if failed else 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise Failed(f"{package} is not installed: run `make setup`.") from None
