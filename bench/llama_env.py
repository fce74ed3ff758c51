"""llama-cpp-python in an environment of its own, built from source for this very processor the first time.

Knows pip; not what is measured. The folder may be removed at any time: it is built again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench import worker
from bench.peers import ROOT, PeerError, end_session

FOLDER = ROOT / ".bench" / "llama-cpp"
BUILD_S = 1800.0
CHECK_S = 60.0


def python(folder: Path = FOLDER) -> str:
    """The interpreter that has llama_cpp. A PeerError says why there is none, and where the build's output is."""
    interpreter = folder / "bin" / "python"
    if not _works(interpreter):
        _build(folder, interpreter)
        if not _works(interpreter):
            raise PeerError(f"llama-cpp-python was installed but cannot be imported: see {_log(folder)}")
    return str(interpreter)


def _works(interpreter: Path) -> bool:
    if not interpreter.exists():
        return False
    command = [str(interpreter), "-c", "import llama_cpp"]
    return subprocess.run(command, capture_output=True, timeout=CHECK_S).returncode == 0


def _build(folder: Path, interpreter: Path) -> None:
    print(f"Building llama-cpp-python in {folder}, once: allow ten minutes ({_log(folder)})", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [str(interpreter), "-m", "pip", "install", "--disable-pip-version-check", "llama-cpp-python"],
    ]
    with _log(folder).open("wb") as log:
        for step in steps:
            process = subprocess.Popen(
                step,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=worker.die_with_parent,
            )
            try:
                code = process.wait(BUILD_S)
            except subprocess.TimeoutExpired:
                raise PeerError(
                    f"building llama-cpp-python took more than {BUILD_S:.0f} s: see {_log(folder)}"
                ) from None
            finally:
                end_session(process)
            if code:
                raise PeerError(f"llama-cpp-python could not be built, exit code {code}: see {_log(folder)}")


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")
