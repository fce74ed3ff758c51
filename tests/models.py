"""Tiny models of real architectures, with random weights: what an engine must answer as `generate` does."""

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

CONTEXT = 600
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.5,  # else every logit is nearly the same
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = SIZES | {"sliding_window": 6, "layer_types": MIXED, "tie_word_embeddings": False}
CAPPED = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": None}
EXPERTS = {"num_experts_per_tok": 2}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.5}
ENDLESS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SMALL = ENDLESS | {"vocab_size": 97, "hidden_size": 32, "initializer_range": 0.5, "tie_word_embeddings": False}
GEMMA3N = GEMMA | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "final_logit_softcapping": 1e4,  # else its largest logits are all the same number
}
LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "moe_intermediate_size": 16,
}
FAST = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
    "gemma3n": lambda: Gemma3nForCausalLM(Gemma3nTextConfig(**GEMMA3N)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, **CAPPED)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **ENDLESS)),
    "cohere2": lambda: Cohere2ForCausalLM(Cohere2Config(**GEMMA)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=32)
    ),
}
COMPATIBLE = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL, num_hidden_layers=2, state_size=4)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SMALL, n_layer=2, n_head=4)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**GEMMA, **EXPERTS, num_local_experts=4)),
    "qwen3_next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES | EXPERTS | LINEAR, num_experts=4)),
}
MODELS = FAST | COMPATIBLE


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def prompt(length, seed=0):
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed + length)).tolist()


def reference(model, input_ids, count):
    """What the model's own `generate` answers, greedily."""
    ids = torch.tensor([input_ids])
    every = torch.ones_like(ids)  # else a 0 among them, which a model may have generated, is taken for padding
    found = model.generate(ids, attention_mask=every, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return found[0, len(input_ids) :].tolist()
