"""The OpenAI protocol, against the words and the examples of OpenAI's API reference."""

import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import objects, parameters, protocol
from gateway.backend import Delta
from gateway.choices import Choice
from gateway.objects import Head
from gateway.protocol import CHAT, COMPLETION, parse_request
from pipelines.errors import StageError
from pipelines.logprobs import Entry
from pipelines.tools import load_tools

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
    (prompt,) = request.prompts
    messages = json.loads(prompt["messages"])
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
    assert request.prompts == [{"text": "Say this is a test"}]
    assert (request.sampling.max_tokens, request.sampling.temperature) == (7, 0.0)


def test_max_tokens_defaults():
    """API reference: completions' max_tokens "Defaults to 16"; a chat goes on to the end of its context."""
    assert completion().sampling.max_tokens == 16
    assert completion(max_tokens=None).sampling.max_tokens == 16
    assert chat().sampling.max_tokens is None
    assert chat(max_completion_tokens=5).sampling.max_tokens == 5


SAMPLING = {
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 7,
    "stop": ["a", "b"],
    "presence_penalty": 1.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"17": -100},
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "min_tokens": 2,
    "ignore_eos": True,
    "response_format": {"type": "json_object"},
}


def test_every_parameter_is_honoured():
    for make in (chat, completion):
        request = make(
            **SAMPLING,
            n=3,
            priority=-5,
            stream=True,
            stream_options={"include_usage": True},
            user="u1",
            metadata={"team": "blue"},
        )
        told = json.loads(request.sampling.to_json())
        assert {name: told[name] for name in SAMPLING} == SAMPLING
        assert (request.n, request.priority, request.stream, request.include_usage) == (3, -5, True, True)
        assert (request.user, request.metadata) == ("u1", {"team": "blue"})


def test_log_probabilities_have_one_shape_behind_both_endpoints():
    """OpenAI: a chat's `logprobs` is a boolean and `top_logprobs` 0 to 20; a completion's is a number, 0 to 5."""
    for request, wanted in (
        (chat(), (False, 0)),
        (chat(logprobs=False), (False, 0)),
        (chat(logprobs=True), (True, 0)),
        (chat(logprobs=True, top_logprobs=20), (True, 20)),
        (completion(), (False, 0)),
        (completion(logprobs=0), (True, 0)),
        (completion(logprobs=5), (True, 5)),
    ):
        assert (request.sampling.logprobs, request.sampling.top_logprobs) == wanted


def test_the_choices_are_in_the_order_of_their_prompts_and_each_has_its_seed():
    request = completion(prompt=["a", [1, 2]], n=2, seed=7)
    assert [(inputs, sampling.seed) for inputs, sampling in request.asked()] == [
        ({"text": "a"}, 7),
        ({"text": "a"}, 8),
        ({"text_ids": [1, 2]}, 7),
        ({"text_ids": [1, 2]}, 8),
    ]
    assert [sampling.seed for _, sampling in chat(n=2).asked()] == [None, None]
    assert [sampling.seed for _, sampling in chat(n=2, seed=2**63 - 1).asked()] == [2**63 - 1, -(2**63)]


def test_a_request_has_so_many_choices_at_most():
    body = {"model": "m", "prompt": ["a", "b"]}
    assert parse_request(COMPLETION, orjson.dumps({**body, "n": 2}), max_choices=4).choices == 4
    for fields, param in (({"n": 3}, "n"), ({"prompt": ["a"] * 5}, "prompt")):
        with pytest.raises(StageError) as caught:
            parse_request(COMPLETION, orjson.dumps({**body, **fields}), max_choices=4)
        assert caught.value.param == param
        assert "4" in caught.value.message


# The API reference's parameters that are not honoured here: of chats, of completions.
UNSUPPORTED_CHAT = {
    "audio": {},
    "function_call": "none",
    "functions": [],
    "prediction": {},
    "prompt_cache_key": "",
    "reasoning_effort": "low",
    "safety_identifier": "",
    "verbosity": "low",
    "web_search_options": {},
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "prompt_logprobs": 1,
    "unheard_of": True,
}
UNSUPPORTED_COMPLETION = {"suffix": "", "top_logprobs": 0, "tools": [], "modalities": ["text"], "unheard_of": True}


@pytest.mark.parametrize(
    ("operation", "name", "value"),
    [(CHAT, *item) for item in UNSUPPORTED_CHAT.items()]
    + [(COMPLETION, *item) for item in UNSUPPORTED_COMPLETION.items()],
)
def test_an_unsupported_parameter_is_refused_by_name(operation, name, value):
    body = {"model": "m", "messages": HELLO} if operation is CHAT else {"model": "m", "prompt": "x"}
    error = refusal(operation, {**body, name: value})
    assert (error.code, error.param) == ("unsupported_parameter", name)
    assert name in error.message
    parse_request(operation, orjson.dumps({**body, name: None}))  # a null is a parameter not given


def test_flex_is_for_what_is_not_urgent():
    body = {"model": "m", "messages": HELLO}
    assert parse_request(CHAT, orjson.dumps({**body, "service_tier": "flex"})).batch
    assert not parse_request(CHAT, orjson.dumps(body)).batch


def test_keep_alive_is_a_number_of_seconds():
    body = {"model": "m", "messages": HELLO}
    assert parse_request(CHAT, orjson.dumps({**body, "keep_alive": 0})).keep_alive == 0
    assert parse_request(CHAT, orjson.dumps(body)).keep_alive is None
    for bad in (-1, 0.5, "5m", True):
        assert refusal(CHAT, {**body, "keep_alive": bad}).param == "keep_alive"


@pytest.mark.parametrize(
    ("operation", "name", "harmless", "refused"),
    [
        (CHAT, "store", [False], [True, 0]),
        (CHAT, "service_tier", ["auto", "default"], ["priority", 1]),
        (CHAT, "modalities", [["text"]], [["text", "audio"], []]),
        (COMPLETION, "best_of", [1], [2, True]),
        (COMPLETION, "echo", [False], [True]),
        (COMPLETION, "store", [False], [True]),
    ],
)
def test_a_parameter_is_taken_with_the_values_that_change_nothing(operation, name, harmless, refused):
    body = {"model": "m", "messages": HELLO} if operation is CHAT else {"model": "m", "prompt": "x"}
    plain = parse_request(operation, orjson.dumps(body))
    assert all(parse_request(operation, orjson.dumps({**body, name: value})) == plain for value in harmless)
    for value in refused:
        error = refusal(operation, {**body, name: value})
        assert (error.code, error.param) == ("unsupported_parameter", name)
        assert orjson.dumps(harmless[0]).decode() in error.message


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
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"include_timing": 1}}, "stream_options.include_timing"),
        ({"stream": True, "stream_options": {"include_timings": True}}, "stream_options.include_timings"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"priority": 1.5}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_k": 0.5}, "top_k"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format"),
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


@pytest.mark.parametrize("value", [True, False, 6, -1, "2"])
def test_a_completions_logprobs_are_a_small_number(value):
    assert refusal(COMPLETION, {"model": "m", "prompt": "x", "logprobs": value}).param == "logprobs"


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], 7, {}, [1, "a"], ["a", 1], [1.5], [-1], [True], [[1, "a"]], [[[1]]]]
)
def test_what_is_no_prompt(prompt):
    assert refusal(COMPLETION, {"model": "m", "prompt": prompt}).param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [{"text": ""}]),
        (["only"], [{"text": "only"}]),
        (["a", "b"], [{"text": "a"}, {"text": "b"}]),
        ([5, 6], [{"text_ids": [5, 6]}]),
        ([[5, 6], [7]], [{"text_ids": [5, 6]}, {"text_ids": [7]}]),
    ],
)
def test_the_four_kinds_of_prompt(prompt, prompts):
    """API reference, prompt: "a string, array of strings, array of tokens, or array of token arrays"."""
    assert completion(prompt=prompt).prompts == prompts


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
    assert not parameters.deeper_than([[]], 2)
    assert parameters.deeper_than([[[]]], 2)
    wide = orjson.dumps({"a": [[]] * 1000})
    assert parameters.parse_object(wide)


def test_a_long_word_of_the_client_is_not_repeated_whole():
    error = refusal(CHAT, {"model": "m", "messages": HELLO, "x" * 10_000: 1})
    assert len(error.message) < 200
    assert len(error.param) < 200


def told(operation, *deltas, logprobs=False):
    """The one choice of a whole answer."""
    choice = Choice(operation, 0)
    for delta in deltas:
        choice.keep(delta)
    return choice.whole(deltas[-1].finish_reason, logprobs=logprobs)


def test_the_reference_chat_response():
    """API reference, "The chat completion object"; no system_fingerprint is claimed."""
    head = Head("chatcmpl-123", "chat.completion", 1694268190, "gpt-4o-mini")
    choice = told(CHAT, Delta(["\n\nHello there, how may ", "I assist you today?"], "stop"))
    assert objects.whole_response(head, [choice], objects.usage(9, 12, 4)) == {
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
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 12,
            "total_tokens": 21,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_the_reference_completion_response():
    """API reference, "The completion object"."""
    head = Head("cmpl-uqkvlQyYK7bGYrRHQ0eXlWi7", "text_completion", 1589478378, "VAR_completion_model_id")
    choice = told(COMPLETION, Delta(["\n\nThis is indeed a test"], "length"))
    response = objects.whole_response(head, [choice], objects.usage(5, 7, 0))
    assert response["usage"].pop("prompt_tokens_details") == {"cached_tokens": 0}
    assert response == {
        "id": "cmpl-uqkvlQyYK7bGYrRHQ0eXlWi7",
        "object": "text_completion",
        "created": 1589478378,
        "model": "VAR_completion_model_id",
        "choices": [{"text": "\n\nThis is indeed a test", "index": 0, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
    }


HELLO_ENTRY = Entry("Hello", [72, 101, 108, 108, 111], -0.31725305, [("Hello", [72, 101, 108, 108, 111], -0.31725305)])
HALF, OTHER_HALF = (
    Entry("\\xc3", [0xC3], -1.0, [("\\xc3", [0xC3], -1.0), ("<end>", None, -9999.0)]),
    Entry("\\xa9", [0xA9], -2.0, []),
)


def test_the_reference_chat_logprobs():
    """API reference, "Create chat completion", the logprobs example: an entry and its alternatives."""
    choice = told(CHAT, Delta(["Hello"], "stop", logprobs=[[HELLO_ENTRY]]), logprobs=True)
    token = {"token": "Hello", "logprob": -0.31725305, "bytes": [72, 101, 108, 108, 111]}
    assert choice["logprobs"] == {"content": [{**token, "top_logprobs": [token]}], "refusal": None}


def test_the_older_logprobs_are_lists_side_by_side():
    """Where a token begins counts from the choice's text; one that is half a character begins where that does."""
    deltas = [Delta(["Hello"], logprobs=[[HELLO_ENTRY]]), Delta(["é"], logprobs=[[HALF, OTHER_HALF]])]
    choice = told(COMPLETION, *deltas, Delta([" Hello"], "stop", logprobs=[[HELLO_ENTRY]]), logprobs=True)
    assert choice["logprobs"] == {
        "tokens": ["Hello", "bytes:\\xc3", "bytes:\\xa9", "Hello"],
        "token_logprobs": [-0.31725305, -1.0, -2.0, -0.31725305],
        "top_logprobs": [{"Hello": -0.31725305}, {"bytes:\\xc3": -1.0, "<end>": -9999.0}, {}, {"Hello": -0.31725305}],
        "text_offset": [0, 5, 5, 6],
    }


def test_an_answer_without_a_token_has_logprobs_all_the_same():
    assert told(CHAT, Delta([], "stop"), logprobs=True)["logprobs"] == {"content": [], "refusal": None}
    assert told(COMPLETION, Delta([], "stop"), logprobs=True)["logprobs"]["tokens"] == []


def test_the_reference_chunks():
    """API reference, "The chat completion chunk object": the first, a middle and the last chunk."""
    chunks = Head("chatcmpl-123", "chat.completion.chunk", 1694268190, "gpt-4o-mini")
    first = objects.chunk(chunks, 0, CHAT.opening)
    middle = objects.chunk(chunks, 0, CHAT.piece("Hello"))
    last = objects.chunk(chunks, 1, CHAT.closing, finish_reason="stop")
    head = '"id":"chatcmpl-123","object":"chat.completion.chunk","created":1694268190,"model":"gpt-4o-mini"'
    choices = [
        '[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]',
        '[{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}]',
        '[{"index":1,"delta":{},"logprobs":null,"finish_reason":"stop"}]',
    ]
    for chunk, choice in zip((first, middle, last), choices, strict=True):
        assert orjson.dumps(chunk).decode() == f'{{{head},"choices":{choice}}}'


def test_the_usage_chunk():
    """stream_options.include_usage: "the `choices` field will always be an empty array. All other chunks will
    also include a `usage` field, but with a null value."""
    head = Head("chatcmpl-123", "chat.completion.chunk", 1694268190, "gpt-4o-mini")
    assert objects.chunk(head, 0, CHAT.opening, usage_null=True)["usage"] is None
    last = objects.usage_chunk(head, objects.usage(1, 2, 0))
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 3


def test_ids_differ_and_say_what_they_are():
    ids = {protocol.new_head(CHAT, "m", stream=True).id for _ in range(100)}
    assert len(ids) == 100
    assert all(id.startswith("chatcmpl-") for id in ids)
    assert protocol.new_head(COMPLETION, "m", stream=False).id.startswith("cmpl-")


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


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_tools_go_with_every_choice_and_stay_with_the_request():
    request = chat(tools=[WEATHER], tool_choice="required", n=2)
    assert request.tools is not None
    assert request.tools.forced
    sent = [inputs["tools"] for inputs, _ in request.asked()]
    assert [load_tools(str(tools)) for tools in sent] == [request.tools, request.tools]


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_tools_that_cannot_be_called_are_not_sent(fields):
    request = chat(**fields)
    assert [list(inputs) for inputs, _ in request.asked()] == [["messages"]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [WEATHER], "tool_choice": "some"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)
def test_bad_tools_are_named(fields, param):
    with pytest.raises(StageError) as refused:
        chat(**fields)
    assert refused.value.param == param
