"""Text from ids: for every tokenizer and chunking, the stream is the full decode, cut at the earliest stop.

The reference is `tokenizers`' own decode and, for stop strings, a reader that goes character by character.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from pipelines.chat import Window
from pipelines.postprocess import Delta, Postprocess, find_stop, possible_stop
from pipelines.vocabulary import Vocabulary

NAMES = ("smollm2", "gemma3", "straddling", "llama", "indented", "metaspace", "wordpiece", "plain", "bpe", "ctc")
BYTE_LEVELS = ("smollm2", "straddling")
EXAMPLES = settings(max_examples=40, deadline=None)

LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁▁", "▁Hello", "▁wor", "ld", "a", "ab", "b", "日", "�", "\n", "<0xZZ>", "<0x+F>", "!"]
WORDPIECES = ["hello", "##ing", "##s", ".", ",", "'s", "n't", "do", "un", "##", "é", "日"]


def synthetic(tokens: Iterable[str], decoder: object) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<extra>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("▁x y", special=False)])
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def spell(data: bytes) -> str:
    """Bytes as GPT-2's vocabulary spells them."""
    return "".join(BYTE_LEVEL[byte] for byte in data)


PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_LEVEL = {byte: chr(byte if byte in PRINTABLE else 256 + OTHERS.index(byte)) for byte in range(256)}
STRADDLING = [
    b"\xe0",
    b"\xb0\x80\xe0",
    b"\xb0\x80",
    b"\x80\xe0\xb0",
    b"a\xf0\x9f",
    b"\x98\x80b",
    b"\x80\x80",
    b"c\xff\xc3",
]

SYNTHETIC = {
    "straddling": lambda: synthetic(map(spell, STRADDLING), decoders.ByteLevel()),
    "llama": lambda: synthetic(PIECES + BYTES, decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)])),
    "indented": lambda: synthetic(PIECES + BYTES, decoders.Sequence([*LLAMA, decoders.Strip(" ", 3, 0)])),
    "metaspace": lambda: synthetic(PIECES, decoders.Metaspace(prepend_scheme="always")),
    "wordpiece": lambda: synthetic(WORDPIECES, decoders.WordPiece()),
    "plain": lambda: synthetic(WORDPIECES, None),
    # A token of these is spelt by what follows, so nothing is certain before the end.
    "bpe": lambda: synthetic(["a</w>", "b", "c</w>", "日</w>"], decoders.BPEDecoder()),
    "ctc": lambda: synthetic(["<pad>", "|", "a", "b", ".", "日"], decoders.CTC()),
}


@dataclass(frozen=True)
class Subject:
    name: str
    tokenizer: Tokenizer
    stage: Postprocess
    odd: list[int]  # ids with something to them: bytes, special tokens, spaces
    special: set[str]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


@pytest.fixture(scope="module", params=NAMES)
def subject(request):
    if request.param in SYNTHETIC:
        tokenizer = SYNTHETIC[request.param]()
        stage = Postprocess(Vocabulary.of(tokenizer))
    else:
        home = request.getfixturevalue(f"{request.param}_home")
        tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
        stage = Postprocess(Vocabulary.load(home))
    tokens = tokenizer.get_added_tokens_decoder()
    special = {token.content for token in tokens.values() if token.special}
    added = list(tokens)
    size = tokenizer.get_vocab_size()
    odd = added[:12] + added[-2:] + [size, size + 99]
    odd += range(2, 2 + len(PIECES)) if request.param in SYNTHETIC else []
    alphabet = BYTES if tokenizer.token_to_id("<0x00>") is not None else [chr(code) for code in range(0x21, 0x144)]
    odd += [token for char in alphabet if (token := tokenizer.token_to_id(char)) is not None]
    return Subject(request.param, tokenizer, stage, odd, special)


TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        "  Hello  world\n",
        "👩‍👩‍👧‍👦 🇫🇷 é",
        "数据处理",
        "ｱ\u200dﷺ",
        "\ufffd\ufffd",
        "a�b",
        "𐍈\U0010ffff",
        " .",
        "'s",
    ]
)


def draw_ids(data: st.DataObject, subject: Subject) -> list[int]:
    """Encoded text, or half of it, between ids at random, of which many are odd."""
    anything = st.sampled_from(subject.odd) | st.integers(0, subject.tokenizer.get_vocab_size() + 2)
    some = st.lists(st.sampled_from(subject.odd), max_size=6) | st.lists(anything, max_size=6)
    ids: list[int] = []
    for part in data.draw(st.lists(TEXTS | some, max_size=4), label="parts"):
        if isinstance(part, str):
            known = subject.name not in SYNTHETIC
            encoded = subject.tokenizer.encode(part, add_special_tokens=False).ids if known else []
            part = encoded[: data.draw(st.integers(0, len(encoded)), label="kept")]
        ids += part
    return ids


def draw_stop(data: st.DataObject, text: str) -> list[str]:
    """Stop strings that mostly occur in the text: its slices."""
    slices = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 6)).map(
        lambda at: text[at[0] : at[0] + at[1]]
    )
    anything = slices | slices.map(lambda part: part + "!") | st.text("ab \ufffd\n", min_size=1, max_size=3)
    return data.draw(st.lists(anything.filter(bool), max_size=4), label="stop")


def draw_chunks(data: st.DataObject, ids: Sequence[int]) -> list[list[int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6), label="cuts"))
    return [list(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def cut(text: str, stop: Sequence[str]) -> str:
    """The reader: stops at the first character that completes a stop string."""
    for end in range(len(text) + 1):
        if ending := [sequence for sequence in stop if text[:end].endswith(sequence)]:
            return text[: end - max(map(len, ending))]
    return text


def stream(
    stage: Postprocess,
    chunks: Sequence[Sequence[int]],
    stop: Sequence[str] = (),
    *,
    per_token: bool = False,
    end: bool = True,
) -> tuple[list[Delta], list[list[int]]]:
    """The caller's side: the deltas, and the window after each."""
    window: list[int] = []
    sent = 0
    deltas, windows = [], []
    for index, chunk in enumerate(chunks):
        new = len(window)
        window += chunk
        final = end and index == len(chunks) - 1
        delta = stage.delta(window, sent, stop=stop, final=final, per_token_from=new if per_token else None)
        del window[: delta.drop]
        sent = delta.sent
        deltas.append(delta)
        windows.append(list(window))
    return deltas, windows


def joined(deltas: Iterable[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@EXAMPLES
@given(data=st.data())
def test_all_at_once_is_tokenizers_decode(subject, data):
    ids = draw_ids(data, subject)
    assert subject.stage.full(ids) == subject.decode(ids)


@EXAMPLES
@given(data=st.data(), per_token=st.booleans())
def test_the_stream_is_the_full_decode_cut_at_the_earliest_stop(subject, data, per_token):
    ids = draw_ids(data, subject)
    text = subject.decode(ids)
    stop = draw_stop(data, text)
    wanted = cut(text, stop)
    deltas, _ = stream(subject.stage, draw_chunks(data, ids), stop, per_token=per_token)
    assert joined(deltas) == wanted == subject.stage.full(ids, stop)
    assert deltas[-1].stopped == any(sequence in text for sequence in stop)


@EXAMPLES
@given(data=st.data())
def test_what_an_id_gets_does_not_depend_on_the_chunks(subject, data):
    ids = draw_ids(data, subject)
    stop = draw_stop(data, subject.decode(ids))
    chunks = draw_chunks(data, ids)
    together, _ = stream(subject.stage, chunks, stop, per_token=True, end=False)
    single, _ = stream(subject.stage, [[token_id] for token_id in ids], stop, per_token=True, end=False)
    for delta, chunk in zip(together, chunks, strict=True):
        assert len(delta.texts) == len(chunk)
        assert delta.text == "".join(delta.texts) or not chunk
    assert [text for delta in together for text in delta.texts] == [delta.text for delta in single]


def unsettled(subject: Subject, ids: Sequence[int]) -> int:
    """The most characters that may still be waiting: those of the bytes at the end."""
    if subject.name in ("bpe", "ctc"):
        return len(subject.decode(ids))
    visible = [token for token_id in ids if (token := subject.tokenizer.id_to_token(token_id)) is not None]
    run = 0
    for token in reversed([token for token in visible if token not in subject.special]):
        if not (token.startswith("<0x") and token != "<0xZZ>") or subject.name in (*BYTE_LEVELS, "metaspace"):
            break
        run += 1
    return 1 if subject.name in BYTE_LEVELS else run


def test_half_a_surrogate_pair_is_not_waited_for(smollm2_home):
    """ED A1 begins no character: both bytes are settled, and Python's decoder waits for a third."""
    tokenizer = Tokenizer.from_file(str(smollm2_home / "tokenizer.json"))
    ids = [tokenizer.token_to_id(letter) for letter in ("\u00ed", "\u00a1", "!")]
    deltas, _ = stream(Postprocess.load(smollm2_home), [[token_id] for token_id in ids], end=False)
    assert [delta.text for delta in deltas] == ["", "\ufffd\ufffd", "!"]
    assert tokenizer.decode(ids) == "\ufffd\ufffd!"


@EXAMPLES
@given(data=st.data())
def test_only_what_may_change_or_stop_is_held(subject, data):
    ids = draw_ids(data, subject)
    stop = [sequence for sequence in draw_stop(data, subject.decode(ids)) if sequence not in subject.decode(ids)]
    deltas, _ = stream(subject.stage, [[token_id] for token_id in ids], stop, end=False)
    for count in range(1, len(ids) + 1):
        text, out = subject.decode(ids[:count]), joined(deltas[:count])
        assert len(text) - len(out) <= unsettled(subject, ids[:count]) + max(map(len, stop), default=1) - 1
        if not stop and subject.name in BYTE_LEVELS:
            assert text[len(out) :] in ("", "\ufffd")


@EXAMPLES
@given(data=st.data())
def test_the_window_is_no_longer_than_what_is_held(subject, data):
    ids = draw_ids(data, subject)
    _, windows = stream(subject.stage, draw_chunks(data, ids), end=False)
    if subject.name in ("bpe", "ctc"):
        assert windows[-1] == ids
    elif subject.name in ("metaspace", "wordpiece", "plain"):
        assert windows[-1] == []
    elif subject.name != "indented":
        held = [token_id for token_id in windows[-1] if subject.decode([token_id])]
        assert len(held) <= (3 if subject.name in BYTE_LEVELS else unsettled(subject, ids))


def test_the_window_of_a_long_answer_stays_empty(smollm2_home, gemma3_home):
    for home in (smollm2_home, gemma3_home):
        tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
        ids = tokenizer.encode("The quick brown fox. " * 50, add_special_tokens=False).ids
        deltas, windows = stream(
            Postprocess(Vocabulary.of(tokenizer)), [[token_id] for token_id in ids], ["\n\n"], end=False
        )
        assert not any(windows)
        assert not any(delta.sent for delta in deltas)


@EXAMPLES
@given(data=st.data())
def test_the_checker_ends_where_the_stream_is_cut(subject, data):
    ids = draw_ids(data, subject)
    stop = draw_stop(data, subject.decode(ids))
    stops_at = subject.stage.stop_checker(stop)
    told: list[int] = []
    fired = False
    for token_id in ids:
        told.append(token_id)
        fired = stops_at(token_id)
        assert fired == subject.stage.delta(told, 0, stop=stop).stopped
        if fired:
            break
    text = subject.decode(told)
    answer = subject.stage.full(told, stop)
    assert answer == cut(text, stop) == joined(stream(subject.stage, draw_chunks(data, told), stop)[0])
    assert not any(sequence in answer for sequence in stop)
    if fired:
        assert any(sequence in text for sequence in stop)
        # And whatever came after would have been cut in the same place.
        assert subject.stage.full(ids, stop) == answer


@EXAMPLES
@given(data=st.data())
def test_after_a_stop_nothing_comes_out_any_more(subject, data):
    ids = draw_ids(data, subject)
    stop = draw_stop(data, subject.decode(ids))
    deltas, _ = stream(subject.stage, [[token_id] for token_id in ids], stop)
    stopped = False
    for delta in deltas:
        assert not (stopped and delta.text)
        assert delta.stopped or not stopped
        stopped = delta.stopped


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=12) | st.lists(st.sampled_from(list(b"a\x80\xbf\xc2\xc3\xe0\xe2\xed\xf0\xf4\xff"))).map(bytes)
)
def test_bytes_become_what_rust_makes_of_them(smollm2_bytes, data):
    """`from_utf8_lossy` replaces maximal subparts (Unicode 15, 3.9, U+FFFD Substitution), as Python does."""
    subject, id_of = smollm2_bytes
    ids = [id_of[byte] for byte in data]
    assert subject.full(ids) == data.decode("utf-8", "replace")
    assert joined(stream(subject, [[token_id] for token_id in ids])[0]) == data.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def smollm2_bytes(smollm2_home):
    tokenizer = Tokenizer.from_file(str(smollm2_home / "tokenizer.json"))
    # Some bytes are in no text, and so no token of this tokenizer: give it those.
    id_of = {byte: tokenizer.token_to_id(char) for byte, char in BYTE_LEVEL.items()}
    missing = [byte for byte, token_id in id_of.items() if token_id is None]
    tokenizer.add_tokens([AddedToken(BYTE_LEVEL[byte], normalized=False) for byte in missing])
    id_of |= {byte: tokenizer.token_to_id(BYTE_LEVEL[byte]) for byte in missing}
    stage = Postprocess(Vocabulary.of(tokenizer))
    assert tokenizer.decode([id_of[byte] for byte in "é😀".encode()]) == "é😀"
    return stage, id_of


def test_ids_that_all_end_inside_a_character_need_no_longer_window():
    tokenizer = SYNTHETIC["straddling"]()
    start, middle, end = (tokenizer.token_to_id(spell(data)) for data in STRADDLING[:3])
    deltas, windows = stream(Postprocess(Vocabulary.of(tokenizer)), [[start], *([[middle]] * 99), [end]])
    assert [delta.text for delta in deltas] == ["", *(["ఀ"] * 100)]
    assert [len(window) for window in windows] == [1] * 100 + [0]


def test_an_emoji_waits_for_its_last_byte(smollm2_bytes):
    stage, id_of = smollm2_bytes
    deltas, windows = stream(stage, [[id_of[byte]] for byte in "a😀b".encode()], per_token=True)
    assert [delta.texts for delta in deltas] == [["a"], [""], [""], [""], ["😀"], ["b"]]
    assert [len(window) for window in windows] == [0, 1, 2, 3, 0, 0]


def test_a_stop_string_over_tokens_and_messages(smollm2_bytes):
    stage, id_of = smollm2_bytes
    ids = [id_of[byte] for byte in b"one\nUseUser: two"]
    deltas, _ = stream(stage, [ids[:6], ids[6:9], ids[9:]], ["User:"], per_token=True)
    assert [delta.text for delta in deltas] == ["one\n", "Use", ""]
    assert deltas[1].texts == ["", "Use", ""]
    assert [delta.stopped for delta in deltas] == [False, False, True]


def test_what_was_held_comes_out_at_the_end(smollm2_bytes):
    stage, id_of = smollm2_bytes
    ids = [id_of[byte] for byte in b"ab\xe2\x82"]
    deltas, _ = stream(stage, [ids[:3], ids[3:]], ["bc"], per_token=True)
    assert [delta.texts for delta in deltas] == [["a", "", ""], ["b\ufffd"]]
    deltas, _ = stream(stage, [ids, []], ["b\ufffd!"], per_token=True)
    assert [(delta.text, delta.texts) for delta in deltas] == [("a", ["a", "", "", ""]), ("b\ufffd", [])]


def test_a_stop_that_only_the_end_settles_cuts_all_the_same(smollm2_bytes):
    stage, id_of = smollm2_bytes
    ids = [id_of[byte] for byte in b"a\xe2\x82"]
    assert not any(map(stage.stop_checker(["\ufffd"]), ids))
    deltas, _ = stream(stage, [ids], ["\ufffd"])
    assert deltas == [Delta("a", [], 1, 0, stopped=True)]


def test_a_stop_that_only_the_end_settles_is_why_it_ended(smollm2_bytes):
    """The engine, which goes by settled text, says `length`."""
    stage, id_of = smollm2_bytes
    ids = [id_of[byte] for byte in b"a\xe2\x82"]
    assert stage.answer(ids, ["\ufffd"], "length") == ("a", "stop")
    assert stage.answer(ids, ["x"], "length") == ("a\ufffd", "length")
    assert stage.answer(ids, ["\ufffd"], "cancelled") == ("a", "cancelled")
    assert stage.text(Window(ids, 3, 0, ["\ufffd"], True), per_token=False).stopped


@pytest.mark.parametrize("name", SYNTHETIC)
def test_special_tokens_that_mark_calls_stay_in_the_text(name):
    tokenizer = SYNTHETIC[name]()
    tokenizer.add_special_tokens(["[CALL]", "[OTHER]"])
    call, other = tokenizer.token_to_id("[CALL]"), tokenizer.token_to_id("[OTHER]")
    stage, skipping = Postprocess(Vocabulary.of(tokenizer), {"[CALL]"}), Postprocess(Vocabulary.of(tokenizer))
    some = next(id for id in range(tokenizer.get_vocab_size()) if len(skipping.full([id])) == 1)
    ids = [some, call, some, other, some]
    wanted = tokenizer.decode([some, call, some, some], skip_special_tokens=False)
    assert stage.full(ids) == wanted
    assert "[CALL]" in wanted
    assert "[CALL]" not in skipping.full(ids)
    assert stage.full(ids, ["[CALL]"]) == wanted[: wanted.index("[CALL]")]


def test_the_marks_of_a_models_format_are_kept(tmp_path):
    tokenizer = SYNTHETIC["llama"]()
    tokenizer.add_special_tokens(["[TOOL_CALLS]", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = [tokenizer.token_to_id("[TOOL_CALLS]"), tokenizer.token_to_id("</s>")]
    assert Postprocess.load(tmp_path).full(ids) == ""
    (tmp_path / "chat_template.jinja").write_text("{{ tools }}[TOOL_CALLS]")
    assert Postprocess.load(tmp_path).full(ids) == "[TOOL_CALLS]"


@pytest.fixture(scope="module")
def llama():
    tokenizer = SYNTHETIC["llama"]()
    return Postprocess(Vocabulary.of(tokenizer)), tokenizer.token_to_id


def test_llama_strips_one_space_from_the_answer_and_none_later(llama):
    stage, id_of = llama
    ids = [[id_of(token)] for token in ("<s>", "▁Hello", "▁wor", "<s>", "ld", "▁Hello")]
    deltas, windows = stream(stage, ids, end=False)
    assert [delta.text for delta in deltas] == ["", "Hello", " wor", "", "ld", " Hello"]
    assert windows == [[]] * 6


def test_up_to_three_spaces_are_stripped_over_tokens():
    tokenizer = SYNTHETIC["indented"]()
    ids = [[tokenizer.token_to_id(token)] for token in ("▁", "▁▁", "▁", "▁Hello")]
    deltas, windows = stream(Postprocess(Vocabulary.of(tokenizer)), ids, end=False)
    assert [delta.text for delta in deltas] == ["", "", " ", " Hello"]
    assert [len(window) for window in windows] == [1, 0, 0, 0]


def test_a_run_of_bytes_is_certain_only_when_it_ends(llama):
    stage, id_of = llama
    ids = [[id_of(token)] for token in ("a", "<0xC3>", "<0xA9>", "b", "<0xC3>", "<0xA9>", "<0xFF>", "b")]
    deltas, _ = stream(stage, ids, end=False)
    assert [delta.text for delta in deltas] == ["a", "", "", "éb", "", "", "", "\ufffd\ufffd\ufffdb"]


def test_the_earliest_stop_is_the_one_that_ends_first():
    assert find_stop("abcd", ["abcd", "c"]) == 2
    assert find_stop("abc", ["bc", "abc"]) == 0
    assert find_stop("abc", ["x"]) is None
    assert find_stop("abc", []) is None


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=8), max_size=3))
def test_the_stop_functions_against_their_definitions(text, stop):
    found = find_stop(text, stop)
    assert (text if found is None else text[:found]) == cut(text, stop)
    ends = [n for n in range(len(text) + 1) for s in stop if n < len(s) and text.endswith(s[:n])]
    assert possible_stop(text, stop) == max(ends, default=0)


def test_it_is_loaded_from_a_prepared_folder(tmp_path):
    tokenizer = SYNTHETIC["llama"]()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Postprocess.load(tmp_path).full([tokenizer.token_to_id("▁Hello")]) == "Hello"
