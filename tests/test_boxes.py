"""Boxes that an answer names: read from text however it is cut, as transformers reads it whole, and told at HTTP."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers.models.kosmos2.processing_kosmos2 import clean_text_and_extract_entities_with_bboxes as reference

from gateway.backend import Delta
from gateway.choices import ParsedChoice
from gateway.protocol import CHAT, COMPLETION
from gateway.settings import Settings
from pipelines.answer.boxes import BoxParser, box, grid_of, marks
from pipelines.answer.deltas import Boxes, Content
from pipelines.answer.formats import AnswerFormat
from pipelines.logprobs import Entry
from pipelines.pipeline import Pipeline
from pipelines.postprocess import Postprocess
from pipelines.tools import parse_tools
from tests import vision
from tests.scripted import ACCEPTED, HELLO, MODEL, ScriptedBackend, Server

GRID = 32
SIZE = (519, 640)
SNOWMAN = (
    "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object> warming "
    "himself by<phrase> a fire</phrase><object><patch_index_0005><patch_index_0911></object>."
)
SNOWMAN_CONTENT = "An image of a snowman [203, 30, 511, 530] warming himself by a fire [89, 10, 251, 570]."
NEXT = "</delimiter_of_multi_objects/>"
EXAMPLES = settings(max_examples=400, deadline=None)


def pair(first: int, last: int) -> str:
    return f"<patch_index_{first:04}><patch_index_{last:04}>"


def read(pieces, pictures=(SIZE,), grid=GRID):
    """The content, and the boxes."""
    parser = BoxParser(grid)
    parser.pictures = pictures
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    content = "".join(delta.text for delta in deltas if isinstance(delta, Content))
    groups = [delta for delta in deltas if isinstance(delta, Boxes)]
    found = [each for group in groups for each in group.found]
    numbers = [group.number + place for group in groups for place in range(len(group.found))]
    assert numbers == list(range(len(found)))
    return content, found


def test_content_and_boxes():
    content, found = read([SNOWMAN])
    assert content == SNOWMAN_CONTENT
    assert [(each.text, each.pixels, each.picture) for each in found] == [
        ("a snowman", (203, 30, 511, 530), 0),
        ("a fire", (89, 10, 251, 570), 0),
    ]
    assert [content[each.start : each.end] for each in found] == ["a snowman", "a fire"]


def test_an_object_of_several_boxes():
    text = f"<phrase> two cats</phrase><object>{pair(0, 33)}{NEXT}{pair(100, 200)}</object> sleep"
    content, found = read([text], [(320, 320)])
    assert content == "two cats [5, 5, 15, 15] [45, 35, 85, 65] sleep"
    assert [(each.text, each.start, each.end) for each in found] == [("two cats", 0, 8)] * 2


def test_without_a_picture_there_are_no_boxes():
    assert read([SNOWMAN], ()) == ("An image of a snowman warming himself by a fire.", [])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a < b and c > d <br> 3<4", "a < b and c > d <br> 3<4"),  # no tags of the model's
        ("a <phr", "a <phr"),
        ("a <patch_index_00", "a <patch_index_00"),
        ("a <patch_index_0000000001> b", "a <patch_index_0000000001> b"),
        ("a <", "a <"),
        ("<phrase> a cat", "a cat"),
        ("<phrase> a cat</phrase>", "a cat"),
        ("<phrase> a cat</phrase><object><patch_index_0001>", "a cat"),
        ("<phrase> a cat</phrase><object><patch_index_0001></object> sits", "a cat sits"),
        (f"<phrase> a cat</phrase><object>{pair(1, 2)}{NEXT}</object> sits", "a cat sits"),
        (f"<phrase> a cat</phrase><object>{pair(1, 2)}<patch_index_0003></object> sits", "a cat sits"),
        (f"<phrase> a cat</phrase><object>{pair(1, 2)} in</object> sits", "a cat in sits"),
        (f"<phrase> a cat</phrase><object>{pair(1, 1024)}</object> sits", "a cat sits"),  # no cell of the grid
        (f"a cat{pair(1, 2)}</object> sits", "a cat sits"),
    ],
)
def test_what_is_malformed_or_cut_is_words_without_a_box(text, wanted):
    assert read([text]) == (wanted, [])


def test_a_box_without_a_phrase_has_no_words():
    content, (found,) = read([f"<phrase> a cat</phrase> and<object>{pair(0, 33)}</object> more"], [(320, 320)])
    assert content == "a cat and [5, 5, 15, 15] more"
    assert (found.text, found.start, found.end) == ("", 9, 9)
    content, (found,) = read([f"<object>{pair(0, 33)}</object> a cat "], [(320, 320)])
    assert (content, found.start, found.end) == ("[5, 5, 15, 15] a cat", 0, 0)


def test_a_phrase_that_holds_a_tag_names_nothing():
    text = f"<phrase> a<object>{pair(0, 33)}</object> cat</phrase><object>{pair(0, 33)}</object>"
    content, found = read([text], [(320, 320)])
    assert content == "a [5, 5, 15, 15] cat [5, 5, 15, 15]"
    assert [each.text for each in found] == ["", ""]
    assert [name for name, *_ in reference(text)[1]] == ["<patch_index_0><patch_index_33>"] * 2


def test_pixels_are_whole_and_halves_go_up():
    assert box(0, 0, 32, (32, 32)) == (0, 0, 1, 1)
    assert box(0, 31, 32, (32, 32)) == (0, 0, 32, 1)
    assert box(0, 1023, 32, (32, 32)) == (1, 1, 32, 32)  # 0.5 and 31.5
    assert box(0, 3, 2, (7, 5)) == (2, 1, 5, 4)  # 1.75, 1.25, 5.25, 3.75


# --- against transformers

WORD = st.sampled_from([" a cat", "dog ", " x", "Ünï", "\n b ", " two  words ", ".", " 😀"])
PAIR = st.builds(pair, st.integers(0, GRID**2 - 1), st.integers(0, GRID**2 - 1))
OBJECT = st.lists(PAIR, min_size=1, max_size=3).map(lambda pairs: f"<object>{NEXT.join(pairs)}</object>")
NAMED = st.builds("<phrase>{}</phrase>{}".format, WORD, OBJECT)
LOOSE = st.sampled_from(
    ["<phrase>", "</phrase>", "<object>", "</object>", NEXT, "<patch_index_0007>", "<grounding>", "<image>", "</image>"]
)
ANSWER = st.lists(st.one_of(WORD, NAMED, NAMED, OBJECT, LOOSE, PAIR), max_size=12).map("".join)


@EXAMPLES
@given(text=ANSWER, size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
def test_what_transformers_finds(text, size):
    content, found = read([text], [size])
    clean, entities = reference(text)
    assert [each.text for each in found] == [
        "" if name.startswith("<patch_index_") else name for name, _, spans in entities for _ in spans
    ]
    width, height = size
    wanted = [
        tuple(int(part * length + 0.5) for part, length in zip(span, (width, height, width, height), strict=True))
        for _, _, spans in entities
        for span in spans
    ]
    assert [each.pixels for each in found] == wanted
    for each in found:
        assert content[each.start : each.end] == each.text
    # Without a picture nothing is added to the content, so that it is all of the reference's.
    assert read([text], ())[0] == clean
    # With one the reference's positions are ours, less what was added before.
    for each in found:
        added = sum(len(told) for told in re.findall(r" ?\[\d+(?:, \d+){3}\]", content[: each.start]))
        if each.text and not content.startswith("["):
            starts = [start for name, (start, _), _ in entities if name == each.text]
            assert each.start - added in starts


# --- streaming

PIECES = st.one_of(
    WORD, NAMED, OBJECT, LOOSE, PAIR, st.sampled_from(["<", "<p", "<patch_index_", "1>", ">", "<b>", " "])
)


@EXAMPLES
@given(
    text=st.lists(PIECES, max_size=10).map("".join),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    pictures=st.sampled_from([(), (SIZE,)]),
)
def test_however_it_is_cut_the_result_is_the_same(text, cuts, pictures):
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert read(pieces, pictures) == read([text], pictures) == read(text, pictures)


def test_nothing_waits_that_is_settled():
    parser = BoxParser(GRID)
    parser.pictures = [SIZE]
    told = [parser.push(piece) for piece in ["An image", " of", "<phrase> a snow", "man</phrase>", "<object>"]]
    assert told == [
        [Content("An image")],
        [Content(" of")],
        [Content(" a snow")],
        [Content("man")],
        [],
    ]
    (words, boxes) = parser.push(f"{pair(44, 863)}</object>")
    assert words == Content(" [203, 30, 511, 530]")
    assert isinstance(boxes, Boxes)


# --- found by its vocabulary


def tokenizer(*, special: bool, grid: int = 2) -> Tokenizer:
    """Kosmos-2's layout: words of a sentencepiece vocabulary, and the tags added behind it."""
    words = ["<s>", "</s>", "<unk>", "▁An", "▁image", "▁of", "▁a", "▁cat", "."]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<s>", "</s>"])
    tags = ["<grounding>", "<phrase>", "</phrase>", "<object>", "</object>", NEXT]
    tags += [f"<patch_index_{number:04}>" for number in range(grid * grid)]
    made.add_tokens([AddedToken(tag, special=special, normalized=False, lstrip=True) for tag in tags])
    return made


@pytest.mark.parametrize("special", [True, False])
def test_the_tags_reach_the_reader(tmp_path, special):
    made = tokenizer(special=special)
    made.save(str(tmp_path / "tokenizer.json"))
    said = ["<s>", "▁An", "▁image", "▁of", "<phrase>", "▁a", "▁cat", "</phrase>", "<object>"]
    said += ["<patch_index_0000>", "<patch_index_0003>", "</object>", ".", "</s>"]
    ids = [made.token_to_id(token) for token in said]
    text = Postprocess.load(tmp_path).full(ids)
    assert text == f"An image of<phrase> a cat</phrase><object>{pair(0, 3)}</object>."
    content, (found,) = read([text], [(40, 40)], AnswerFormat.load(tmp_path).grid)
    assert (content, found.pixels) == ("An image of a cat [10, 10, 30, 30].", (10, 10, 30, 30))


def test_the_text_is_what_transformers_decodes(tmp_path):
    """With its own processor, whose tokenizer has all the tags."""
    home = vision.home("kosmos2", tmp_path)
    own = vision.processor(home).tokenizer
    ids = own(SNOWMAN, add_special_tokens=False)["input_ids"]
    text = Postprocess.load(home).full([own.bos_token_id, *ids, own.eos_token_id])
    assert text == own.decode(ids, skip_special_tokens=True)
    assert [each.text for each in read([text])[1]] == ["a snowman", "a fire"]
    assert AnswerFormat.load(home).grid == GRID


def test_the_grid_is_as_many_patches_as_there_are(tmp_path, caplog):
    assert grid_of(tmp_path) == 0
    for grid in (2, 5):
        tokenizer(special=False, grid=grid).save(str(tmp_path / "tokenizer.json"))
        assert grid_of(tmp_path) == grid
        assert len(marks(grid)) == grid * grid + 5
    made = tokenizer(special=False)
    made.add_tokens(["<patch_index_0004>"])
    made.save(str(tmp_path / "tokenizer.json"))
    assert grid_of(tmp_path) == 0
    assert "no square" in caplog.text


def test_other_tokenizers_have_none(tmp_path):
    made = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    made.add_special_tokens(["<phrase>", "<tool_call>"])
    made.save(str(tmp_path / "tokenizer.json"))
    assert AnswerFormat.load(tmp_path) == AnswerFormat()


def test_boxes_are_read_of_content_alone():
    """Calls and reasoning are read first."""
    tools = parse_tools({"tools": [{"type": "function", "function": {"name": "f"}}]})
    form = AnswerFormat(think=("<think>", "</think>"), grid=2)
    one = ParsedChoice(CHAT, 0, form.parser(tools))
    cat = f"<phrase> a cat</phrase><object>{pair(0, 3)}</object>"
    call = '<tool_call>{"name": "f", "arguments": {"a": "<phrase>"}}</tool_call>'
    one.keep(Delta([f"<think><object></think>I see{cat}. {call}"], "stop", pictures=[(40, 40)]))
    message = one.whole("stop", logprobs=False)["message"]
    assert message["reasoning_content"] == "<object>"
    assert message["content"] == "I see a cat [10, 10, 30, 30]."
    assert message["tool_calls"][0]["function"]["arguments"] == '{"a": "<phrase>"}'
    assert [annotation["text"] for annotation in message["annotations"]] == ["a cat"]


# --- at HTTP


ANNOTATIONS = [
    {
        "type": "bounding_box",
        "text": text,
        "start_index": start,
        "end_index": end,
        "box": pixels,
        "image": 0,
    }
    for text, start, end, pixels in [("a snowman", 12, 21, [203, 30, 511, 530]), ("a fire", 61, 67, [89, 10, 251, 570])]
]
SEEN = ACCEPTED._replace(pictures=[[*SIZE]])
TEXTS = re.findall(r" ?[^ ]{1,9}", SNOWMAN)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("TRIPTYCH_CACHE", str(tmp_path_factory.mktemp("cache")))
    backend = ScriptedBackend()
    backend.served = {MODEL: Pipeline(name=MODEL, source="path:kosmos")}
    home = backend.served[MODEL].home
    home.mkdir(parents=True)
    tokenizer(special=False, grid=GRID).save(str(home / "tokenizer.json"))
    backend.steps = [SEEN, *(Delta([text]) for text in TEXTS), Delta([], "stop", 3, 12)]
    with Server(backend, Settings()) as running:
        yield running
    patch.undo()


def test_a_whole_answer(server):
    (answer,) = server.post(CHAT.path, HELLO).json()["choices"]
    assert answer["message"] == {
        "role": "assistant",
        "content": SNOWMAN_CONTENT,
        "refusal": None,
        "annotations": ANNOTATIONS,
    }


def test_a_stream(server):
    lines = server.post(CHAT.path, {**HELLO, "stream": True}).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == SNOWMAN_CONTENT
    places = [place for place, delta in enumerate(deltas) if "annotations" in delta]
    assert [deltas[place]["annotations"] for place in places] == [
        [{"index": index, **annotation}] for index, annotation in enumerate(ANNOTATIONS)
    ]
    for place, annotation in zip(places, ANNOTATIONS, strict=True):  # as soon as the box is told
        said = "".join(delta.get("content", "") for delta in deltas[:place])
        assert said.endswith(str(annotation["box"]))


def test_the_official_client(server):
    client = server.client()
    asked = {"model": MODEL, "messages": HELLO["messages"]}
    message = client.chat.completions.create(**asked).choices[0].message
    assert [annotation.model_dump(exclude_unset=True) for annotation in message.annotations] == ANNOTATIONS
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.content == SNOWMAN_CONTENT
    assert [annotation.model_dump(exclude_unset=True)["box"] for annotation in streamed.annotations] == [
        annotation["box"] for annotation in ANNOTATIONS
    ]


def test_a_raw_completion_has_the_tags(server):
    answer = server.post(COMPLETION.path, {"model": MODEL, "prompt": "An image"}).json()["choices"][0]
    assert answer["text"] == SNOWMAN


def test_without_a_picture_a_whole_answer_has_no_annotations(server):
    server.backend.each = [[ACCEPTED, Delta([SNOWMAN], "stop", 3, 12)]]
    message = server.post(CHAT.path, HELLO).json()["choices"][0]["message"]
    assert message["content"] == "An image of a snowman warming himself by a fire."
    assert "annotations" not in message


def test_logprobs_are_of_the_tokens_as_they_are(server):
    def entry(text):
        return Entry(text, list(text.encode()), -0.5, [])

    steps = [SEEN, *(Delta([text], logprobs=[[entry(text)]]) for text in TEXTS), Delta([], "stop", 3, 12)]
    server.backend.each = [steps, steps]
    (answer,) = server.post(CHAT.path, {**HELLO, "logprobs": True}).json()["choices"]
    assert [told["token"] for told in answer["logprobs"]["content"]] == TEXTS
    lines = server.post(CHAT.path, {**HELLO, "logprobs": True, "stream": True}).text.split("\n\n")
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    told = [entry["token"] for one in choices for entry in (one["logprobs"] or {"content": []})["content"]]
    assert told == TEXTS
