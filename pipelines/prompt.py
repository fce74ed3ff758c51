"""A chat with tools as its template takes it: in the shape templates expect, or, where one knows no tools, in words.

Templates follow transformers' convention, which differs from OpenAI's in that arguments are objects. What becomes of
pictures among the words is in `parts.py`. Knows neither Jinja nor tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines import parts
from pipelines.answer.formats import AnswerFormat
from pipelines.errors import StageError
from pipelines.template import ChatTemplate
from pipelines.tools import Function, Tools

Message = dict[str, Any]

_ASKS_FOR_NONE = re.compile(r"\bcontent('\]|\"\])? is (not )?none")
_ASKS_FOR_NINE = re.compile(r"length\s*!=\s*9")  # Mistral's templates take ids of nine letters and digits only
_NINE = re.compile(r"[a-zA-Z0-9]{9}")

_OFFER = """You can call functions to help the user. Each line between <tools> and </tools> describes one in JSON:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as one JSON object between tags, like this:
<tool_call>
{{"name": "function_name", "arguments": {{"argument": "value"}}}}
</tool_call>
Write one pair of tags for each call. The results come back between <tool_response> and </tool_response>. \
Answer in your own words when no function is needed."""
_MUST = " Now you must call {what}."


def render(
    template: ChatTemplate,
    form: AnswerFormat,
    chat: Sequence[Message],
    tools: Tools | None,
    *,
    image_token: str | None = None,
    reserved: Sequence[str] = (),
) -> str:
    """The prompt of a chat, which `messages.parse_messages` made, and of the functions it offers.

    `image_token` is what stands for a picture in it: None if the model sees none, empty if a picture's place is not in
    the prompt. No text may hold what is `reserved`.
    """
    parts.check(chat, reserved)
    functions = tools.callable if tools else ()
    chosen = (template.with_tools if functions else None) or template
    if "developer" not in chosen.source:
        chat = [{**message, "role": "system"} if message["role"] == "developer" else message for message in chat]
    if not form.native:
        return chosen.render(parts.fitted(_in_words(chat, tools, chosen), chosen, image_token))
    shown = [{"type": "function", "function": _described(function)} for function in functions] or None
    chat = parts.fitted(_shaped(chat, chosen.source), chosen, image_token)
    try:
        return chosen.render(chat, shown)
    except StageError as error:
        texts = _with_text_arguments(chat)
        if texts == chat:
            raise
        try:
            return chosen.render(texts, shown)  # a few templates, DeepSeek's first, join arguments as text
        except StageError:
            raise error from None


def _shaped(chat: Sequence[Message], source: str) -> list[Message]:
    nothing = None if _ASKS_FOR_NONE.search(source) else ""
    short = _ASKS_FOR_NINE.search(source) is not None
    names: dict[str, str] = {}  # of the functions called, by the call's id
    shaped: list[Message] = []
    for message in chat:
        message = dict(message)
        if message["content"] is None:
            message["content"] = nothing
        if calls := message.get("tool_calls"):
            names.update((call["id"], call["function"]["name"]) for call in calls)
            message["tool_calls"] = [_call(call, short) for call in calls]
        elif message["role"] == "tool":
            name = names.get(message["tool_call_id"])
            if name and "name" not in message:
                message["name"] = name
            message["tool_call_id"] = _id(message["tool_call_id"], short)
        shaped.append(message)
    return shaped


def _call(call: Mapping[str, Any], short: bool) -> dict[str, Any]:
    function = call["function"]
    arguments = json.loads(function["arguments"])
    return {**call, "id": _id(call["id"], short), "function": {**function, "arguments": arguments}}


def _id(given: str, short: bool) -> str:
    return given if not short or _NINE.fullmatch(given) else hashlib.sha256(given.encode()).hexdigest()[:9]


def _with_text_arguments(chat: Sequence[Message]) -> list[Message]:
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in chat
    ]


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _json(function["arguments"])}}


def _in_words(chat: Sequence[Message], tools: Tools | None, template: ChatTemplate) -> list[Message]:
    """The same chat for a template that knows no tools: offer, calls and results are text of plain messages."""
    told: list[Message] = []
    for message in chat:
        if calls := message.get("tool_calls"):
            written = "\n".join(_written(call["function"]) for call in calls)
            text = parts.joined(message["content"], "\n", written) if message["content"] else written
            told.append({key: value for key, value in message.items() if key != "tool_calls"} | {"content": text})
        elif message["role"] == "tool":
            text = parts.joined("<tool_response>", "\n", message["content"])
            text = parts.joined(text, "\n", "</tool_response>")
            if told and told[-1].get("results"):
                told[-1]["content"] = parts.joined(told[-1]["content"], "\n", text)
            else:
                told.append({"role": "user", "content": text, "results": True})
        else:
            told.append(dict(message))
    for message in told:
        message.pop("results", None)
    if tools and tools.callable:
        _offer(told, _in_offer(tools), template.takes_system)
    return told


def _offer(chat: list[Message], text: str, takes_system: bool) -> None:
    """Into the first message, if it is the one; else into one of its own."""
    role = "system" if takes_system else "user"
    if chat[0]["role"] in (role, "developer"):
        before, after = (chat[0]["content"], text) if takes_system else (text, chat[0]["content"])
        chat[0] = {**chat[0], "content": parts.joined(before, "\n\n", after)}
    else:
        chat.insert(0, {"role": role, "content": text})


def _in_offer(tools: Tools) -> str:
    text = _OFFER.format(tools="\n".join(_json(_described(function)) for function in tools.callable))
    if not tools.forced:
        return text
    return text + _MUST.format(what=f"the function {tools.named}" if tools.named else "at least one function")


def _described(function: Function) -> dict[str, Any]:
    """What a model was trained to read: `strict` speaks to the server."""
    return {key: value for key, value in function.given.items() if key != "strict"}


def _written(function: Mapping[str, str]) -> str:
    name = _json(function["name"])
    return f'<tool_call>\n{{"name": {name}, "arguments": {function["arguments"]}}}\n</tool_call>'


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
