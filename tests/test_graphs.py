"""Rounded decode steps, which a GPU captures as graphs; here they run as they are, and must give what others give."""

import torch

from pipelines.engine import Request
from pipelines.engine.flat import FlatModel
from pipelines.engine.graphs import rounded_rows, rounded_span
from pipelines.engine.scheduler import Chunk, Plan, Row
from pipelines.sampling import Sampling
from tests.models import build, prompt


def rows(lengths):
    prompts = [prompt(length, number) for number, length in enumerate(lengths)]
    return [Row(Request("", ids, Sampling()), (0, number), list(ids), 0) for number, ids in enumerate(prompts)]


def test_rounded_steps_give_what_others_give_and_leave_other_slots_alone():
    """Three rows as four, beside a slot that holds a prompt's beginning; five rows as eight; past 256 positions."""
    flat = {graphs: FlatModel(build("gemma3"), max_slots=16, context=600, graphs=graphs) for graphs in (True, False)}
    found = {}
    for graphs, model in flat.items():
        found[graphs] = []
        running = rows([5, 3, 250, 40, 7])
        for slot, row in enumerate(running):
            length = len(row.tokens) - 1
            model.forward(Plan(chunks=[Chunk(row, slot, 0, length)]))
            row.computed = length
        for step in range(9):
            plan = Plan(running[: 3 if step < 4 else 5])
            logits = model.forward(plan).clone()
            plan.advance()
            found[graphs].append(logits)
            for row, token in zip(plan.decode, logits.argmax(-1).tolist(), strict=True):
                row.tokens.append(token)
    for rounded, plain in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(rounded, plain, atol=1e-4, rtol=1e-4)
    assert list(flat[True]._graphs._graphs) == [(8, 512)], "those over the cache before it grew are gone"


def test_sizes_are_few():
    assert [rounded_rows(rows) for rows in (1, 3, 17, 64, 513)] == [1, 4, 24, 64, 1024]
    assert [rounded_span(span) for span in (1, 256, 257, 3000)] == [256, 256, 512, 4096]
