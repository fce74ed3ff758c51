"""Chat messages: what is taken, how it is normalised, and that every refusal names its place."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import StageError
from pipelines.messages import (
    ImagePart,
    check_count,
    image_parts,
    load_messages,
    parse_messages,
    refuse_images,
    utf8,
)


def user(content: object = "hi", **more: object) -> dict[str, object]:
    return {"role": "user", "content": content, **more}


def call(arguments: object = '{"a": 1}', **more: object) -> dict[str, object]:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}, **more}


def calls(tool_calls: object, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": None, "tool_calls": tool_calls, **more}


def text(what: str) -> dict[str, object]:
    return {"type": "text", "text": what}


def image(url: object = "data:", **more: object) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


IMAGE = "messages[0].content[0].image_url"
ARGUMENTS = "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_a_plain_message_is_taken_as_it_is(role):
    messages = [{"role": role, "content": "hi"}]
    assert parse_messages(messages) == messages


def test_text_parts_are_joined_by_lines():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert parse_messages([user(parts)]) == [user("one\ntwo")]


def test_parts_with_a_picture_stay_apart_and_in_order():
    parts = [text("one"), image("http://a/b"), text(""), text("two"), image("data:x", detail="low")]
    (message,) = parse_messages([user(parts)])
    first = image("http://a/b", detail="auto")
    assert message == user([text("one"), first, text(""), text("two"), image("data:x", detail="low")])
    assert parse_messages([message]) == [message]
    (given,) = parse_messages([user([{**image(detail=None), "text": None}])])
    assert given == user([image(detail="auto")])


def test_only_the_messages_with_a_picture_hold_parts():
    system = {"role": "system", "content": [text("a"), text("b")]}
    first, second, third = parse_messages([system, user([image()]), user([text("c")])])
    assert (first["content"], third["content"]) == ("a\nb", "c")
    assert isinstance(second["content"], list)


def test_where_the_pictures_are():
    messages = [
        user([text("a"), image("data:1")]),
        {"role": "assistant", "content": "b"},
        calls([call()]),
        user([image("data:2", detail="high"), text("c"), image("data:3")]),
    ]
    assert image_parts(parse_messages(messages)) == [
        ImagePart("messages[0].content[1].image_url.url", "data:1", "auto"),
        ImagePart("messages[3].content[0].image_url.url", "data:2", "high"),
        ImagePart("messages[3].content[2].image_url.url", "data:3", "auto"),
    ]
    assert image_parts(parse_messages([user("a"), calls([call()])])) == []


def test_a_pipeline_without_eyes_refuses_the_first_picture():
    refuse_images(parse_messages([user(), calls([call()])]))
    with pytest.raises(StageError, match="must be 'text', not 'image_url': this pipeline takes text only") as refused:
        refuse_images(parse_messages([user(), user([text("a"), image(), image()])]))
    assert refused.value.param == "messages[1].content[1].type"


@pytest.mark.parametrize(("most", "said"), [(1, "At most 1 image can"), (2, "At most 2 images can")])
def test_too_many_pictures_are_counted_over_all_messages(most, said):
    chat = parse_messages([user([image()] * most), user([text("a"), image(), image()])])
    check_count(chat, most + 2)
    with pytest.raises(StageError, match=said) as refused:
        check_count(chat, most)
    assert refused.value.param == "messages[1].content[1].type"
    assert f"not {most + 2}: 'messages[1].content[1].type' is one too many" in refused.value.message


def test_names_and_tool_results_are_kept():
    messages = [user(name="Ada"), {"role": "tool", "content": "42", "tool_call_id": "c1"}]
    assert parse_messages(messages) == messages


def test_nulls_and_no_tool_calls_are_keys_not_given():
    answer = {"role": "assistant", "content": "hi", "refusal": None, "audio": None, "tool_calls": []}
    assert parse_messages([answer]) == [{"role": "assistant", "content": "hi"}]


def test_calls_are_kept_as_openai_writes_them():
    messages = [
        calls([call(), call('{"b": [1, {}]}')]),
        {**calls([call()]), "content": "so", "reasoning_content": "hm"},
    ]
    assert parse_messages(messages) == messages


def test_what_the_official_client_adds_is_left_out():
    function = {"name": "f", "arguments": '{"a": 1}', "parsed_arguments": {"a": 1}}
    assert parse_messages([calls([call(function=function, index=0)], parsed={"b": 2})]) == [calls([call()])]
    with pytest.raises(StageError, match="parsed' is not supported"):
        parse_messages([user(parsed={})])


@pytest.mark.parametrize("arguments", ["", " ", None])
def test_a_call_without_arguments_has_none(arguments):
    assert parse_messages([calls([call(arguments, type=None)])]) == [calls([call("{}")])]


def test_an_empty_content_is_a_content():
    assert parse_messages([user("")]) == [user("")]


@pytest.mark.parametrize(
    ("messages", "param", "problem"),
    [
        (None, "messages", "must be a list of messages, not null"),
        ({"role": "user"}, "messages", "not an object"),
        ("hi", "messages", "not a string"),
        ([], "messages", "at least one"),
        (["hi"], "messages[0]", "an object with role and content, not a string"),
        ([user(), 5], "messages[1]", "not a number"),
        ([{}], "messages[0].role", "is required"),
        ([{"content": "hi"}], "messages[0].role", "is required"),
        ([{"role": 1, "content": "hi"}], "messages[0].role", "must be a string, not a number"),
        ([{"role": "function", "content": "hi"}], "messages[0].role", "not 'function'"),
        ([{"role": "\ud800", "content": "hi"}], "messages[0].role", "not valid Unicode"),
        ([{"role": "user"}], "messages[0].content", "is required"),
        ([user(None)], "messages[0].content", "is required"),
        ([user(True)], "messages[0].content", "a string or a list of parts, not a boolean"),
        ([user({"text": "hi"})], "messages[0].content", "not an object"),
        ([user([])], "messages[0].content", "at least one part"),
        ([user("\ud800")], "messages[0].content", "not valid Unicode"),
        ([user(), user("\udfff")], "messages[1].content", "not valid Unicode"),
        ([user(["hi"])], "messages[0].content[0]", "an object with type and its value, not a string"),
        ([user([{"text": "hi"}])], "messages[0].content[0].type", "must be 'text' or 'image_url'"),
        ([user([{"type": 1}])], "messages[0].content[0].type", "must be a string"),
        ([user([{"type": "text"}])], "messages[0].content[0].text", "is required"),
        ([user([{"type": "text", "text": []}])], "messages[0].content[0].text", "not a list"),
        ([user([{"type": "text", "text": "\ud800"}])], "messages[0].content[0].text", "not valid Unicode"),
        ([user([{"type": "text", "text": "", "x": 1}])], "messages[0].content[0].x", "not supported"),
        ([user([{"type": "input_audio", "input_audio": {}}])], "messages[0].content[0].type", "not 'input_audio'"),
        ([user([{"type": "file", "file": {}}])], "messages[0].content[0].type", "'text' or 'image_url', not 'file'"),
        ([user([{"type": "refusal", "refusal": ""}])], "messages[0].content[0].type", "not 'refusal'"),
        ([user([{"type": "input_image", "image_url": ""}])], "messages[0].content[0].type", "not 'input_image'"),
        ([user([{"type": "image_url"}])], IMAGE, "is required"),
        ([user([{"type": "image_url", "image_url": None}])], IMAGE, "is required"),
        ([user([{"type": "image_url", "image_url": "data:"}])], IMAGE, 'send {"url": "..."}, not the URL alone'),
        ([user([{"type": "image_url", "image_url": []}])], IMAGE, "an object with url and detail, not a list"),
        ([user([image(), {**image(), "text": "x"}])], "messages[0].content[1].text", "takes type, image_url"),
        ([user([{"type": "image_url", "image_url": {}}])], f"{IMAGE}.url", "is required"),
        ([user([image("")])], f"{IMAGE}.url", "is required"),
        ([user([image(7)])], f"{IMAGE}.url", "a data URI, or an http or https URL, not a number"),
        ([user([image("\ud800")])], f"{IMAGE}.url", "not valid Unicode"),
        ([user([image(detail="medium")])], f"{IMAGE}.detail", "one of auto, low, high, not 'medium'"),
        ([user([image(detail=1)])], f"{IMAGE}.detail", "must be a string"),
        ([user([image(size=1)])], f"{IMAGE}.size", "takes url, detail"),
        ([user(), {"role": "assistant", "content": [image()]}], "messages[1].content[0].type", "with role 'user'"),
        ([{"role": "system", "content": [image()]}], "messages[0].content[0].type", "must be 'text', not 'image_url'"),
        ([{"role": "developer", "content": [image()]}], "messages[0].content[0].type", "with role 'user'"),
        (
            [{"role": "tool", "tool_call_id": "c1", "content": [text("x"), image()]}],
            "messages[0].content[1].type",
            "with role 'user'",
        ),
        ([user(name=1)], "messages[0].name", "must be a string"),
        ([user(tool_call_id="c1")], "messages[0].tool_call_id", "not supported"),
        ([user(weight=1)], "messages[0].weight", "role 'user' takes content, name, role"),
        ([user(**{"\ud800": 1})], "messages[0].\\ud800", "not supported"),
        ([{"role": "assistant", "content": "no", "refusal": "no"}], "messages[0].refusal", "not supported"),
        ([{"role": "tool", "content": "42"}], "messages[0].tool_call_id", "is required with role 'tool'"),
        ([user(tool_calls=[call()])], "messages[0].tool_calls", "role 'user' takes"),
        ([user(reasoning_content="hm")], "messages[0].reasoning_content", "not supported"),
        ([user(function_call={"name": "f"})], "messages[0].function_call", "send 'tool_calls'"),
        ([calls({})], "messages[0].tool_calls", "must be a list of calls, not an object"),
        ([calls([])], "messages[0].content", "is required"),
        ([calls(["f"])], "messages[0].tool_calls[0]", "not a string"),
        ([calls([call(), {"id": "c1"}])], "messages[0].tool_calls[1].function", "is required"),
        ([calls([call(id=None)])], "messages[0].tool_calls[0].id", "is required"),
        ([calls([call(type="custom")])], "messages[0].tool_calls[0].type", "not 'custom'"),
        ([calls([call(at=0)])], "messages[0].tool_calls[0].at", "takes id, type, function"),
        ([calls([call(function={})])], "messages[0].tool_calls[0].function.name", "is required"),
        ([calls([call(function={"name": 1})])], "messages[0].tool_calls[0].function.name", "a string"),
        ([calls([call({"a": 1})])], ARGUMENTS, "a string that holds a JSON object, not an object"),
        ([calls([call('{"a": ')])], ARGUMENTS, "not valid JSON"),
        ([calls([call("[1]")])], ARGUMENTS, "must hold a JSON object, not a list"),
        ([calls([call("[" * 100_000)])], ARGUMENTS, "nested too deeply"),
        ([calls([call('{"a": NaN}')])], ARGUMENTS, "not valid JSON"),
        ([calls([call('{"a": "\\ud800"}')])], ARGUMENTS, "not valid Unicode"),
    ],
)
def test_a_refusal_names_its_place(messages, param, problem):
    with pytest.raises(StageError) as refused:
        parse_messages(messages)
    assert refused.value.param == param
    assert problem in refused.value.message
    assert StageError.from_text(refused.value.to_json(), stage="preprocess").param == param
    refused.value.message.encode()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not valid JSON"),
        ("[", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff", "not valid Unicode"),
        ("\ud800", "not valid Unicode"),
        (json.dumps([user()]).encode("utf-16"), "not valid Unicode"),
        ("[" + "9" * 10_000 + "]", "not"),
    ],
)
def test_the_tensor_must_be_json_in_utf8(text, problem):
    with pytest.raises(StageError, match=problem) as refused:
        load_messages(text)
    assert str(refused.value.param).startswith("messages")


def test_the_tensor_as_bytes_and_as_str():
    text = json.dumps([user("日本 😀")])
    assert load_messages(text) == load_messages(text.encode()) == [user("日本 😀")]


def test_utf8_names_its_parameter():
    assert utf8("é".encode(), "prompt") == "é"
    with pytest.raises(StageError) as refused:
        utf8(b"\xc3", "prompt")
    assert refused.value.param == "prompt"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "role",
        "content",
        "name",
        "type",
        "text",
        "image_url",
        "url",
        "detail",
        "tool_call_id",
        "tool_calls",
        "id",
        "function",
        "arguments",
    ]
)
WORDS = st.sampled_from(
    ["user", "assistant", "tool", "developer", "text", "function", "hi", "{}", "\ud800", "image_url", "low"]
)
NEARLY = st.recursive(
    WORDS | JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(JSON | st.lists(NEARLY) | st.lists(st.fixed_dictionaries({"role": WORDS, "content": NEARLY})))
def test_any_json_is_parsed_for_good_or_refused(value):
    try:
        messages = parse_messages(value)
    except StageError as error:
        refused = error
    else:
        assert parse_messages(messages) == messages
        for message in messages:
            if isinstance(message["content"], list):
                assert any(part["type"] == "image_url" for part in message["content"])
            else:
                assert isinstance(message["content"], str) or message["tool_calls"]
            assert all(isinstance(item, str) for key, item in message.items() if key not in ("content", "tool_calls"))
            for made in message.get("tool_calls", []):
                assert isinstance(json.loads(made["function"]["arguments"]), dict)
        assert all(part.url for part in image_parts(messages))
        return
    assert str(refused.param).startswith("messages")
    refused.to_json().encode()


def test_the_gateway_pays_for_no_tokenizer():
    code = "import sys, pipelines.messages; print({'tokenizers', 'jinja2', 'numpy', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
