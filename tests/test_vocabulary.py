"""A tokenizer's tokens as plain data: as it has them, as llguidance reads them, and kept until it changes."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from pipelines import vocabulary
from pipelines.constraint import Constraints, _read
from pipelines.structure import Structure
from pipelines.vocabulary import KEPT, TOKENIZER, Vocabulary

REAL = ("smollm2", "gemma3")


@pytest.fixture(scope="module", params=REAL)
def real(request: pytest.FixtureRequest) -> tuple[Tokenizer, Vocabulary]:
    home: Path = request.getfixturevalue(f"{request.param}_home")
    vocabulary.write(home)
    kept = Vocabulary.kept(home)
    assert kept is not None
    return Tokenizer.from_file(str(home / TOKENIZER)), kept


def test_tokens_are_the_tokenizers(real: tuple[Tokenizer, Vocabulary]) -> None:
    whole, plain = real
    size = whole.get_vocab_size(with_added_tokens=True)
    assert [plain.token(token_id) for token_id in range(size + 2)] == [whole.id_to_token(i) for i in range(size + 2)]
    assert plain.token(-1) is None
    added = whole.get_added_tokens_decoder()
    assert plain.special == {token.content for token in added.values() if token.special}
    assert plain.added == set(added)
    assert plain.decoder is not None
    assert plain.decoder.__getstate__() == whole.decoder.__getstate__()


def without_added(whole: Tokenizer, text: str) -> bool:
    """Whether no added token stands in it: those are letters here."""
    added = whole.get_added_tokens_decoder()
    return not any(token.special and token.content in text for token in added.values())


@given(st.text(max_size=40) | st.lists(st.sampled_from(' {}":,\n\t0123abc日😀é\u0301'), max_size=60).map("".join))
@example("\n\n\n    return  x\t\t")
@example('{"name": "value", "other": [1, 2]}')
@example("\U00040000")
@settings(max_examples=200, deadline=None)
def test_a_text_is_spelt_as_the_tokenizer_spells_it(real: tuple[Tokenizer, Vocabulary], text: str) -> None:
    whole, plain = real
    if without_added(whole, text):
        assert plain.spelt(text) == whole.encode(text, add_special_tokens=False).ids


def test_llguidance_has_the_same_tokens_as_from_the_file(real: tuple[Tokenizer, Vocabulary]) -> None:
    whole, plain = real
    ends = [whole.token_to_id(end) for end in ("<|im_end|>", "<end_of_turn>") if whole.token_to_id(end) is not None]
    ours, no_end = _read(plain, ends)
    theirs = LLTokenizer(whole.to_str(), eos_token=ends)
    assert (no_end, ours.vocab_size, ours.eos_tokens) == (None, theirs.vocab_size, theirs.eos_tokens)
    every = range(ours.vocab_size)
    assert [i for i in every if ours.decode_bytes([i]) != theirs.decode_bytes([i])] == []
    assert [i for i in every if ours.is_special_token(i) != theirs.is_special_token(i)] == []
    dice = random.Random(1)
    letters = [i for i in every if i not in plain.added]
    for _ in range(300):
        some = b"".join(theirs.decode_bytes([dice.choice(letters)]) for _ in range(5))
        assert ours.tokenize_bytes(some) == theirs.tokenize_bytes(some)


def saved(folder: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(str(folder / TOKENIZER))
    return folder


def bpe(**kinds: Any) -> Tokenizer:
    """Of a few letters, with bytes for all others."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc", "ab", "▁ab", "abc"]
    merges = [("a", "b"), ("▁", "ab"), ("ab", "c")]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, **kinds)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def prefixed() -> Tokenizer:
    """As Llama 2's: a text that begins an answer is spelt otherwise than one within it."""
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def composing() -> Tokenizer:
    """As Qwen's: a character that is written in two is spelt as the one that it is."""
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "c": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return tokenizer


def test_a_small_one_is_spelt_here(tmp_path: Path) -> None:
    plain = Vocabulary.load(saved(tmp_path, bpe()))
    assert plain.merges is not None
    assert [plain.token(i) for i in plain.spelt("abc ab é")] == ["abc", "▁ab", "▁", "<0xC3>", "<0xA9>"]
    follows = Constraints(plain, [])(Structure("regex", "abc|b"))
    bits = np.unpackbits(follows.mask().view(np.uint8), bitorder="little")
    assert {plain.token(int(i)) for i in np.flatnonzero(bits)} == {"a", "b", "ab", "abc", "<0x61>", "<0x62>"}
    follows.accept(plain.ids["b"])
    assert follows.complete


def test_one_that_composes_characters_is_spelt_here_too(tmp_path: Path) -> None:
    plain = Vocabulary.load(saved(tmp_path, composing()))
    assert plain.merges is not None
    assert plain.spelt("ab e\u0301") == composing().encode("ab \u00e9").ids


def test_one_that_is_nothing_without_its_tokens_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(plain: object) -> None:
        raise Exception("missing field `vocab`")

    monkeypatch.setattr(vocabulary, "_skeleton", refuse)
    plain = Vocabulary.load(saved(tmp_path, bpe()))
    assert (plain.token(263), plain.merges) == ("abc", None)
    assert "without its tokens it cannot be read: missing field `vocab`" in caplog.text


@pytest.mark.parametrize("tokenizer", [prefixed(), words(), bpe(dropout=0.5)], ids=["prefixed", "words", "dropout"])
def test_what_is_not_spelt_here_alike_is_left_to_the_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain = Vocabulary.load(saved(tmp_path, tokenizer))
    again = Vocabulary.kept(tmp_path)
    assert again is not None
    assert (plain.merges, again.merges) == (None, None)
    assert again.tokens == plain.tokens == [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    assert again.tokenizer.to_str() == tokenizer.to_str()


def test_another_file_is_another_vocabulary(tmp_path: Path) -> None:
    before = Vocabulary.load(saved(tmp_path, bpe()))
    assert Vocabulary.load(tmp_path).tokens == before.tokens
    Vocabulary.load(saved(tmp_path, words()))
    os.utime(tmp_path / TOKENIZER, ns=(0, 1))  # as of one that is put in its place
    assert Vocabulary.kept(tmp_path) is None
    assert Vocabulary.load(tmp_path).tokens == ["[UNK]", "a", "##b", "c"]
    assert len(list((tmp_path / KEPT).iterdir())) == 1  # the old ones are gone


def test_what_is_kept_and_spoilt_is_read_anew(tmp_path: Path) -> None:
    plain = Vocabulary.load(saved(tmp_path, bpe()))
    (file,), (table,) = (list((tmp_path / KEPT).glob(f"*{suffix}")) for suffix in (".json", ".npy"))
    for spoilt in (file.read_bytes()[:100], json.dumps({"tokens": []}).encode()):
        file.write_bytes(spoilt)
        assert Vocabulary.kept(tmp_path) is None
        again = Vocabulary.load(tmp_path)
        assert again.tokens == plain.tokens
        assert again.merges is not None
    table.write_bytes(table.read_bytes()[:100])
    assert Vocabulary.load(tmp_path).merges is None  # the tokenizer itself spells then
    table.unlink()
    assert Vocabulary.load(tmp_path).merges is None


def test_a_folder_that_cannot_be_written_in_is_read_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    plain = Vocabulary.load(saved(tmp_path, bpe()))
    assert (plain.ids["abc"], plain.merges) == (263, None)
    assert "read anew by every stage: what it says cannot be kept: read-only" in caplog.text
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == [TOKENIZER]
