"""Entries of log probabilities: with the text of their tokens, in order, each once, and those of the answer only."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipelines.chat import Text, Window
from pipelines.engine import Logprob
from pipelines.logprobs import Entry, likelihood, spelling
from pipelines.postprocess import Postprocess
from pipelines.vocabulary import Vocabulary
from tests.test_postprocess import (
    EXAMPLES,
    SYNTHETIC,
    Subject,
    draw_chunks,
    draw_ids,
    draw_stop,
    smollm2_bytes,  # noqa: F401
    subject,  # noqa: F401
)


def told(
    stage: Postprocess, chunks: Sequence[Sequence[int]], stop: Sequence[str] = (), *, per_token: bool = False
) -> list[Text]:
    """The caller's side, as `pipelines.chat` has it. A token's log probability is its place in the answer."""
    window: list[int] = []
    waiting: list[Logprob] = []
    sent = number = 0
    found = []
    for index, chunk in enumerate(chunks):
        window += chunk
        waiting += [Logprob(id, -float(number + place), [(id, -0.5)]) for place, id in enumerate(chunk)]
        number += len(chunk)
        final = index == len(chunks) - 1
        text = stage.text(Window(window, len(chunk), sent, stop, final, waiting), per_token=per_token)
        assert text.told >= len(waiting) - (len(window) - text.drop), "an entry was lost with its id"
        assert not waiting or len(text.logprobs) == len(text.texts)
        del window[: text.drop]
        del waiting[: text.told]
        sent = text.sent
        found.append(text)
    return found


def flat(texts: Sequence[Text]) -> list[Entry]:
    return [entry for text in texts for entries in text.logprobs for entry in entries]


def joined(texts: Sequence[Text]) -> str:
    return "".join(piece for text in texts for piece in text.texts)


@EXAMPLES
@given(data=st.data(), per_token=st.booleans())
def test_every_token_of_the_text_has_one_entry_in_order(subject: Subject, data: st.DataObject, per_token: bool) -> None:  # noqa: F811
    ids = draw_ids(data, subject)
    entries = flat(told(subject.stage, draw_chunks(data, ids), per_token=per_token))
    places = [round(-entry.logprob) for entry in entries]
    visible = [
        place
        for place, id in enumerate(ids)
        if (token := subject.tokenizer.id_to_token(id)) is not None and token not in subject.special
    ]
    assert places == visible
    assert all(entry.top == [(*entry[:2], -0.5)] for entry in entries)


@EXAMPLES
@given(data=st.data())
def test_the_bytes_of_the_entries_are_the_text(subject: Subject, data: st.DataObject) -> None:  # noqa: F811
    ids = draw_ids(data, subject)
    texts = told(subject.stage, draw_chunks(data, ids))
    text = joined(texts)
    if subject.name in ("bpe", "ctc"):  # what a token becomes among others is not known there
        return
    data_of = b"".join(bytes(entry.bytes or []) for entry in flat(texts))
    if "\ufffd" not in text:
        assert data_of.decode() == text
    elif subject.name in ("smollm2", "straddling"):
        assert data_of.decode("utf-8", "replace") == text


@EXAMPLES
@given(data=st.data(), per_token=st.booleans())
def test_what_a_stop_string_cuts_away_whole_has_no_entry(
    subject: Subject,  # noqa: F811
    data: st.DataObject,
    per_token: bool,
) -> None:
    ids = draw_ids(data, subject)
    stop = draw_stop(data, subject.decode(ids))
    texts = told(subject.stage, draw_chunks(data, ids), stop, per_token=per_token)
    text = joined(texts)
    if "\ufffd" in subject.decode(ids) or subject.name in ("bpe", "ctc"):
        return
    shown = b"".join(bytes(entry.bytes or []) for entry in flat(texts)).decode("utf-8", "replace")
    assert shown.startswith(text)
    last = next((entry for entry in reversed(flat(texts)) if entry.bytes), None)
    # The last token shown begins before the cut, so that without it some of the text is missing.
    assert last is None or len(shown.encode()) - len(last.bytes or []) < len(text.encode())


@EXAMPLES
@given(data=st.data())
def test_an_entry_is_not_later_than_the_end_of_its_text(subject: Subject, data: st.DataObject) -> None:  # noqa: F811
    """At any time the text that is out is that of the entries that are out, but for the end of the last."""
    ids = draw_ids(data, subject)
    if subject.name in ("bpe", "ctc") or "\ufffd" in subject.decode(ids):
        return
    texts = told(subject.stage, [[id] for id in ids], draw_stop(data, subject.decode(ids)), per_token=True)
    for count in range(len(texts) + 1):
        out = joined(texts[:count]).encode()
        assert b"".join(bytes(entry.bytes or []) for entry in flat(texts[:count])).startswith(out)


def test_a_space_written_as_a_byte_is_cut_from_the_start_as_any_other() -> None:
    """`Strip` takes it from the text, so it is none of its entry's bytes: found by the test above."""
    tokenizer = SYNTHETIC["llama"]()
    texts = told(Postprocess(Vocabulary.of(tokenizer)), [[tokenizer.token_to_id("<0x20>"), tokenizer.token_to_id("a")]])
    assert joined(texts) == "a"
    assert [entry.bytes for entry in flat(texts)] == [[], [97]]


def one(stage: Postprocess, ids: Sequence[int], **window: object) -> Text:
    logprobs = [Logprob(id, -1.0, []) for id in ids]
    fields = {"stop": [], "final": True, **window}
    return stage.text(Window(list(ids), len(ids), 0, logprobs=logprobs, **fields), per_token=False)  # type: ignore[arg-type]


def test_half_a_character_has_its_bytes(smollm2_bytes: tuple[Postprocess, dict[int, int]]) -> None:  # noqa: F811
    stage, id_of = smollm2_bytes
    chunks = [[id_of[byte]] for byte in "é!".encode()]
    texts = told(stage, chunks)
    assert [text.texts for text in texts] == [[""], ["é"], ["!"]]
    assert [[entry[:2] for entries in text.logprobs for entry in entries] for text in texts] == [
        [],
        [("\\xc3", [0xC3]), ("\\xa9", [0xA9])],
        [("!", [0x21])],
    ]


def test_a_character_in_byte_tokens() -> None:
    tokenizer = SYNTHETIC["llama"]()
    ids = [tokenizer.token_to_id(token) for token in ("▁Hello", "<0xC3>", "<0xA9>", "▁wor", "</s>")]
    text = one(Postprocess(Vocabulary.of(tokenizer)), ids)
    assert text.texts == ["Helloé wor"]
    assert [entry.token for entry in flat([text])] == ["Hello", "\\xc3", "\\xa9", " wor"]
    assert text.told == 5


def test_a_stop_string_inside_a_run_of_byte_tokens() -> None:
    """The tokens of the characters before it are shown, the one that it begins in is not."""
    tokenizer = SYNTHETIC["llama"]()
    ids = [tokenizer.token_to_id(token) for token in ("a", "<0xC3>", "<0xA9>", "<0xC3>", "<0xA8>", "b")]
    text = one(Postprocess(Vocabulary.of(tokenizer)), ids, stop=["è"])
    assert (text.texts, text.stopped) == (["aé"], True)
    assert [entry.token for entry in flat([text])] == ["a", "\\xc3", "\\xa9"]
    assert text.told == 6


def test_a_special_token_is_named_among_the_likeliest(smollm2_home) -> None:  # type: ignore[no-untyped-def]
    tokenizer = Tokenizer.from_file(str(smollm2_home / "tokenizer.json"))
    end, word = tokenizer.token_to_id("<|im_end|>"), tokenizer.encode("Hello", add_special_tokens=False).ids[0]
    logprobs = [Logprob(word, -0.5, [(word, -0.5), (end, -1.5), (10**6, -9.0)]), Logprob(end, -0.1, [])]
    text = Postprocess(Vocabulary.of(tokenizer)).text(Window([word, end], 2, 0, [], True, logprobs), per_token=False)
    assert flat([text]) == [
        Entry(
            "Hello",
            list(b"Hello"),
            -0.5,
            [("Hello", list(b"Hello"), -0.5), ("<|im_end|>", None, -1.5), ("", None, -9.0)],
        )
    ]


def test_a_token_whose_text_is_held_back_comes_with_it(smollm2_bytes: tuple[Postprocess, dict[int, int]]) -> None:  # noqa: F811
    stage, id_of = smollm2_bytes
    texts = told(stage, [[id_of[byte]] for byte in b"abcd"], ["bcx"])
    assert [text.texts for text in texts] == [["a"], [""], [""], ["bcd"]]
    assert [[entry.token for entries in text.logprobs for entry in entries] for text in texts] == [
        ["a"],
        [],
        [],
        ["b", "c", "d"],
    ]


@pytest.mark.parametrize(
    ("data", "wanted"), [(b"a b", "a b"), (b"\xe2\x80", "\\xe2\\x80"), (b"", ""), (b"a\xff", "\\x61\\xff")]
)
def test_spellings(data: bytes, wanted: str) -> None:
    assert spelling(data) == (wanted, list(data))


def test_a_likelihood_is_a_number_of_json() -> None:
    assert [likelihood(value) for value in (-0.5, -9999.5, float("-inf"), float("nan"))] == [-0.5] + [-9999.0] * 3
