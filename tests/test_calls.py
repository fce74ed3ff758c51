"""Calls and reasoning at HTTP: a choice that is read, over real sockets, and as the official client sees it."""

import dataclasses
import json

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backend import Delta
from gateway.choices import ParsedChoice
from gateway.formats import Formats
from gateway.objects import message_delta
from gateway.protocol import CHAT
from gateway.settings import Settings
from pipelines.answer.deltas import Arguments, Call, Content, Reasoning
from pipelines.answer.formats import AnswerFormat
from pipelines.logprobs import Entry
from pipelines.pipeline import Pipeline
from pipelines.tools import parse_tools
from tests.scripted import ACCEPTED, HELLO, MODEL, ScriptedBackend, Server

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASKED = {**HELLO, "tools": [WEATHER]}
TEXTS = ["I look.\n<tool", '_call>\n{"name": "weather", "argu', 'ments": {"city": "Ro', 'me"}}\n</tool_call>']
ANSWER = [ACCEPTED, *(Delta([text]) for text in TEXTS), Delta([], "stop", 3, 12)]
TOOLS = parse_tools({"tools": [WEATHER]})
THINKING = AnswerFormat(think=("<think>", "</think>"))


def choice(form: AnswerFormat = THINKING) -> ParsedChoice:
    parser = form.parser(TOOLS)
    assert parser is not None
    return ParsedChoice(CHAT, 0, parser)


@pytest.fixture(scope="module")
def server():
    with Server(ScriptedBackend(), Settings()) as running:
        running.backend.steps = ANSWER
        yield running


def test_a_call_in_a_whole_answer(server):
    answer = server.post(CHAT.path, ASKED).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    (call,) = answer["message"].pop("tool_calls")
    assert answer["message"] == {"role": "assistant", "content": "I look.", "refusal": None}
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


def test_content_is_null_where_there_is_none_but_calls(server):
    server.backend.each = [[ACCEPTED, Delta(["".join(TEXTS).removeprefix("I look.\n")], "stop", 3, 12)]]
    message = server.post(CHAT.path, ASKED).json()["choices"][0]["message"]
    assert message["content"] is None
    assert len(message["tool_calls"]) == 1


def test_a_call_in_a_stream(server):
    lines = server.post(CHAT.path, {**ASKED, "stream": True}).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    deltas = [choice["delta"] for choice in choices]
    assert deltas[:2] == [{"role": "assistant", "content": ""}, {"content": "I look."}]
    (begun,) = deltas[2]["tool_calls"]
    assert begun.pop("id").startswith("call_")
    assert begun == {"index": 0, "type": "function", "function": {"name": "weather", "arguments": ""}}
    pieces = [delta["tool_calls"] for delta in deltas[3:-1]]
    assert pieces == [
        [{"index": 0, "function": {"arguments": '{"city": "Ro'}}],
        [{"index": 0, "function": {"arguments": 'me"}'}}],
    ]
    assert deltas[-1] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]


def test_without_tools_the_same_text_is_content(server):
    for body in (HELLO, {**ASKED, "tool_choice": "none"}):
        answer = server.post(CHAT.path, body).json()["choices"][0]
        assert answer["message"]["content"] == "".join(TEXTS)
        assert answer["finish_reason"] == "stop"


def test_the_official_client_understands(server):
    client = server.client()
    whole = client.chat.completions.create(model=MODEL, messages=HELLO["messages"], tools=[WEATHER])
    (call,) = whole.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    with client.chat.completions.stream(model=MODEL, messages=HELLO["messages"], tools=[WEATHER]) as stream:
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls
    assert (streamed.function.name, streamed.function.arguments) == ("weather", '{"city": "Rome"}')
    assert final.choices[0].finish_reason == "tool_calls"


def test_each_choice_has_its_own_calls(server):
    server.backend.each = [ANSWER, [ACCEPTED, Delta(["No."], "stop", 3, 2)]]
    answer = server.post(CHAT.path, {**ASKED, "n": 2}).json()
    reasons = {one["index"]: one["finish_reason"] for one in answer["choices"]}
    assert reasons == {0: "tool_calls", 1: "stop"}
    assert answer["choices"][1]["message"] == {"role": "assistant", "content": "No.", "refusal": None}


def test_what_the_client_sends_back_is_taken(server):
    call = server.post(CHAT.path, ASKED).json()["choices"][0]["message"]
    chat = [*HELLO["messages"], call, {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "sunny"}]
    assert server.post(CHAT.path, {**ASKED, "messages": chat}).status_code == 200
    sent = json.loads(server.backend.submissions[-1].inputs["messages"])
    assert sent[-2]["tool_calls"] == call["tool_calls"]


def test_what_the_official_clients_stream_adds_up_to_may_be_sent_back(server):
    client = server.client()
    with client.chat.completions.stream(model=MODEL, messages=HELLO["messages"], tools=[WEATHER]) as stream:
        message = stream.get_final_completion().choices[0].message
    for said in (message, message.model_dump()):
        client.chat.completions.create(model=MODEL, messages=[*HELLO["messages"], said], tools=[WEATHER])
        (call,) = json.loads(server.backend.submissions[-1].inputs["messages"])[-1]["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}


def test_a_refusal_names_the_place(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=HELLO["messages"], tools=[{"type": "function"}])
    assert refused.value.param == "tools[0].function"


# --- one choice


def test_reasoning_is_its_own():
    one = choice()
    one.keep(Delta(["<think>\nHm", ".</think>"]))
    one.keep(Delta(["\n\nYes."], "stop"))
    message = one.whole("stop", logprobs=False)["message"]
    assert message == {"role": "assistant", "content": "Yes.", "refusal": None, "reasoning_content": "Hm."}
    streamed = choice()
    pieces = [*streamed.push(Delta(["<think>\nHm", ".</think>"])), *streamed.push(Delta(["\n\nYes."], "stop"))]
    assert pieces == [{"delta": {"reasoning_content": "Hm"}}, {"delta": {"reasoning_content": "."}}, "Yes."]


@pytest.mark.parametrize(
    ("engines", "wanted"), [("stop", "tool_calls"), ("length", "length"), ("cancelled", "cancelled")]
)
def test_a_cut_answer_stays_cut(engines, wanted):
    one = choice()
    one.keep(Delta(TEXTS, engines))
    assert one.finish_reason(engines) == wanted


def entry(text: str) -> Entry:
    return Entry(text, list(text.encode()), -0.5, [])


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.sampled_from([*TEXTS, "<think>", "</think>", " ", "x", "", "<"]), max_size=8))
def test_every_entry_goes_out_once_and_in_order(texts):
    """A text that waits keeps its entries until something comes of it."""
    one, pieces = choice(), []
    for text in texts:
        pieces += one.push(Delta([text], logprobs=[[entry(text)] if text else []]))
    pieces += one.push(Delta([], "stop"))
    held = [piece for piece in pieces if not isinstance(piece, str)]
    told = [entry["token"] for piece in held if "logprobs" in piece for entry in piece["logprobs"]["content"]]
    assert told == [text for text in texts if text]
    whole = choice()
    for text in texts:
        whole.keep(Delta([text], logprobs=[[entry(text)] if text else []]))
    whole.keep(Delta([], "stop"))
    entries = whole.whole("stop", logprobs=True)["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == told


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (Content("a"), {"content": "a"}),
        (Reasoning("a"), {"reasoning_content": "a"}),
        (Arguments(1, "a"), {"tool_calls": [{"index": 1, "function": {"arguments": "a"}}]}),
    ],
)
def test_a_piece_of_a_message(said, wanted):
    assert message_delta(said) == wanted


def test_formats_are_read_once_and_a_broken_one_is_plain_text(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    thinker, broken = (Pipeline(name=name, source=f"path:{name}") for name in ("thinker", "broken"))
    for pipeline, template in ((thinker, "{{ tools }}<tool_call></think>"), (broken, "{% if %}")):
        pipeline.home.mkdir(parents=True)
        (pipeline.home / "chat_template.jinja").write_text(template)
    formats = Formats()
    assert formats.of(thinker).think == ("<think>", "</think>")
    assert formats.of(thinker) is formats.of(thinker)
    assert formats.of(broken) == AnswerFormat()
    (thinker.home / "chat_template.jinja").write_text("{{ tools }}")
    assert formats.of(thinker).think == ("<think>", "</think>")
    assert formats.of(dataclasses.replace(thinker, context=64)) is not formats.of(thinker)  # another version


# --- through the real Triton


NAMED = {"type": "function", "function": {"name": "weather"}}
FORCED = {"model": "smollm2-135m-instruct", "messages": HELLO["messages"], "tools": [WEATHER], "tool_choice": NAMED}


def test_a_forced_call_through_the_whole_stack(product):
    client = openai.OpenAI(base_url=f"{product.url}/v1", api_key="none", max_retries=0, timeout=120)
    whole = client.chat.completions.create(**FORCED, max_tokens=100, seed=1)
    (call,) = whole.choices[0].message.tool_calls
    assert (whole.choices[0].finish_reason, whole.choices[0].message.content) == ("tool_calls", None)
    assert list(json.loads(call.function.arguments)) == ["city"]
    with client.chat.completions.stream(**FORCED, max_tokens=100, seed=1) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert list(json.loads(streamed.function.arguments)) == ["city"]


def test_the_tools_tensor_of_direct_users(product):
    offer = {"tools": [WEATHER], "tool_choice": NAMED}
    sampling = json.dumps({"max_tokens": 100, "seed": 1})
    inputs = {"messages": json.dumps(HELLO["messages"]), "tools": json.dumps(offer), "sampling": sampling}
    text, reason = product.infer("ensemble", inputs)
    assert reason == "stop"
    parser = AnswerFormat().parser(parse_tools(offer))
    assert parser is not None
    kinds = [type(delta) for delta in parser.push(text) + parser.finish()]
    assert kinds == [Call, Arguments]
