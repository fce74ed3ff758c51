"""Imports without the compiler: a process of its own each, since what is imported stays."""

from __future__ import annotations

import subprocess
import sys

LLAMA = "transformers.models.llama.modeling_llama"
ANSWERS = f"""
import sys
from pipelines.engine import lean
lean.import_transformers("{LLAMA}")
from tests.driving import answer, greedy
from pipelines.engine import Limits
from pipelines.engine.batched import BatchedEngine
from {LLAMA} import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2)).eval()
"""


def run(*lines: str) -> str:
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def test_a_model_is_imported_without_the_compiler() -> None:
    said = run(
        "import sys",
        "from pipelines.engine import lean",
        f"lean.import_transformers('{LLAMA}')",
        f"assert '{LLAMA}' in sys.modules",
        "print([name for name in ('torch._dynamo', 'sympy', 'torch.distributed.tensor') if name in sys.modules])",
    )
    assert said.strip().endswith("[]")


def test_afterwards_all_of_it_is_there() -> None:
    """The compiler, another model, generation: each imported only now, on top of what was imported leanly."""
    said = run(
        ANSWERS,
        "import torch",
        "assert torch.distributed.is_available()",
        "ids = torch.tensor([[5, 6, 7, 8]])",
        "wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4,",
        "                        eos_token_id=None, pad_token_id=0)",
        "engine = BatchedEngine(model, Limits(100, frozenset()))",
        "assert answer(engine, [5, 6, 7, 8], greedy(4))[0] == wanted[0, 4:].tolist()",
        "from transformers import Qwen2ForCausalLM, AutoModelForCausalLM",
        "from transformers.masking_utils import TransformGetItemToIndex",
        "with TransformGetItemToIndex(): pass",
        "import torch._dynamo",
        "assert torch._dynamo.is_compiling() is False",
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())",
    )
    assert said.strip().endswith("2.0")


def test_torch_is_imported_without_tracing_and_completed() -> None:
    said = run(
        "import sys",
        "from pipelines.engine import lean",
        "lean.import_torch()",
        "import torch",
        "assert not {'torch._meta_registrations', 'torch._decomp', 'torch._prims', 'torch.export'} & set(sys.modules)",
        "assert not hasattr(torch, 'export')",
        "assert (torch.ones(2, 3) @ torch.ones(3, 2)).sum() == 12",
        "lean.complete_torch()",
        "model = torch.nn.Linear(3, 2)",
        "program = torch.export.export(model, (torch.ones(4, 3),))",
        "assert torch.equal(program.module()(torch.ones(4, 3)), model(torch.ones(4, 3)))",
        "print(torch.linalg.eigh(torch.empty(3, 3, device='meta'))[0].shape)",
    )
    assert said.strip().endswith("torch.Size([3])")


def test_another_torch_is_imported_whole() -> None:
    said = run(
        "from pipelines.engine import lean",
        "lean._KNOWN_TORCH = '1.0.'",
        "lean.import_torch()",
        "import torch",
        "print(hasattr(torch, 'export'))",
    )
    assert said.strip().endswith("True")


def test_where_it_does_not_work_all_is_imported() -> None:
    said = run(
        "import logging, sys",
        "logging.basicConfig()",
        "from pipelines.engine import lean",
        "lean._undecorated = None",  # as if the modules did with it what it cannot
        f"lean.import_transformers('{LLAMA}')",
        f"from {LLAMA} import LlamaForCausalLM",
        "print('torch._dynamo' in sys.modules)",
    )
    assert "imported as a whole" in said
    assert said.strip().endswith("True")
