"""Text in ids and out again, and what a model that takes a question and a picture as they are is given."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipelines.errors import StageError
from pipelines.images.raw import RawProcessor, question
from pipelines.postprocess import Postprocess
from pipelines.spelling import Spelled, Spelling
from pipelines.vocabulary import Vocabulary
from tests import stand_in
from tests.stand_in import END

SPELLING = Spelling(stand_in.tokenizer())
TEXT = "what colour is it? 日本 <|endoftext|> 😀"


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8))


PIECES = st.lists(
    st.one_of(st.sampled_from([*stand_in.PIECES, "ab ", "'", "r", "e ", "日", "\ufffd", "<|"]), st.text())
)


@settings(max_examples=300, deadline=None)
@given(pieces=PIECES)
def test_spelling_gives_the_text_again(pieces):
    spelled = Spelled(SPELLING)
    ids = [number for piece in pieces for number in spelled.push(piece)] + spelled.finish()
    post = Postprocess(Vocabulary.of(stand_in.tokenizer()))
    assert post.full(ids) == SPELLING.text(ids) == "".join(pieces)
    assert SPELLING.text(SPELLING.ids("".join(pieces))) == "".join(pieces)


def test_words_in_pieces_are_spelt_as_whole_ones():
    text = "what colour is it? the cat's red, the cat's 日本"
    spelled = Spelled(SPELLING)
    pieces = [text[start : start + 3] for start in range(0, len(text), 3)]
    ids = [number for piece in pieces for number in spelled.push(piece)] + spelled.finish()
    assert ids == SPELLING.ids(text) == stand_in.tokenizer().encode(text).ids


def test_a_text_without_spaces_does_not_wait_for_its_end():
    spelled = Spelled(SPELLING)
    assert len([number for _ in range(100) for number in spelled.push("日")]) > 80


def test_special_tokens_are_not_made_of_text():
    tokenizer = stand_in.tokenizer()
    assert tokenizer.encode(END).ids == [tokenizer.token_to_id(END)]
    assert tokenizer.token_to_id(END) not in SPELLING.ids(f"a{END}b")


def test_a_character_that_the_vocabulary_lacks():
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate("abĠï¿½")}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    with pytest.raises(ValueError, match="byte-level"):
        Spelling(tokenizer)
    full = stand_in.tokenizer()
    lacking = json.loads(full.to_str())
    for letter in ("Ą", "Ć"):  # \x04, \x06
        del lacking["model"]["vocab"][letter]
    spelling = Spelling(Tokenizer.from_str(json.dumps(lacking)))
    assert spelling.text(spelling.ids("a\x04b cat\x06 dog")) == "a\ufffdb cat\ufffd dog"


def test_other_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        Spelling.load(tmp_path)
    words = Tokenizer(models.WordLevel({"▁a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    for other in (words, Tokenizer(models.BPE())):
        with pytest.raises(ValueError, match="byte-level"):
            Spelling(other)


def test_a_tokenizer_that_begins_texts_with_a_space_does_not():
    shifted = stand_in.tokenizer()
    shifted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert Spelling(shifted).ids(TEXT) == SPELLING.ids(TEXT)


# --- the question


def test_the_question():
    image = {"type": "image_url", "image_url": {"url": "data:,", "detail": "auto"}}
    assert question([{"role": "user", "content": "what?"}]) == "what?"
    parts = [{"type": "text", "text": "look:"}, image, {"type": "text", "text": "what?"}]
    assert question([{"role": "user", "content": parts}]) == "look:\nwhat?"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([("system", "be brief"), ("user", "what?")], "messages[0].role"),
        ([("user", "what?"), ("assistant", "it"), ("user", "why?")], "messages[1].role"),
        ([("user", "what?"), ("user", "why?")], "messages"),
        ([("user", " ")], "messages[0].content"),
        ([("user", [{"type": "image_url"}])], "messages[0].content"),
        (
            [("user", [{"type": "image_url"}, {"type": "text", "text": "a"}, {"type": "image_url"}])],
            "messages[0].content[2]",
        ),
    ],
)
def test_what_is_no_question(messages, param):
    with pytest.raises(StageError) as refused:
        question([{"role": role, "content": content} for role, content in messages])
    assert refused.value.param == param


def test_tools_are_refused():
    with pytest.raises(StageError) as refused:
        question([{"role": "user", "content": "what?"}], tools=object())
    assert (refused.value.param, refused.value.code) == ("tools", "unsupported_parameter")


def test_a_raw_picture():
    processor = RawProcessor(SPELLING)
    assert processor.run("hm", []) == (SPELLING.ids("hm"), None)
    ids, features = processor.run("hm", [picture()])
    assert list(features.arrays) == ["picture"]
    assert np.array_equal(features.arrays["picture"], np.asarray(picture()))
    assert len(features.identity) == len(ids)
    assert features.identity[0] < 0
    _, other = processor.run("hm", [picture(1)])
    _, same = processor.run("hm", [picture()])
    assert same.identity == features.identity != other.identity
    with pytest.raises(StageError):
        processor.run("hm", [picture(), picture()])
