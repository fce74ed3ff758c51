"""How well a model folder answers about pictures it has not seen: `python -m pipelines.shapes.score DIR`.

Asks through transformers' own processor and `generate`, greedily, about pictures as `images.decode` makes them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pipelines.images.decode import open_picture
from pipelines.shapes.held_out import Case, cases

_BATCH = 50
_LONGEST = 20  # tokens of an answer


class Answers:
    """A loaded model that is asked in batches."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, asked: Sequence[Case], pictures: Sequence[Sequence[Image.Image]]) -> list[str]:
        """The answer to each case, whose pictures are those given here."""
        answers: list[str] = []
        for start in range(0, len(asked), _BATCH):
            texts = [self.processor.apply_chat_template(case.messages, add_generation_prompt=True)
                     for case in asked[start : start + _BATCH]]  # fmt: skip
            shown = [list(each) for each in pictures[start : start + _BATCH]]
            inputs = self.processor(text=texts, images=shown if any(shown) else None, padding=True, return_tensors="pt")
            with torch.inference_mode():
                ids = self.model.generate(**inputs, max_new_tokens=_LONGEST, do_sample=False)
            new = ids[:, inputs["input_ids"].shape[1] :]
            answers += self.processor.batch_decode(new, skip_special_tokens=True)
        return answers


def decode(data: bytes) -> Image.Image:
    """The picture as a person sees it."""
    return open_picture(data, param="picture", max_pixels=10**8).decode()


def table(asked: Sequence[Case], right: Sequence[bool], key: Callable[[Case], str]) -> Iterator[str]:
    """Lines of how many were right, by a key."""
    totals = Counter(map(key, asked))
    good = Counter(key(case) for case, fine in zip(asked, right, strict=True) if fine)
    for name, total in sorted(totals.items()):
        yield f"{name:12} {good[name]:4d} of {total:4d}  {100 * good[name] / total:5.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a model folder on the held-out pictures.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--wrong", action="store_true", help="print what was answered wrongly")
    args = parser.parse_args()
    asked = cases(args.count)
    said = Answers(args.folder)(asked, [[decode(file) for file in case.pictures] for case in asked])
    right = [answer == case.asked.answer for answer, case in zip(said, asked, strict=True)]
    apart = {False: "one shape", True: "told apart"}
    for key in (
        lambda case: case.asked.about,
        lambda case: case.form,
        lambda case: apart[case.apart],
        lambda case: "all",
    ):
        print(*table(asked, right, key), sep="\n", end="\n\n")
    if args.wrong:
        for answer, case, fine in zip(said, asked, right, strict=True):
            if not fine:
                print(f"{case.form}: {case.asked.question!r} {answer!r} for {case.asked.answer!r}")


if __name__ == "__main__":
    main()
