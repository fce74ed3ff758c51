"""A model as a GGUF file, as llama.cpp would write it."""

import gguf
import numpy as np

STORED = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(model, name, file, kind=gguf.GGMLQuantizationType.F32):
    """As llama.cpp's convert_hf_to_gguf.py writes it: q and k of a Llama permuted, a Gemma's norms with 1 added."""
    writer = gguf.GGUFWriter(file, name)
    writer.add_token_list([f"token {number}" for number in range(97)])
    stored = STORED | (GEMMA_NORMS if name == "gemma3" else NORMS)
    for full, tensor in model.state_dict().items():
        if full == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        outer = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
        outer["model.norm.weight"] = "output_norm.weight"
        if full in outer:
            place = outer[full]
        else:
            _, _, layer, rest = full.split(".", 3)
            stem, _, suffix = rest.rpartition(".")
            place = f"blk.{layer}.{stored[stem]}.{suffix}"
        if name == "llama" and ("q_proj" in full or "k_proj" in full):
            heads = 4 if "q_proj" in full else 2
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if name == "gemma3" and full.endswith("norm.weight"):
            array = array + 1
        if array.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(place, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
