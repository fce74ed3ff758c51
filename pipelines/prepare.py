"""Completes a fetched folder, so that the stages read plain files: tokenizer, config, chat template.

transformers does the converting, in a child process (`python -m pipelines.prepare FOLDER`): the one who pulls
keeps neither its memory nor its import time; a folder that lacks nothing starts no child. Knows no sources
and no network; files that are links are replaced here, never written through.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

# GGUF names the pre-tokenizer. transformers knows most names; of these, whose digits stand alone, it does not
# (llama.cpp splits them with `\p{N}` before GPT-2's expression), and "   12" would become other tokens.
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# GGUF names one end token, but a chat model may end with another: llama.cpp knows them by text, and so do we.
_ENDS = ("<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|end|>")
_GGUF_STRING = 8


def python() -> str:
    """The interpreter to start children with: inside Triton's stub, `sys.executable` may not be one."""
    here = Path(sys.executable or "none")
    return str(here if here.name.startswith("python") else Path(sys.prefix, "bin", "python3"))


class PrepareError(Exception):
    """The folder cannot be completed; the message is a clause that says why."""


def prepare(folder: Path) -> None:
    """Adds what `folder` lacks. Its weights (*.gguf or *.safetensors) are there already."""
    gguf = _gguf(folder)
    if not gguf and not (folder / CONFIG).exists():
        raise PrepareError(f"it has no {CONFIG}")
    if gguf and not _is_gguf(gguf):
        raise PrepareError(f"{gguf.name} is not a GGUF file")
    if not all((folder / name).exists() for name in (TOKENIZER, TOKENIZER_CONFIG, CONFIG)):
        _convert_in_child(folder)
    _write_chat_template(folder)


def prepare_machine() -> None:
    """Compiles the engine's kernels, since no model's start may wait for a compiler.

    Without them the engine is slower and its log says so: that is nothing for a pull to fail of.
    """
    from pipelines.engine.native import NoKernels, build

    with contextlib.suppress(NoKernels):
        build()


def _gguf(folder: Path) -> Path | None:
    return next(folder.glob("*.gguf"), None)


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def _convert_in_child(folder: Path) -> None:
    """Reports the child's last line, which `main` makes a sentence."""
    package_root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    child = subprocess.run(
        [python(), "-m", "pipelines.prepare", str(folder)],
        env={**os.environ, **quiet, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"the converter ended with status {child.returncode}"]
        raise PrepareError(lines[-1])


def convert(folder: Path) -> None:
    """Imports transformers. What it writes is moved into place only when all of it is written."""
    gguf = _gguf(folder)
    fresh = folder / ".fresh"
    fresh.mkdir()
    try:
        if not (folder / TOKENIZER).exists() or not (folder / TOKENIZER_CONFIG).exists():
            _save_tokenizer(folder, gguf, fresh)
        if gguf and not (folder / CONFIG).exists():
            _save_config(gguf, fresh)
        for file in fresh.iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(fresh)


def _save_tokenizer(folder: Path, gguf: Path | None, target: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf.name} if gguf else {}))
    if gguf and gguf_string(gguf, "tokenizer.ggml.pre") in _DIGITS_APART:
        _split_digits(tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(target)
    if gguf and not (folder / GENERATION_CONFIG).exists():
        _write_json(target / GENERATION_CONFIG, _generation_config(tokenizer))


def _split_digits(backend: Any) -> None:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def _generation_config(tokenizer: Any) -> dict[str, Any]:
    special = {token.content: at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [tokenizer.eos_token_id, *(special[end] for end in _ENDS if end in special)]
    found = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {name: value for name, value in found.items() if value not in (None, [])}


def _save_config(gguf: Path, target: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).to_diff_dict()
    for leftover in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(leftover, None)
    _write_json(target / CONFIG, config)


def gguf_string(file: Path, key: str) -> str | None:
    """A string of a GGUF's metadata. The gguf package's reader takes ten seconds over a large vocabulary."""
    name = key.encode()
    entry = struct.pack("<Q", len(name)) + name + struct.pack("<I", _GGUF_STRING)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(entry)
        if at < 0:
            return None
        start = at + len(entry) + 8
        (length,) = struct.unpack("<Q", data[start - 8 : start])
        return data[start : start + length].decode(errors="replace")


def _write_chat_template(folder: Path) -> None:
    """Older models keep the template inside a JSON file; the stages look in one place.

    Where there are several, the processor's is the one that knows of pictures.
    """
    if (folder / CHAT_TEMPLATE).exists():
        return
    for name in ("chat_template.json", "processor_config.json", TOKENIZER_CONFIG):
        template = _read_json(folder / name).get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if isinstance(template, str):
            (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
            return


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PrepareError(f"{file.name} is not valid JSON ({error})") from None
    return content if isinstance(content, dict) else {}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    try:
        convert(Path(sys.argv[1]))
    except Exception as error:  # transformers raises many kinds; a traceback is nothing for a user
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"transformers could not convert it: {reason[:300]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
