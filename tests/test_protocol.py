"""The OpenAI protocol, against the words and the examples of OpenAI's API reference."""

import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import protocol
from gateway.protocol import CHAT, COMPLETION, Head, parse_request
from pipelines.errors import StageError

HELLO = [{"role": "user", "content": "Hello!"}]


def chat(**fields):
    return parse_request(CHAT, orjson.dumps({"model": "m", "messages": HELLO, **fields}))


def completion(**fields):
    return parse_request(COMPLETION, orjson.dumps({"model": "m", "prompt": "Say this is a test", **fields}))


def refusal(operation, body):
    with pytest.raises(StageError) as caught:
        parse_request(operation, body if isinstance(body, bytes) else orjson.dumps(body))
    return caught.value


def test_the_reference_chat_request():
    """API reference, "Create chat completion", the default example's body."""
    request = parse_request(
        CHAT,
        b"""{
    "model": "VAR_chat_model_id",
    "messages": [
      {
        "role": "developer",
        "content": "You are a helpful assistant."
      },
      {
        "role": "user",
        "content": "Hello!"
      }
    ]
  }""",
    )
    assert request.model == "VAR_chat_model_id"
    assert not request.stream
    assert request.sampling.max_tokens is None
    messages = json.loads(request.inputs["messages"])
    assert [message["content"] for message in messages] == ["You are a helpful assistant.", "Hello!"]


def test_the_reference_completion_request():
    """API reference, "Create completion", the no-streaming example's body."""
    request = parse_request(
        COMPLETION,
        b"""{
    "model": "VAR_completion_model_id",
    "prompt": "Say this is a test",
    "max_tokens": 7,
    "temperature": 0
  }""",
    )
    assert request.inputs == {"text": "Say this is a test"}
    assert (request.sampling.max_tokens, request.sampling.temperature) == (7, 0.0)


def test_max_tokens_defaults():
    """API reference: completions' max_tokens "Defaults to 16"; a chat goes on to the end of its context."""
    assert completion().sampling.max_tokens == 16
    assert completion(max_tokens=None).sampling.max_tokens == 16
    assert chat().sampling.max_tokens is None
    assert chat(max_completion_tokens=5).sampling.max_tokens == 5


def test_every_parameter_is_honoured():
    request = chat(
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
        user="u1",
        metadata={"team": "blue"},
    )
    assert json.loads(request.sampling.to_json()) == {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["a", "b"],
    }
    assert (request.stream, request.include_usage) == (True, True)
    assert (request.user, request.metadata) == ("u1", {"team": "blue"})


# The API reference's parameters, of both endpoints, that are not honoured here, each with a harmless value.
UNSUPPORTED = {
    "audio": {},
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "prediction": {},
    "presence_penalty": 0,
    "prompt_cache_key": "",
    "reasoning_effort": "low",
    "response_format": {"type": "text"},
    "safety_identifier": "",
    "service_tier": "auto",
    "store": False,
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
    "verbosity": "low",
    "web_search_options": {},
    "top_k": 50,
    "unheard_of": True,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("operation", [CHAT, COMPLETION], ids=lambda operation: operation.name)
def test_an_unsupported_parameter_is_refused_by_name(operation, name):
    body = {"model": "m", "messages": HELLO} if operation is CHAT else {"model": "m", "prompt": "x"}
    error = refusal(operation, {**body, name: UNSUPPORTED[name]})
    assert (error.code, error.param) == ("unsupported_parameter", name)
    assert name in error.message
    parse_request(operation, orjson.dumps({**body, name: None}))  # a null is a parameter not given


def test_each_endpoint_has_its_own_input():
    assert refusal(CHAT, {"model": "m", "messages": HELLO, "prompt": "x"}).param == "prompt"
    assert refusal(COMPLETION, {"model": "m", "prompt": "x", "messages": HELLO}).param == "messages"
    error = refusal(COMPLETION, {"model": "m", "prompt": "x", "max_completion_tokens": 1})
    assert (error.code, error.param) == ("unsupported_parameter", "max_completion_tokens")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"max_completion_tokens": True}, "max_completion_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": False, "stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": False}},
            "stream_options.include_obfuscation",
        ),
        ({"user": 1}, "user"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(key): "" for key in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
    ],
)
def test_a_bad_value_names_its_parameter(fields, param):
    error = refusal(CHAT, {"model": "m", "messages": HELLO, **fields})
    assert error.param == param
    assert param.rpartition(".")[2] in error.message


@pytest.mark.parametrize("prompt", [None, [], ["a", "b"], [1, 2], [[1, 2]], 7, {}])
def test_a_prompt_is_one_string(prompt):
    assert refusal(COMPLETION, {"model": "m", "prompt": prompt}).param == "prompt"


def test_a_prompt_in_a_list():
    assert completion(prompt=["only"]).inputs == {"text": "only"}
    assert completion(prompt="").inputs == {"text": ""}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model":"\xff"}',
        b'{"model":NaN}',
        b'{"model":"\\ud800"}',
    ],
)
def test_a_body_that_is_no_json_object(body):
    error = refusal(CHAT, body)
    assert error.code == "invalid_request"
    assert "JSON" in error.message


@pytest.mark.parametrize("depth", [101, 1000, 100_000])
def test_a_deep_body_is_refused(depth):
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        filling = b"1" if opening != b"[" else b""
        body = b'{"model":"m","messages":' + opening * depth + filling + closing * depth + b"}"
        assert refusal(CHAT, body).code == "invalid_request"


def test_the_depth_limit_is_exact():
    assert not protocol._deeper_than([[]], 2)
    assert protocol._deeper_than([[[]]], 2)
    wide = orjson.dumps({"a": [[]] * 1000})
    assert protocol.parse_object(wide)


def test_a_long_word_of_the_client_is_not_repeated_whole():
    error = refusal(CHAT, {"model": "m", "messages": HELLO, "x" * 10_000: 1})
    assert len(error.message) < 200
    assert len(error.param) < 200


HEAD = Head("chatcmpl-123", 1694268190, "gpt-4o-mini")


def test_the_reference_chat_response():
    """API reference, "The chat completion object"; no system_fingerprint is claimed."""
    response = protocol.whole_response(
        CHAT, HEAD, "\n\nHello there, how may I assist you today?", "stop", protocol.usage(9, 12)
    )
    assert response == {
        "id": "chatcmpl-123",
        "object": "chat.completion",
        "created": 1694268190,
        "model": "gpt-4o-mini",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "\n\nHello there, how may I assist you today?",
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21},
    }


def test_the_reference_completion_response():
    """API reference, "The completion object"."""
    head = Head("cmpl-uqkvlQyYK7bGYrRHQ0eXlWi7", 1589478378, "VAR_completion_model_id")
    response = protocol.whole_response(COMPLETION, head, "\n\nThis is indeed a test", "length", protocol.usage(5, 7))
    assert response == {
        "id": "cmpl-uqkvlQyYK7bGYrRHQ0eXlWi7",
        "object": "text_completion",
        "created": 1589478378,
        "model": "VAR_completion_model_id",
        "choices": [{"text": "\n\nThis is indeed a test", "index": 0, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
    }


def test_the_reference_chunks():
    """API reference, "The chat completion chunk object": the first, a middle and the last chunk."""
    first = protocol.chunk(CHAT, HEAD, CHAT.opening)
    middle = protocol.chunk(CHAT, HEAD, CHAT.piece("Hello"))
    last = protocol.chunk(CHAT, HEAD, CHAT.closing, finish_reason="stop")
    head = '"id":"chatcmpl-123","object":"chat.completion.chunk","created":1694268190,"model":"gpt-4o-mini"'
    choices = [
        '[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]',
        '[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}]',
        '[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]',
    ]
    for chunk, choice in zip((first, middle, last), choices, strict=True):
        assert orjson.dumps(chunk).decode() == f'{{{head},"choices":{choice}}}'


def test_the_usage_chunk():
    """stream_options.include_usage: "the `choices` field will always be an empty array. All other chunks will
    also include a `usage` field, but with a null value."""
    assert protocol.chunk(CHAT, HEAD, CHAT.opening, usage_null=True)["usage"] is None
    last = protocol.usage_chunk(CHAT, HEAD, protocol.usage(1, 2))
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def test_ids_differ_and_say_what_they_are():
    ids = {protocol.new_head(CHAT, "m").id for _ in range(100)}
    assert len(ids) == 100
    assert all(id.startswith("chatcmpl-") for id in ids)
    assert protocol.new_head(COMPLETION, "m").id.startswith("cmpl-")


def outcome(operation, body):
    try:
        parse_request(operation, body)
    except StageError as error:
        return error.code
    return "parsed"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.dictionaries(
    st.sampled_from(sorted(CHAT.parameters | COMPLETION.parameters | {"n"})) | st.text(max_size=8),
    json_values,
)


@given(body=fields | json_values, operation=st.sampled_from([CHAT, COMPLETION]))
@settings(max_examples=200, deadline=None)
def test_any_json_is_a_request_or_a_stage_error(body, operation):
    assert outcome(operation, orjson.dumps(body)) in ("parsed", "invalid_request", "unsupported_parameter")


@given(body=st.binary(max_size=60), operation=st.sampled_from([CHAT, COMPLETION]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_request_or_a_stage_error(body, operation):
    assert outcome(operation, body) == "invalid_request"
