"""Chat templates: what transformers renders, we render; what a template may not do, it cannot."""

import json
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import StageError
from pipelines.template import ChatTemplate, special_tokens
from tests import vision_templates

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
        "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' "
        "+ message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama3.1": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" or message["role"] == "assistant" %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant!") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {%- generation %}{{- " " + message["content"] | trim + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
""",
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "qwen": """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    # What the templates above leave out of the language: macros, loop controls, tojson's options, dict, items.
    "language": """{%- macro show(message) %}
    {{ message | tojson(indent=2) }}
{%- endmacro %}
{% for message in messages %}
    {% if message.content == '' %}
        {% continue %}
    {% endif %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
{{ show(message) }} {{ dict(a=message.role).items() | list }} {{ '-' * 3 }} {{ "%s|%03d" % (message.role, 7) }}
{{ "{:>12}".format(message.role) }} {% for i in range(2) %}{{ i }}{% endfor %}
{% endfor %}
""",
}

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool"]),
            "content": st.text(max_size=20)
            | st.sampled_from(["", "  a\n", "<b>&'\"", "<think>\nx</think>\n\ny", "日本 😀"]),
        }
    ),
    min_size=1,
    max_size=5,
)


def reference(template: str, messages: list) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **SPECIAL)[0][0]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(messages=MESSAGES)
def test_renders_what_transformers_renders(name, messages):
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    try:
        wanted = reference(TEMPLATES[name], messages)
    except Exception as error:
        problem = str(error)
    else:
        assert template.render(messages) == wanted
        return
    with pytest.raises(StageError, match="chat template") as refused:
        template.render(messages)
    assert problem in refused.value.message


@settings(max_examples=40, deadline=None)
@given(messages=MESSAGES)
def test_the_default_pipelines_own_template(smollm2_home, messages):
    template = ChatTemplate.load(smollm2_home)
    assert template is not None
    assert template.render(messages) == reference(template.source, messages)


def test_the_generation_prompt_is_there():
    rendered = ChatTemplate(TEMPLATES["chatml"]).render([{"role": "user", "content": "hi"}])
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_todays_date():
    rendered = ChatTemplate("{{ strftime_now('%Y') }}").render([{"role": "user", "content": ""}])
    assert int(rendered) - datetime.now().year in (0, -1)


def test_what_a_template_raises_is_the_users_message():
    with pytest.raises(StageError) as refused:
        ChatTemplate(TEMPLATES["gemma"], SPECIAL).render([{"role": "system", "content": ""}])
    assert refused.value.message == "The chat template cannot render these messages: System role not supported."
    assert (refused.value.param, refused.value.code) == ("messages", "invalid_request")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages[0].nope.deeper }}", "no attribute 'nope'"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ nope() }}", "'nope' is undefined"),
        ("{{ raise_exception('') }}", "TemplateError"),
    ],
)
def test_a_template_that_fails_names_its_problem(template, problem):
    with pytest.raises(StageError, match=problem) as refused:
        ChatTemplate(template).render([{"role": "user", "content": "hi"}])
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ dict.update(messages[0], a=1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ lipsum(n=100) }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ '-' * 10**10 }}",
        "{{ ('-' * 99999) * 99999 }}",
        "{{ '-'.ljust(1000000000) }}",
        "{{ '-' | center(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=1000000000) }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% for i in range(99999) %}{{ '-' * 9999 }}{% endfor %}",
    ],
)
def test_a_hostile_template_is_refused_and_quickly(template):
    with pytest.raises(StageError):
        ChatTemplate(template).render([{"role": "user", "content": "hi"}])


def test_rendering_does_not_change_the_messages():
    messages = [{"role": "user", "content": "hi"}]
    ChatTemplate("{% set messages = [] %}").render(messages)
    assert messages == [{"role": "user", "content": "hi"}]


def test_a_template_that_does_not_compile_is_the_pipelines_fault():
    with pytest.raises(ValueError, match="line 2"):
        ChatTemplate("\n{% if %}")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("one", "one"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "rag", "template": "r"}], "r"),
        ([], None),
        (None, None),
    ],
)
def test_the_template_in_tokenizer_config(tmp_path, value, wanted):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    template = ChatTemplate.load(tmp_path)
    assert (template and template.source) == wanted


def test_the_file_wins_and_names_special_tokens(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text('{"unk_token": "<unk>", "bos_token": "<old>"}')
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "no", "bos_token": {"content": "<s>"}}')
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ unk_token }}{{ eos_token }}")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": ""}]) == "<s><unk>"


def test_no_template(tmp_path):
    assert ChatTemplate.load(tmp_path) is None


def test_special_tokens_are_strings_only():
    config = {
        "bos_token": "<s>",
        "add_bos_token": True,
        "pad_token": None,
        "extra_special_tokens": {"image_token": "<i>"},
    }
    assert special_tokens(config) == {"bos_token": "<s>", "image_token": "<i>"}


AS_PARTS = {"llava", "smolvlm", "kosmos2"}
PICTURES = {
    "llava": "<image>",
    "smolvlm": "<image>",
    "qwen3_vl": "<|image_pad|>",
    "gemma3n": "<image_soft_token>",
}


@pytest.mark.parametrize("name", vision_templates.TEMPLATES)
def test_vision_templates_take_parts_and_some_nothing_else(name):
    template = ChatTemplate(vision_templates.TEMPLATES[name], SPECIAL)
    assert template.takes_parts
    assert template.takes_strings == (name not in AS_PARTS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_templates_take_strings(name):
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    assert template.takes_strings
    assert not template.takes_parts


@pytest.mark.parametrize("template", ["{{ messages }}", "{{ messages | tojson }}", "{{ messages | tojson(indent=1) }}"])
def test_a_part_that_is_shown_as_code_is_not_taken(template):
    assert not ChatTemplate(template).takes_parts


def test_a_template_that_shows_no_content_is_given_strings():
    template = ChatTemplate("{{ messages | length }}")
    assert (template.takes_strings, template.takes_parts) == (True, False)


@pytest.mark.parametrize(("name", "word"), PICTURES.items())
def test_what_a_template_writes_for_a_picture(name, word):
    template = ChatTemplate(vision_templates.TEMPLATES[name], SPECIAL)
    assert template.places(word)
    assert not template.places("<picture>")


@pytest.mark.parametrize("name", ["kosmos2", "chatml"])
def test_a_template_that_writes_nothing_for_a_picture(name):
    source = (vision_templates.TEMPLATES | TEMPLATES)[name]
    assert not ChatTemplate(source, SPECIAL).places("<image>")


def test_a_system_message_in_parts():
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    shows = "{% for m in messages %}{% for p in m.content %}{{ p.text.strip() }}{% endfor %}{% endfor %}"
    assert ChatTemplate(shows).takes_system
    assert not ChatTemplate(refuses + shows).takes_system


MIXED = st.lists(
    st.sampled_from([{"type": "image"}]) | st.builds(lambda text: {"type": "text", "text": text}, st.text(max_size=9)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", vision_templates.TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(contents=st.lists(MIXED, min_size=1, max_size=3))
def test_renders_parts_as_transformers_does(name, contents):
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    source = vision_templates.TEMPLATES[name]
    assert ChatTemplate(source, SPECIAL).render(messages) == reference(source, messages)
