"""The model before it has learned anything: its sizes, its tokenizer, its image processor and its chat template.

All are transformers' own classes, as a folder that AutoProcessor and AutoModelForImageTextToText load. Knows nothing of
how it is trained.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pipelines.shapes.drawing import random_scene
from pipelines.shapes.questions import ask, hello, system

SIDE = 84  # pixels: a picture is stretched to this square, and nothing of it is cut off
PATCH = 12
PATCHES = (SIDE // PATCH) ** 2  # tokens a picture
CONTEXT = 1024
PAD, END, USER, ASSISTANT, SYSTEM, IMAGE = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<image>"

# Pictures are numbered throughout a conversation, so that "the second picture" is one that can be told from the first.
TEMPLATE = """\
{%- set count = namespace(pictures=0) -%}
{%- for message in messages -%}
    {{- '<|system|>' if message.role in ('system', 'developer') else '<|assistant|>' if message.role == 'assistant' else '<|user|>' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content or [] -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {%- set count.pictures = count.pictures + 1 -%}
                {{- 'Picture ' ~ count.pictures ~ ':<image>' -}}
            {%- endif -%}
            {{- '' if loop.last else '\\n' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""  # noqa: E501


def processor() -> LlavaProcessor:
    """The image processor, the tokenizer and the chat template, in one."""
    pictures = SiglipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: the words of the questions and answers are a token each, anything else is spelt in bytes."""
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        min_frequency=20,
        special_tokens=[PAD, END, USER, ASSISTANT, SYSTEM, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    byte_pairs.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def model(words: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A SigLIP vision tower and a Llama, of about a million parameters together. Random: seed torch first."""
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        image_seq_length=PATCHES,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    blank = LlavaForConditionalGeneration(config)
    blank.generation_config.eos_token_id = words.eos_token_id
    blank.generation_config.pad_token_id = words.pad_token_id
    blank.generation_config.bos_token_id = None
    return blank


def _texts() -> Iterator[str]:
    rng = random.Random(0)
    for number in range(20_000):
        scenes = [random_scene(rng, 100, 100) for _ in range(1 + number % 4)]
        asked = ask(rng, scenes)
        yield f"{asked.question}\n{asked.answer}"
        if number % 40 == 0:
            yield from (hello(rng).question, hello(rng).answer, system(rng))
            yield from (f"Picture {place}:" for place in range(1, 5))
