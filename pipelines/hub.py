"""`hf:` sources: a repository of the Hugging Face hub. Also which of a model's files serving needs, for any folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from pipelines.fetch import DISK_FULL, Progress, PullError, check_space, size_of, watching
from pipelines.pipeline import Pipeline

# Of a model's folder, what serving it needs; names with a slash (other formats, checkpoints) are never taken.
TEXT_FILES = re.compile(r".+\.(json|jinja|model|tiktoken)|merges\.txt|vocab\.txt")
_CODE = re.compile(r".+\.py")
_SAFETENSORS = re.compile(r"(?!consolidated).+\.safetensors")  # consolidated: a second copy in another layout


def fetch_hf(pipeline: Pipeline, folder: Path, work: Path, progress: Progress) -> None:
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
        wanted = choose_files(list(sizes), file[0] if file else "", f"hf:{repo}", code=pipeline.trust_remote_code)
        total = sum(sizes[name] for name in wanted)
        check_space(work, total)
        with watching(folder, "downloading", total, progress):
            huggingface_hub.snapshot_download(
                repo, revision=info.sha or revision or None, local_dir=folder, allow_patterns=wanted
            )
    except (PullError, KeyboardInterrupt):
        raise
    except Exception as error:  # the hub's, httpx's and the operating system's
        if isinstance(error, OSError) and (error.errno in DISK_FULL or error.filename):
            raise
        raise PullError(_hf_sentence(error, repo, revision)) from error
    finally:
        if shown:
            enable_progress_bars()
    for name in wanted:  # the hub's library is content with what is there when the hub stops answering
        if size_of(folder / name) != sizes[name]:
            raise PullError(f"the download of {repo} ended before {name} was whole: pull again.")
    if pipeline.trust_remote_code:
        _fetch_tokenizers(folder, work)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's notes on what it downloaded
    for nested in (name for name in wanted if "/" in name):
        (folder / nested).rename(folder / Path(nested).name)
        shutil.rmtree(folder / nested.split("/")[0])


def _fetch_tokenizers(folder: Path, work: Path) -> None:
    """Those that the code in the folder would take from the hub by name, when it runs."""
    import huggingface_hub

    from pipelines.engine.remote_files import asked_for

    for repo, file in asked_for(folder).items():
        try:
            taken = huggingface_hub.hf_hub_download(repo, "tokenizer.json", local_dir=work / file.name)
        except Exception as error:
            raise PullError(_hf_sentence(error, repo, "")) from error
        Path(taken).rename(file)


def choose_files(names: list[str], file: str, where: str, *, code: bool = False) -> list[str]:
    """Of a model's files the ones to take: safetensors first, else a GGUF, which holds all the rest.

    What lies beside the weights as `code` is left where it is, unless the pipeline trusts it.
    """
    if file:
        if file not in names:
            raise PullError(f"{where} has no file {file!r}: its GGUF files are {_listed(names)}.")
        return [file]
    flat = [name for name in names if "/" not in name]
    weights = [name for name in flat if _SAFETENSORS.fullmatch(name)]
    if weights:
        return weights + [name for name in flat if TEXT_FILES.fullmatch(name) or (code and _CODE.fullmatch(name))]
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
