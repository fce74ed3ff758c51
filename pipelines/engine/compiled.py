"""A model's step as compiled code: found in the cache, or compiled in the background while the engine runs without.

    compiled = Compiled(model, proof)       # takes a moment, and never fails
    ...
    if step := compiled.poll():             # between two steps; cheap
        logits = step(input_ids, positions, slots, wanted, cache.layers)

`proof` is prompts and what the model answers, by which a step is tried before anybody gets it. A step's code is cached
by all that it depends on: the model's configuration, the shapes of its tensors but not what is in them, this code,
torch and the processor. Knows no Triton, no scheduler and no request.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines import compiler
from pipelines.compiler import CompilerError
from pipelines.engine import native
from pipelines.engine.compiled_ops import step_caches
from pipelines.engine.compiled_skeleton import Unportable, describe, dump
from pipelines.engine.compiled_step import Step, StepError
from pipelines.engine.slots import Unsupported
from pipelines.engine.tensors import tensors_of
from pipelines.pipeline import cache_dir

log = logging.getLogger(__name__)

_MOST_OFF = 0.2  # a wrong step is off by the size of the logits; rounding to 8 bits can make it a few hundredths
_SOURCES = ("compiled_build.py", "compiled_ops.py", "compiled_skeleton.py", "shim.cpp", "slots.py")


class Compiled:
    """One model's compiled step, once there is one. `state` says in a line what there is, or why there is none.

    `proof`: prompts of two tokens or more, and the model's logits after the last of each, [vocabulary]. A model that
    cannot be compiled, a machine without a compiler or without the native kernels, a step that answers otherwise: the
    log says so once, `poll` answers None, and the model runs as it is. A package that cannot be loaded is made anew.
    """

    def __init__(self, model: Any, proof: Sequence[tuple[Sequence[int], Tensor]], folder: Path | None = None) -> None:
        self.state = ""
        self._model = model
        self._proof = proof
        self._step: Step | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        kernels = native.load() if model.device.type == "cpu" else None
        if kernels is None:  # the log says why there are none
            self.state = "not compiled: " + ("no native kernels" if model.device.type == "cpu" else "it runs on a GPU")
            return
        self._kernels = kernels
        self._tensors = tensors_of(model)
        self._package = (folder or cache_dir() / "compiled") / _key(model)
        self._begin()

    def poll(self) -> Step | None:
        """The step, from when there is one."""
        if self._child is not None and self._child.poll() is not None:
            self._finish(self._child)
        return self._step

    def wait(self) -> None:
        """Until there is one. Raises `Unsupported` if there will be none."""
        if self._child is not None:
            self._child.wait()
        if self.poll() is None:
            raise Unsupported(f"its step is {self.state}")

    def close(self) -> None:
        """Ends the compilers, if they run."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.communicate()
            self._child = None

    def _begin(self) -> None:
        if self._package.exists() and (self._load() or self._refused.exists()):
            return
        if self._refused.exists():
            self._give_up(self._refused.read_text())
        else:
            self._compile()

    def _load(self) -> bool:
        """Whether there is a step now. One that is wrong is refused for good, and one that is broken is removed."""
        try:
            step = Step(self._package, self._tensors, self._kernels, self._kernels.threads or torch.get_num_threads())
            off = self._off(step)
        except StepError as error:
            self._give_up(f"its package is broken: {error}")
            shutil.rmtree(self._package, ignore_errors=True)
            return False
        if not off < _MOST_OFF:
            reason = f"its logits would be off by {off:.1%}"
            with contextlib.suppress(OSError):
                self._refused.write_text(reason)
            self._give_up(reason)
            return False
        self._step, self.state = step, "compiled"
        return True

    @torch.inference_mode()
    def _off(self, step: Step) -> float:
        """By how much of the largest logit: of all prompts but their last tokens at once, then of these as a batch."""
        layers = step_caches(self._model.config, slots=len(self._proof), length=max(len(ids) for ids, _ in self._proof))
        prompts = [(slot, list(enumerate(ids))) for slot, (ids, _) in enumerate(self._proof)]
        for part in (slice(None, -1), slice(-1, None)):
            tokens = [(token, position, slot) for slot, ids in prompts for position, token in ids[part]]
            ids, positions, slots = torch.tensor(tokens).T.contiguous()
            wanted = torch.arange(len(tokens) - len(prompts), len(tokens))
            found = step(ids[None], positions, slots, wanted, layers)
        plain = torch.stack([logits.float() for _, logits in self._proof])
        return float((found - plain).abs().max() / plain.abs().max())

    def _compile(self) -> None:
        """Start the process that compiles. It ends with this one: its standard input closes."""
        try:
            compiler.command()
            self._package.parent.mkdir(parents=True, exist_ok=True)
            _write(self._package.with_suffix(".model"), dump(self._model))
            command = [_python(), "-m", f"{__package__}.compiled_child", str(self._package)]
            with self._package.with_suffix(".log").open("wb") as said:
                self._child = subprocess.Popen(
                    command,
                    cwd=Path(__file__).parents[2],
                    stdin=subprocess.PIPE,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                )
        except (OSError, Unportable, CompilerError) as error:
            self._give_up(str(error))
            return
        self._started = time.monotonic()
        self.state = "being compiled"
        log.info("%s: its step is being compiled in the background", self._name)

    def _finish(self, child: subprocess.Popen[bytes]) -> None:
        child.communicate()
        self._child = None
        if child.returncode == 0:
            if self._load():
                log.info("%s: its step is compiled, after %.0f s", self._name, time.monotonic() - self._started)
        elif self._refused.exists():
            self._give_up(self._refused.read_text())
        else:
            self._give_up(f"the compiler ended with {child.returncode} (see {self._package.with_suffix('.log')})")

    def _give_up(self, reason: str) -> None:
        self.state = f"not compiled: {reason}"
        log.warning("%s is %s", self._name, self.state)

    @property
    def _refused(self) -> Path:
        return self._package.with_suffix(".refused")

    @property
    def _name(self) -> str:
        return str(self._model.config.model_type)


def _key(model: Any) -> str:
    """All that a step depends on: what the code is, what it was compiled by, and for what."""
    told = hashlib.sha256()

    def tell(*parts: Any) -> None:
        told.update(repr(parts).encode())

    tell(torch.__version__, importlib.metadata.version("transformers"), sys.version_info[:2], native.processor())
    tell(model.config.to_json_string(use_diff=False))
    for part in describe(model):
        tell(part)
    for source in _SOURCES:
        told.update(Path(__file__).with_name(source).read_bytes())
    return f"{re.sub('[^a-z0-9]+', '-', model.config.model_type.lower())}-{told.hexdigest()[:16]}"


def _python() -> str:
    """This environment's interpreter: inside Triton `sys.executable` may be another program."""
    for path in (Path(sys.executable), Path(sys.prefix) / "bin" / "python3"):
        if path.name.startswith("python") and path.exists():
            return str(path)
    return "python3"


def _write(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
