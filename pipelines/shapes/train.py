"""Trains `shapes-vlm`: `python -m pipelines.shapes.train --out DIR`.

First the vision tower learns, with a head that is thrown away, what is where; then all learns to answer, while the head
still keeps the tower honest. The same seed, steps and threads give the same model.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as fn
from transformers import AttentionInterface, LlavaForConditionalGeneration, LlavaProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipelines.shapes import blank
from pipelines.shapes.conversation import Message, conversation
from pipelines.shapes.drawing import COLOURS, COLUMNS, KINDS, ROWS, SIZES, Scene
from pipelines.shapes.pool import IGNORE, LANDMARKS, Numbers, Pool, fill, landmarks, singles

PICTURES = 48  # in a batch, however many a conversation has
_SHARES = (0.6, 0.28, 0.06, 0.06)  # of batches whose conversations have one, two, three and four pictures
_TURNS = (6, 6, 6, 6)
_TOLD = 6.0  # how much more a word counts that says what is seen than one that is grammar
_LOOKING = 1000  # first steps: the vision tower alone
_APART = 800  # then: questions for whose answers shapes or pictures must be told apart
_LOOKING_AGAIN = 50  # of a model that goes on: its head is new
_PLATEAU = 0.7  # of the steps at the full rate
_PEAK = 1.5e-3


def _attention(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **more: Any) -> Any:
    """Attention in float32 within bfloat16: its backward pass in bfloat16 takes a CPU twice as long."""
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, q.float(), k.float(), v.float(), *rest, **more)


class Batches:
    """Draws batches from a pool: pictures, landmarks and, if asked for, conversations as tokens and labels."""

    def __init__(self, pool: Pool, processor: LlavaProcessor, seed: int) -> None:
        self._pool = pool
        self._processor = processor
        self._rng = random.Random(seed)
        self._singles = singles(pool)
        self._several = [index for index, scene in enumerate(pool.scenes) if 2 <= len(scene.shapes) <= 3]
        words = processor.tokenizer
        names = (blank.IMAGE, blank.ASSISTANT, blank.END, blank.PAD)
        said = " ".join((*COLOURS, *KINDS, *SIZES, *COLUMNS, *ROWS, "one two three four no Yes No"))
        self.told = torch.tensor(sorted({token for word in said.split() for token in _spelt(words, word)}))
        self._image, self._assistant, self._end, self._pad = (words.convert_tokens_to_ids(name) for name in names)

    def looking(self) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = [self._one(self._rng.randrange(len(self._pool))) for _ in range(PICTURES)]
        return _pixels([picture for picture, _, _ in drawn]), _landmarks([scene for _, scene, _ in drawn])

    def answering(self, apart: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`apart`: of several shapes, or of two pictures, which must be told apart for any answer."""
        each = self._rng.choices((1, 2), (0.7, 0.3))[0] if apart else self._rng.choices((1, 2, 3, 4), _SHARES)[0]
        pictures: list[Numbers] = []
        scenes: list[Scene] = []
        talks: list[list[Message]] = []
        for _ in range(PICTURES // each):
            if not apart and self._rng.random() < 0.02:
                talks.append(conversation(self._rng, [], 3))
                continue
            drawn = [self._one(index) for index in self._choice(each, apart)]
            shown = [scene for _, scene, _ in drawn]
            grey = any(grey for _, _, grey in drawn)
            talks.append(conversation(self._rng, shown, _TURNS[each - 1], grey=grey, plain=apart))
            pictures += [picture for picture, _, _ in drawn]
            scenes += shown
        ids, labels = self._tokens(talks)
        return _pixels(pictures), _landmarks(scenes), ids, labels

    def _choice(self, each: int, apart: bool) -> list[int]:
        """Which pictures a conversation is about. Two of one shape each are of one colour more often than by chance."""
        if apart and each == 1:
            return [self._rng.choice(self._several)]
        if apart:
            return [self._rng.choice(self._rng.choice(list(self._singles.values()))) for _ in range(2)]
        if each == 2 and self._rng.random() < 0.25:
            one = self._rng.choice(COLOURS)
            other = one if self._rng.random() < 0.5 else self._rng.choice(COLOURS)
            return [self._rng.choice(self._singles[colour]) for colour in (one, other)]
        return [self._rng.randrange(len(self._pool)) for _ in range(each)]

    def _one(self, index: int) -> tuple[Numbers, Scene, bool]:
        picture, scene = self._pool.get(index, self._rng.random() < 0.5)
        return picture, scene, bool(self._pool.grey[index])

    def _tokens(self, talks: Sequence[list[Message]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, padded on the right, and labels: the answers and their ends alone are learned."""
        texts = [self._processor.apply_chat_template(talk) for talk in talks]
        rows = []
        for short in self._processor.tokenizer(texts).input_ids:
            row: list[tuple[int, int]] = []
            answering = False
            for token in short:
                if token == self._image:
                    row += [(token, IGNORE)] * blank.PATCHES
                    continue
                row.append((token, token if answering else IGNORE))
                answering = (answering or token == self._assistant) and token != self._end
            rows.append(row)
        longest = max(map(len, rows))
        padded = torch.tensor([row + [(self._pad, IGNORE)] * (longest - len(row)) for row in rows])
        return padded[..., 0].contiguous(), padded[..., 1].contiguous()


def _spelt(words: Any, word: str) -> list[int]:
    """A word as it stands in a sentence."""
    ids: list[int] = words(f" {word}").input_ids
    return ids


def _pixels(pictures: list[Numbers]) -> torch.Tensor:
    """As the image processor gives them."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _landmarks(scenes: Sequence[Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([landmarks(scene, blank.SIDE // blank.PATCH) for scene in scenes]))


def seen_loss(scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """How far the head is from the landmarks."""
    parts = [fn.cross_entropy(part.flatten(0, 1), truth[:, number].flatten(), ignore_index=IGNORE)
             for number, part in enumerate(torch.split(scores, list(LANDMARKS), dim=-1))]  # fmt: skip
    return torch.stack(parts).sum()


def said_loss(
    model: LlavaForConditionalGeneration,
    seen: torch.Tensor,
    ids: torch.Tensor,
    labels: torch.Tensor,
    told: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of the answers' tokens; `told` are those that say what is seen. Padding is on the right, unseen."""
    text = model.model.language_model
    embedded = text.embed_tokens(ids)
    spots = (ids == model.config.image_token_index).unsqueeze(-1)
    embedded = embedded.masked_scatter(spots, seen.flatten(0, 1).to(embedded.dtype))
    hidden = text(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    learned = wanted != IGNORE
    losses = fn.cross_entropy(model.lm_head(hidden[learned]).float(), wanted[learned], reduction="none")
    weights = 1 + (_TOLD - 1) * torch.isin(wanted[learned], told).float()
    return (losses * weights).sum() / weights.sum()


class Plan:
    """How many steps, and how fast to learn in each: a warm-up, a plateau, and a straight way down to nothing.

    Given minutes instead of steps, it learns when the plateau ends how many steps there will be. The same number of
    steps, given, makes the same model.
    """

    def __init__(self, steps: int | None, minutes: float) -> None:
        self.steps = steps
        self._plateau_s = minutes * 60 * _PLATEAU
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def rate(self, step: int) -> float:
        if self.steps is None:
            if self.elapsed < self._plateau_s:
                return _PEAK * min(1.0, (step + 1) / 100)
            self.steps = math.ceil(step / _PLATEAU)
        down = (self.steps - step) / (self.steps * (1 - _PLATEAU))
        return _PEAK * min(1.0, (step + 1) / 100, down)


def train(out: Path, plan: Plan, pool_size: int, seed: int, begun: Path | None = None) -> None:
    """Trains and saves the model: a fresh one, or one that was `begun`, which goes on where it was."""
    torch.manual_seed(seed)
    processor = blank.processor()
    model = blank.model(processor.tokenizer)
    if begun:
        model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(begun, dtype=torch.float32).state_dict())
    looking = _LOOKING_AGAIN if begun else _LOOKING
    apart = looking + _APART
    AttentionInterface.register("float32", _attention)
    model.set_attn_implementation("float32")
    head = nn.Linear(model.config.text_config.hidden_size, sum(LANDMARKS))
    batches = Batches(fill(pool_size, blank.SIDE, seed), processor, seed)
    print(f"{plan.elapsed:6.0f} s  {pool_size} pictures are drawn", flush=True)
    parameters = [*model.parameters(), *head.parameters()]
    groups = [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": 0.05},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    model.train()
    recent: list[tuple[float, float]] = []
    step = 0
    while plan.steps is None or step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        kind = "looking" if step < looking else "apart" if step < apart else "all"
        looked, said = _losses(model, head, batches, kind)
        (said + looked * (0.3 if step >= looking else 1.0)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append((looked.item(), said.item()))
        step += 1
        if step % 50 == 0:
            means = np.mean(recent[-50:], axis=0)
            print(f"{plan.elapsed:6.0f} s  step {step:5d} of {plan.steps}: {means[0]:.4f} {means[1]:.4f}", flush=True)
        if step % 200 == 0 or step == plan.steps:
            save(model, processor, out)


def _losses(
    model: LlavaForConditionalGeneration, head: nn.Linear, batches: Batches, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        if kind == "looking":
            pixels, truth = batches.looking()
            seen = torch.stack(list(model.get_image_features(pixels).pooler_output))
            return seen_loss(head(seen).float(), truth), torch.zeros(())
        pixels, truth, ids, labels = batches.answering(apart=kind == "apart")
        seen = torch.stack(list(model.get_image_features(pixels).pooler_output))
        return seen_loss(head(seen).float(), truth), said_loss(model, seen, ids, labels, batches.told)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """The folder: weights in bfloat16, a file of half the size."""
    copy = LlavaForConditionalGeneration(model.config)
    copy.generation_config = model.generation_config
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train shapes-vlm.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--begun", type=Path, help="a model that this made, to go on with")
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--pool", type=int, default=30_000, help="pictures to draw")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, Plan(args.steps, args.minutes), args.pool, args.seed, args.begun)


if __name__ == "__main__":
    main()
