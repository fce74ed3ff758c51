"""This machine's C++ compiler. Knows nothing of what it makes."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Triton's processes bring their own, which may be older than the compiler's.
WITHOUT_OTHERS = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")
SHARED = ("-shared", "-fPIC")  # a library; without it a program
_TIMEOUT_S = 300


class CompilerError(Exception):
    """There is none, or it fails; the message is a clause that says so."""


def command() -> list[str]:
    """What it is called by: g++, or what CXX says."""
    words = shlex.split(os.environ.get("CXX") or "g++")
    if not words or not shutil.which(words[0]):
        raise CompilerError(f"there is no C++ compiler {words[0] if words else ''!r} (install g++, or set CXX)")
    return words


def build(target: Path, sources: Sequence[Path], options: Sequence[str]) -> None:
    """Compiles and links them: whole or not at all, whoever else builds it at the same time."""
    compiler = command()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as work:
            fresh = Path(work) / target.name
            line = [*compiler, *options, *WITHOUT_OTHERS, *map(str, sources), "-o", str(fresh)]
            done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
            if done.returncode:
                raise CompilerError(_first_error(done.stderr) or f"{compiler[0]} ended with status {done.returncode}")
            os.replace(fresh, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(str(error)) from None


def _first_error(said: str) -> str:
    return next((line.strip() for line in said.splitlines() if "error" in line), "")
