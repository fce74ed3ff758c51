"""Chats with tools: what real templates make of them, and what a template is told that knows no tools."""

import json

import pytest

from pipelines.answer.formats import AnswerFormat
from pipelines.errors import StageError
from pipelines.messages import parse_messages
from pipelines.prompt import render
from pipelines.template import ChatTemplate
from pipelines.tools import Tools, parse_tools
from tests.vision_templates import TEMPLATES as VISION

WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ROME = {"id": "call_0123456789abcdefghijklmn", "type": "function"}
ROME["function"] = {"name": "weather", "arguments": '{"city": "Rome", "unit": "é"}'}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [ROME]},
    {"role": "tool", "tool_call_id": ROME["id"], "content": "sunny"},
]

# What these families' templates do with tools, in their own words and markers; the rest of them is left out.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
QWEN_2_5 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}
"""
QWEN_3 = """{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set reasoning_content = message.content.split('</think>')[0] %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content + '\\n</think>\\n\\n' + message.content }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}
            {{- tool_call.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}
"""
LLAMA_3_1 = """{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}{# with builtin tools: <|python_tag|> #}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
"""
MISTRAL = """{%- if tools is not none %}{{- "[AVAILABLE_TOOLS][" }}
    {%- for tool in tools %}{{- tool.function | tojson }}{%- endfor %}{{- "][/AVAILABLE_TOOLS]" }}{%- endif %}
{%- for message in messages %}
    {%- if message["role"] == "user" %}{{- "[INST]" + message["content"] + "[/INST]" }}
    {%- elif message["tool_calls"] is defined and message["tool_calls"] is not none %}
        {{- "[TOOL_CALLS][" }}
        {%- for tool_call in message["tool_calls"] %}
            {%- set out = tool_call.function|tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
        {%- endfor %}{{- "]" }}
    {%- elif message["role"] == "tool" %}
        {%- if not message.tool_call_id is defined or message.tool_call_id|length != 9 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
        {%- endif %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}' }}
    {%- endif %}
{%- endfor %}
"""
# Arguments as text, and an answer known by the absence of content.
DEEPSEEK = """{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}
{%- if message['role'] == 'assistant' and message['content'] is none %}<tool_call>
{%- for tool in message['tool_calls'] %}
    {{- tool['function']['name'] + '\\n' + tool['function']['arguments'] }}
{%- endfor %}
{%- elif message['content'] is not none %}{{ message['content'] }}{% endif %}
{%- endfor %}"""


def offered(**more: object) -> Tools:
    tools = parse_tools({"tools": [{"type": "function", "function": {**WEATHER, "strict": True}}], **more})
    assert tools is not None
    return tools


def rendered(source: str | ChatTemplate, chat: list, tools: Tools | None = None) -> str:
    template = ChatTemplate(source) if isinstance(source, str) else source
    return render(template, AnswerFormat.of(template), parse_messages(chat), tools)


SHOWN = json.dumps({"type": "function", "function": WEATHER})


def test_qwen_2_5():
    assert rendered(QWEN_2_5, CHAT, offered()) == (
        f"<|im_start|>system\nBe brief.\n\n# Tools\n\n<tools>\n{SHOWN}\n</tools><|im_end|>\n"
        "<|im_start|>user\nRome?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "unit": "é"}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen_3_with_its_reasoning():
    chat = [CHAT[1], {**CHAT[2], "reasoning_content": "I must look."}, CHAT[3]]
    assert rendered(QWEN_3, chat, offered()) == (
        f"<|im_start|>system\n{SHOWN}<|im_end|>\n<|im_start|>user\nRome?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nI must look.\n</think>\n\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "unit": "é"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen_3_without_content():
    assert "<think>\n\n</think>\n\n<tool_call>" in rendered(QWEN_3, CHAT, offered())


def test_llama_3_1():
    assert rendered(LLAMA_3_1, CHAT[1:], offered()) == (
        "Environment: ipython\n"
        + json.dumps({"type": "function", "function": WEATHER}, indent=4)
        + "<|start_header_id|>user<|end_header_id|>\n\nRome?<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "weather", "parameters": '
        '{"city": "Rome", "unit": "é"}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"sunny"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_mistral_whose_ids_are_short():
    text = rendered(MISTRAL, CHAT[1:], offered())
    assert text.startswith(f"[AVAILABLE_TOOLS][{json.dumps(WEATHER)}][/AVAILABLE_TOOLS][INST]Rome?[/INST][TOOL_CALLS]")
    made = json.loads(text[text.index("[TOOL_CALLS]") + 12 : text.index("[TOOL_RESULTS]")])
    assert [(call["name"], call["arguments"]) for call in made] == [("weather", {"city": "Rome", "unit": "é"})]
    assert text.endswith(f'[TOOL_RESULTS]{{"content": sunny, "call_id": "{made[0]["id"]}"}}')
    kept = [{**CHAT[2], "tool_calls": [{**ROME, "id": "abcdef123"}]}, {**CHAT[3], "tool_call_id": "abcdef123"}]
    assert rendered(MISTRAL, [CHAT[1], *kept], offered()).count("abcdef123") == 2


def test_a_template_that_takes_arguments_as_text_and_no_content_as_none():
    text = rendered(DEEPSEEK, CHAT[1:3], offered())
    assert text.endswith('Rome?<tool_call>weather\n{"city": "Rome", "unit": "é"}')


@pytest.mark.parametrize("template", [QWEN_2_5, LLAMA_3_1, MISTRAL])
def test_no_tools_are_shown_where_none_may_be_called(template):
    assert rendered(template, CHAT[1:2], offered(tool_choice="none")) == rendered(template, CHAT[1:2])
    assert "The weather in a city." not in rendered(template, CHAT[1:2])


@pytest.mark.parametrize("template", [QWEN_2_5, CHATML])
def test_a_named_function_is_the_only_one_shown(template):
    tools = parse_tools(
        {
            "tools": [{"type": "function", "function": {"name": name}} for name in ("one", "two")],
            "tool_choice": {"type": "function", "function": {"name": "two"}},
        }
    )
    text = rendered(template, CHAT[1:2], tools)
    assert '"two"' in text
    assert '"one"' not in text


def test_a_tool_result_names_its_function():
    template = "{{ tools }}<tool_call>{% for m in messages if m.role == 'tool' %}[{{ m.name }}]{% endfor %}"
    assert rendered(template, CHAT).endswith("[weather]")
    assert rendered(template, [*CHAT[:3], {**CHAT[3], "name": "own"}]).endswith("[own]")


def test_the_template_for_tools_is_used_with_tools(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(
        "{{ bos_token }}{{ tools[0].function.name }}<tool_call>"
    )
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert rendered(template, CHAT[1:2], offered()) == "<s>weather<tool_call>"
    assert rendered(template, CHAT[1:2]) == "plain"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").unlink()
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "{{ tools | length }}<tool_call>"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert (rendered(template, CHAT[1:2], offered()), rendered(template, CHAT[1:2])) == ("1<tool_call>", "d")


def test_what_a_template_refuses_stays_its_refusal():
    two = [{**CHAT[2], "tool_calls": [ROME, ROME]}]
    with pytest.raises(StageError, match="only supports single tool-calls"):
        rendered(LLAMA_3_1, [CHAT[1], *two], offered())


# --- in words, for a template that knows no tools


def test_the_tools_are_described_in_the_system_message():
    text = rendered(CHATML, CHAT[:2], offered())
    system, _, rest = text.partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions")
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in system
    assert '<tool_call>\n{"name": ' in system
    assert "must" not in system
    assert rest == "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n"
    alone = rendered(CHATML, CHAT[1:2], offered())
    assert alone.startswith("<|im_start|>system\nYou can call functions")
    assert rendered(CHATML, [{"role": "developer", "content": "Be brief."}, CHAT[1]], offered()) == text


def test_a_call_that_must_be_made_is_asked_for():
    named = {"type": "function", "function": {"name": "weather"}}
    assert "must call the function weather." in rendered(CHATML, CHAT[1:2], offered(tool_choice=named))
    assert "must call at least one function." in rendered(CHATML, CHAT[1:2], offered(tool_choice="required"))


def test_calls_and_results_are_plain_messages():
    time = {**ROME, "id": "c2", "function": {"name": "time", "arguments": "{}"}}
    chat = [
        CHAT[1],
        {"role": "assistant", "content": "I look.", "tool_calls": [ROME, time]},
        CHAT[3],
        {"role": "tool", "tool_call_id": "c2", "content": "noon"},
    ]
    assert rendered(CHATML, chat) == (
        "<|im_start|>user\nRome?<|im_end|>\n"
        '<|im_start|>assistant\nI look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "unit": "é"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_reasoning_beside_a_call_stays_with_a_template_that_shows_it():
    template = "{% for m in messages %}[{{ m.reasoning_content }}]{{ m.content }}{% endfor %}"
    assert rendered(template, [{**CHAT[2], "reasoning_content": "Hm."}]).startswith("[Hm.]<tool_call>")


def test_a_template_without_system_messages_has_the_tools_in_the_first_users():
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    text = rendered(template, CHAT[1:2], offered())
    assert text.startswith("user: You can call functions")
    assert text.endswith("\n\nRome?\n")
    assert text.count("user: ") == 1


def test_the_default_pipelines_own_template(smollm2_home):
    template = ChatTemplate.load(smollm2_home)
    assert template is not None
    text = rendered(template, CHAT, offered())
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions")
    assert text.endswith("<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


# --- pictures

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,<image>", "detail": "auto"}}


def say(text):
    return {"type": "text", "text": text}


SEEN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [say("This"), PICTURE, say("and this"), PICTURE, say("differ how?")]},
    {"role": "assistant", "content": "Not."},
    {"role": "user", "content": [PICTURE, say("And this?")]},
]


def pictured(source, chat, tools=None, image_token="<image>", **named):
    template = ChatTemplate(source, {"bos_token": "<bos>"})
    return render(template, AnswerFormat.of(template), chat, tools, image_token=image_token, **named)


@pytest.mark.parametrize(
    ("name", "token", "prompt"),
    [
        (
            "llava",
            "<image>",
            "Be brief. USER: <image>\n<image>\nThis and this differ how? ASSISTANT: Not. USER: <image>\nAnd this? "
            "ASSISTANT:",
        ),
        (
            "smolvlm",
            "<image>",
            "<|im_start|>System: Be brief.<end_of_utterance>\nUser: This<image>and this<image>differ how?"
            "<end_of_utterance>\nAssistant: Not.<end_of_utterance>\nUser:<image>And this?<end_of_utterance>\n"
            "Assistant:",
        ),
        (
            "qwen3_vl",
            "<|image_pad|>",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
            "This<|vision_start|><|image_pad|><|vision_end|>and this<|vision_start|><|image_pad|><|vision_end|>"
            "differ how?<|im_end|>\n<|im_start|>assistant\nNot.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>And this?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "gemma3n",
            "<image_soft_token>",
            "<bos><start_of_turn>user\nBe brief.\n\nThis<image_soft_token>and this<image_soft_token>differ how?"
            "<end_of_turn>\n<start_of_turn>model\nNot.<end_of_turn>\n<start_of_turn>user\n<image_soft_token>And this?"
            "<end_of_turn>\n<start_of_turn>model\n",
        ),
        ("kosmos2", "", "<grounding>And this?"),
    ],
)
def test_pictures_are_where_the_model_was_taught_them(name, token, prompt):
    assert pictured(VISION[name], SEEN, image_token=token) == prompt


@pytest.mark.parametrize("name", VISION)
def test_a_chat_without_pictures_in_a_vision_models_template(name):
    text = pictured(VISION[name], CHAT[:2])
    assert "Rome?" in text
    assert "type" not in text


def test_a_template_of_strings_has_the_pictures_in_words():
    assert pictured(CHATML, SEEN) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nThis\n<image>\nand this\n<image>\ndiffer how?<|im_end|>\n"
        "<|im_start|>assistant\nNot.<|im_end|>\n"
        "<|im_start|>user\n<image>\nAnd this?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_of_strings_for_a_processor_that_writes_the_place_itself():
    template = "<grounding>{{ messages[-1].content }}"
    assert pictured(template, SEEN, image_token="") == "<grounding>And this?"
    assert pictured(template, [{"role": "user", "content": [PICTURE]}], image_token="") == "<grounding>"


def test_a_template_that_leaves_pictures_out_has_them_in_words():
    template = "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
    assert pictured(template, SEEN[3:]) == "<image>\nAnd this?"


def test_pictures_for_a_model_that_sees_none():
    with pytest.raises(StageError, match="takes text only") as refused:
        pictured(VISION["qwen3_vl"], SEEN, image_token=None)
    assert refused.value.param == "messages[1].content"


def test_rendering_pictures_changes_no_message():
    before = json.dumps(SEEN)
    pictured(VISION["smolvlm"], SEEN, offered())
    assert json.dumps(SEEN) == before


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"role": "user", "content": "a <image> b"}, "messages[1].content"),
        ({"role": "user", "content": [PICTURE, say("a<image>")]}, "messages[1].content[1].text"),
        ({"role": "user", "content": "a", "name": "<image>"}, "messages[1].name"),
        ({"role": "assistant", "content": "a", "reasoning_content": "<video>"}, "messages[1].reasoning_content"),
        (
            {**CHAT[2], "tool_calls": [{**ROME, "function": {"name": "a", "arguments": '{"b": "<image>"}'}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_words_that_stand_for_pictures_are_refused_in_texts(message, path):
    chat = [CHAT[1], message]
    with pytest.raises(StageError, match="stands for a picture") as refused:
        pictured(VISION["smolvlm"], chat, reserved=["<image>", "<video>"])
    assert refused.value.param == path


def test_what_a_picture_is_called_is_no_text():
    assert "<image>And this?" in pictured(VISION["smolvlm"], SEEN, reserved=["<image>"])


def test_tools_in_words_beside_pictures():
    chat = [
        {"role": "user", "content": [PICTURE, say("Where?")]},
        {**CHAT[2], "content": None},
        {"role": "tool", "tool_call_id": ROME["id"], "content": [say("See"), PICTURE]},
        CHAT[3],
    ]
    text = pictured(VISION["smolvlm"], chat, offered())
    assert text.startswith("<|im_start|>System: You can call functions")
    assert "User:<image>Where?<end_of_utterance>\nAssistant: <tool_call>\n" in text
    assert text.endswith(
        "User: <tool_response>\nSee<image></tool_response>\n<tool_response>\nsunny\n</tool_response><end_of_utterance>"
        "\nAssistant:"
    )
    assert pictured(CHATML, chat, offered()).endswith(
        "user\n<tool_response>\nSee\n<image>\n</tool_response>\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_tools_in_words_in_a_first_message_with_a_picture():
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    text = pictured(no_system + VISION["smolvlm"], SEEN[3:], offered())
    assert text.startswith("<|im_start|>User: You can call functions")
    assert text.endswith("when no function is needed.<image>And this?<end_of_utterance>\nAssistant:")


def test_tools_after_a_system_message_in_parts():
    text = pictured(VISION["llava"], [{"role": "system", "content": [PICTURE, say("Look.")]}, CHAT[1]], offered())
    assert text.startswith("<image>\nLook.\n\nYou can call functions")
