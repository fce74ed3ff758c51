"""Tiny vision-language systems of real architectures, complete on disk, with random weights and real processors.

What a folder answers is what transformers' own processor and `generate` say: `reference`.
Gemma 3n's vision tower is the one part that is not real. Its class wraps timm, which needs torchvision, neither of
which is needed by anything else here; a tower of one convolution takes its place, with the same inputs and outputs.
"""

import functools
import json
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nProcessor,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    Idefics3VisionConfig,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
    Kosmos2TextConfig,
    Kosmos2VisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.vision_templates import TEMPLATES

NAMES = ("llava", "smolvlm", "qwen3_vl", "gemma3n", "kosmos2")
CONTEXT = 2048
ENDLESS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.5,  # else every logit is nearly the same
    "tie_word_embeddings": False,
} | ENDLESS
EYES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.2,
}
QWEN_EYES = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
    "initializer_range": 0.2,
}
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 28},
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
SIGLIP = CLIP | {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 28, "width": 28},
    "do_center_crop": None,
    "crop_size": None,
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
QWEN = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
IDEFICS = {
    "image_processor_type": "Idefics3ImageProcessor",
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": 28},
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 84},
}


class Tower(PreTrainedModel):
    """Gemma 3n's tower, as the rest of the model sees it: pixels in, one vector for each place of a square grid."""

    config_class = Gemma3nVisionConfig
    config: Gemma3nVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.patches = torch.nn.Conv2d(3, config.hidden_size, kernel_size=14, stride=14)
        self.post_init()

    def forward(self, pixel_values, do_pooling=False, return_dict=True, **kwargs):
        return BaseModelOutputWithPooling(last_hidden_state=torch.tanh(self.patches(pixel_values)))


AutoModel.register(Gemma3nVisionConfig, Tower, exist_ok=True)


def home(name, folder):
    """One of `NAMES` as a folder such as the hub has, written once."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model.safetensors").exists():
        return folder
    tokenizer = _unigram() if name == "kosmos2" else _bytes(_SPECIAL[name], _LAST.get(name, []))
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = tokenizer.token_to_id
    torch.manual_seed(0)
    model = _BUILD[name](ids, tokenizer.get_vocab_size()).eval()
    model.generation_config.update(**ENDLESS)
    model.save_pretrained(folder)
    pictures, whole = _SETTINGS[name]
    kind = _PROCESSORS[name].__name__
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures | {"processor_class": kind}, indent=1))
    (folder / "processor_config.json").write_text(json.dumps(whole | {"processor_class": kind}, indent=1))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT} | _NAMED[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    return folder


def picture(seed, size=(40, 40)):
    """A picture unlike those of other seeds: noise, with one figure on it."""
    generator = np.random.default_rng(seed)
    width, height = size
    image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    colour = tuple(int(value) for value in generator.integers(0, 256, 3))
    ImageDraw.Draw(image).ellipse((width // 5, height // 5, width // 2, height // 2), fill=colour)
    return image


def model(folder):
    """One for whoever asks: an engine changes it."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@functools.cache  # a folder is written once
def processor(folder):
    """The model's own, without what it has for video and sound: the former needs torchvision."""
    name = folder_name(folder)
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil"),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
    }
    with patch.object(_PROCESSORS[name], "check_argument_for_proper_class"):  # None is no video processor
        missing = {part: None for part in _PROCESSORS[name].get_attributes() if part not in parts}
        return _PROCESSORS[name](**parts, **missing, **_SETTINGS[name][1])


@functools.cache
def folder_name(folder):
    """Which of `NAMES` a folder is."""
    kinds = {"llava": "llava", "idefics3": "smolvlm", "qwen3_vl": "qwen3_vl", "gemma3n": "gemma3n"}
    return (kinds | {"kosmos-2": "kosmos2"})[AutoConfig.from_pretrained(folder).model_type]


def inputs(folder, rendered, pictures):
    """What the model's own processor makes of a rendered chat, as torch tensors."""
    own = processor(folder)
    if folder_name(folder) == "kosmos2":  # takes one picture, not a list, and writes the special tokens itself
        return own(images=pictures[0] if pictures else None, text=rendered, return_tensors="pt")
    return own(images=list(pictures) or None, text=[rendered], add_special_tokens=False, return_tensors="pt")


@functools.cache
def _unchanged(folder):
    return model(folder)


def reference(folder, rendered, pictures, count):
    """The ids that transformers answers: its own processor, `generate`, greedily, in float32."""
    given = inputs(folder, rendered, pictures)
    with torch.no_grad():
        found = _unchanged(folder).generate(**given, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return found[0].tolist()[-count:]


def _bytes(special, last):
    """Every byte is a token; no merges. Special tokens come first, or last."""
    vocabulary = {token: index for index, token in enumerate(special)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(byte, len(vocabulary))
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate(last)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special + last])
    return tokenizer


def _unigram():
    """As XLM-R's, which Kosmos-2 uses: pieces with a mark for the space before; unknown letters are one token."""
    letters = [chr(code) for code in range(33, 127) if chr(code) not in "<>"]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *letters, *(f"▁{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(index % 7)) for index, piece in enumerate(pieces)], unk_id=3))
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:4]])
    tags = [f"<{mark}{tag}>" for tag in ("image", "phrase", "object") for mark in ("", "/")]
    tags += ["</doc>", "</chunk>", "</line>", "</delimiter_of_multi_objects/>", "<grounding>"]
    patches = [f"<patch_index_{index:04}>" for index in range(1024)]
    tokenizer.add_tokens([AddedToken(token, lstrip=True, normalized=False) for token in tags + patches])
    return tokenizer


def _llava(ids, vocabulary):
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**EYES, projection_dim=32),
            text_config=LlamaConfig(**TEXT, vocab_size=vocabulary),
            image_token_index=ids("<image>"),
            image_seq_length=4,
        )
    )


def _smolvlm(ids, vocabulary):
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=Idefics3VisionConfig(**EYES | {"patch_size": 7}),
            text_config=LlamaConfig(**TEXT, vocab_size=vocabulary),
            image_token_id=ids("<image>"),
            scale_factor=2,
            pad_token_id=0,
        )
    )


def _qwen3_vl(ids, vocabulary):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            vision_config=Qwen3VLVisionConfig(**QWEN_EYES),
            text_config=Qwen3VLTextConfig(**TEXT, vocab_size=vocabulary, rope_parameters=rope),
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
        )
    )


def _gemma3n(ids, vocabulary):
    text = TEXT | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 6,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": ids("<end_of_image>"),
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "final_logit_softcapping": 1e4,  # else its largest logits are all the same number
        "vocab_size": vocabulary,
    }
    sound = {
        "vocab_size": 2,
        "vocab_offset": ids("<end_of_audio>"),
        "hidden_size": 16,
        "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 1,
        "sscp_conv_channel_size": (8, 4),
    }
    eyes = {"hidden_size": 32, "vocab_size": 2, "vocab_offset": ids("<end_of_image>"), "initializer_range": 0.2}
    return Gemma3nForConditionalGeneration(
        Gemma3nConfig(
            text_config=Gemma3nTextConfig(**text),
            vision_config=Gemma3nVisionConfig(**eyes),
            audio_config=Gemma3nAudioConfig(**sound),
            vision_soft_tokens_per_image=4,
            image_token_id=ids("<image_soft_token>"),
            boi_token_id=ids("<start_of_image>"),
            eoi_token_id=ids("<end_of_image>"),
            audio_token_id=ids("<audio_soft_token>"),
            boa_token_id=ids("<start_of_audio>"),
            eoa_token_id=ids("<end_of_audio>"),
            tie_word_embeddings=False,
        )
    )


def _kosmos2(ids, vocabulary):
    text = {
        "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT,
        "embed_dim": 32,
        "layers": 3,
        "ffn_dim": 64,
        "attention_heads": 4,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.5,
        "scale_embedding": False,  # else no picture, whose features have length one, would be heard
        "tie_word_embeddings": False,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    halves = {"text_config": Kosmos2TextConfig(**text), "vision_config": Kosmos2VisionConfig(**EYES)}
    model = Kosmos2ForConditionalGeneration(Kosmos2Config(**halves, tie_word_embeddings=False))
    with torch.no_grad():  # what it sees is brought to length one: else all pictures are nearly the same
        model.image_to_text_projection.dense.weight *= 10
    return model


_BEGIN = ["<start_of_image>", "<start_of_audio>"]
# Gemma 3n's vocabulary of pictures and its vocabulary of sounds follow that of text, in this order.
_LAST = {"gemma3n": ["<end_of_image>", "<image_soft_token>", "<end_of_audio>", "<audio_soft_token>"]}
_SPECIAL = {
    "llava": ["<pad>", "<s>", "</s>", "<unk>", "<image>"],
    "smolvlm": [
        "<pad>",
        "<|im_start|>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    ],
    "qwen3_vl": [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ],
    "gemma3n": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *_BEGIN],
    "kosmos2": [],
}
_BUILD = {"llava": _llava, "smolvlm": _smolvlm, "qwen3_vl": _qwen3_vl, "gemma3n": _gemma3n, "kosmos2": _kosmos2}
_PROCESSORS = {
    "llava": LlavaProcessor,
    "smolvlm": Idefics3Processor,  # as SmolVLM-256M, whose files say so
    "qwen3_vl": Qwen3VLProcessor,
    "gemma3n": Gemma3nProcessor,
    "kosmos2": Kosmos2Processor,
}
_SETTINGS = {  # preprocessor_config.json, processor_config.json
    "llava": (CLIP, {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}),
    "smolvlm": (IDEFICS, {"image_seq_len": 4}),
    "qwen3_vl": (QWEN, {}),
    "gemma3n": (SIGLIP, {"image_seq_length": 4, "audio_seq_length": 4}),
    "kosmos2": (CLIP, {}),
}
_NAMED = {  # what tokenizer_config.json names
    "llava": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "smolvlm": {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<pad>"},
    "qwen3_vl": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "gemma3n": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_special_tokens": {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "audio_token": "<audio_soft_token>",
            "boa_token": "<start_of_audio>",
            "eoa_token": "<end_of_audio>",
        },
    },
    "kosmos2": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
}
