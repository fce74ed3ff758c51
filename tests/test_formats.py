"""Which format a model's calls have: by its template."""

import pytest

from pipelines.answer.formats import AnswerFormat
from pipelines.template import ChatTemplate
from tests.test_answer import FAMILIES, THINK


@pytest.mark.parametrize(
    ("template", "family", "think"),
    [
        ("{% for tool in tools %}{% endfor %}<tool_call>", "plain", None),
        ("{% if tools %}{% endif %}<tool_call> {{ '</think>' }}", "plain", THINK),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", "mistral", None),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]f[ARGS]", "mistral-named", None),
        ("{% if tools %}{% endif %}<start_function_call>", "function-gemma", None),
        ("{% if tools %}{% endif %}<|tool_call>call:", "gemma-4", None),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}<|python_tag|>", "llama", None),
    ],
)
def test_a_format_is_found_by_its_markers(template, family, think):
    found = AnswerFormat.of(ChatTemplate(template))
    assert (found.family, found.native, found.think, found.opened) == (FAMILIES[family], True, think, False)
    assert found.marks == {*FAMILIES[family].marks, *(think or ())}


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content }}", "{{ messages }} <tool_call>", "{{ tools }} <my_call>", "{# <tool_call> tools #}"],
)
def test_a_template_without_tools_or_of_no_known_family_is_told_in_words(template):
    assert AnswerFormat.of(ChatTemplate(template)) == AnswerFormat()


def test_no_template_no_format(tmp_path):
    assert AnswerFormat.load(tmp_path) == AnswerFormat()


@pytest.mark.parametrize("tail", ["<think>", "<think>\n"])
def test_a_template_that_opens_the_reasoning(tail):
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}{{ '" + tail + "' }}"
    found = AnswerFormat.of(ChatTemplate(template.replace("\n", "\\n")))
    assert (found.think, found.opened) == (THINK, True)
    assert found.opens_in("x" + tail)
    assert not found.opens_in(tail + "</think>\n\n")
