"""The functions a chat offers: what is taken, and that every refusal names its place and what to send instead."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import StageError
from pipelines.tools import Tools, load_tools, parse_tools, refuse_replaced

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: object = "weather", **more: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, **more}}


def parsed(*tools: object, **more: object) -> Tools:
    found = parse_tools({"tools": list(tools), **more})
    assert found is not None
    return found


def test_functions_are_kept_in_order_and_as_they_came():
    given = tool(description="The weather.", parameters=CITY, strict=True)
    tools = parsed(given, tool("time", parameters=None))
    assert [function.name for function in tools.functions] == ["weather", "time"]
    assert tools.functions[0].given == given["function"]
    assert tools.functions[0].parameters == CITY
    assert tools.functions[1].parameters == {"type": "object", "properties": {}}


@pytest.mark.parametrize("fields", [{}, {"tools": None}, {"tools": [], "tool_choice": "auto"}, {"tool_choice": "none"}])
def test_no_function_is_no_tools(fields):
    assert parse_tools(fields) is None


def test_what_may_be_called():
    both = [tool("a"), tool("b")]

    def names(**more: object) -> list[str]:
        return [function.name for function in parsed(*both, **more).callable]

    assert names() == names(tool_choice="auto") == names(tool_choice="required") == ["a", "b"]
    assert names(tool_choice="none") == []
    assert names(tool_choice=tool("b")) == ["b"]


@pytest.mark.parametrize(
    ("fields", "forced", "single"),
    [
        ({}, False, False),
        ({"tool_choice": "none"}, False, False),
        ({"tool_choice": "required"}, True, False),
        ({"tool_choice": "required", "parallel_tool_calls": False}, True, True),
        ({"tool_choice": tool()}, True, True),
        ({"parallel_tool_calls": False}, False, True),
        ({"parallel_tool_calls": True}, False, False),
    ],
)
def test_how_many_calls_must_and_may_be(fields, forced, single):
    tools = parsed(tool(), **fields)
    assert (tools.forced, tools.single) == (forced, single)


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        ({"tools": {}}, "tools", "must be a list of functions, not an object"),
        ({"tools": ["f"]}, "tools[0]", "an object with type and function, not a string"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type", "must be 'function'"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].custom", "takes type, function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "not 'web_search'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is required"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools[0].name", "not supported"),
        ({"tools": [tool(None)]}, "tools[0].function.name", "is required"),
        ({"tools": [tool(), tool("a b")]}, "tools[1].function.name", "1 to 64 letters"),
        ({"tools": [tool("a" * 65)]}, "tools[0].function.name", "1 to 64 letters"),
        ({"tools": [tool("ä")]}, "tools[0].function.name", "1 to 64 letters"),
        ({"tools": [tool("a\n")]}, "tools[0].function.name", "1 to 64 letters"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name", "there is a function 'weather' already"),
        ({"tools": [tool(description=1)]}, "tools[0].function.description", "a string"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict", "true or false"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "a JSON schema"),
        ({"tools": [tool(parameters={"type": "array"})]}, "tools[0].function.parameters.type", "must be 'object'"),
        ({"tools": [tool(parameters={"a": "\ud800"})]}, "tools[0].function.parameters", "not valid Unicode"),
        ({"tools": [tool(returns={})]}, "tools[0].function.returns", "not supported"),
        ({"tools": [tool(str(n)) for n in range(129)]}, "tools", "at most 128"),
        ({"tool_choice": "required"}, "tool_choice", "'tools' holds no function"),
        ({"tool_choice": tool()}, "tool_choice", "'tools' holds no function"),
        ({"tools": [tool()], "tool_choice": "any"}, "tool_choice", "none, auto, required or a function, not 'any'"),
        ({"tools": [tool()], "tool_choice": 1}, "tool_choice", "not a number"),
        ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "not 'allowed_tools'"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.function", "not null"),
        ({"tools": [tool()], "tool_choice": tool("time")}, "tool_choice.function.name", "no function 'time'"),
        ({"tools": [tool()], "parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
    ],
)
def test_a_refusal_names_its_place(fields, param, problem):
    with pytest.raises(StageError) as refused:
        parse_tools(fields)
    assert refused.value.param == param
    assert problem in refused.value.message
    refused.value.to_json().encode()


@pytest.mark.parametrize(("name", "remedy"), [("functions", "'tools'"), ("function_call", "'tool_choice'")])
def test_what_tools_replaced_is_refused_with_the_remedy(name, remedy):
    with pytest.raises(StageError, match=remedy) as refused:
        refuse_replaced({name: [], "messages": []})
    assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")
    refuse_replaced({name: None})


@pytest.mark.parametrize("choice", ["none", "auto", "required", tool("b")])
@pytest.mark.parametrize("parallel", [True, False])
def test_the_tensor_says_the_same(choice, parallel):
    tools = parsed(
        tool("b", description="B", parameters=CITY), tool("a"), tool_choice=choice, parallel_tool_calls=parallel
    )
    assert load_tools(tools.to_json()) == load_tools(tools.to_json().encode()) == tools
    order = list(json.loads(tools.to_json())["tools"][0]["function"]["parameters"])
    assert order == list(CITY), "arguments are written in the schema's order"


@pytest.mark.parametrize(
    ("text", "param", "problem"),
    [
        ("[", "tools", "not valid JSON"),
        (b"\xff", "tools", "not valid Unicode"),
        ("[]", "tools", "must be a JSON object with tools, tool_choice, parallel_tool_calls"),
        ('{"tools": [], "choice": 1}', "choice", "unknown key 'choice'"),
        ('{"tools": [1]}', "tools[0]", "not a number"),
    ],
)
def test_a_bad_tensor_is_named(text, param, problem):
    with pytest.raises(StageError, match=problem) as refused:
        load_tools(text)
    assert refused.value.param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["function", "f", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "parameters", "description", "strict", "x"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries({}, optional={"tools": JSON | st.lists(JSON), "tool_choice": JSON}))
def test_any_json_is_parsed_for_good_or_refused(fields):
    try:
        tools = parse_tools(fields)
    except StageError as error:
        refused = error
    else:
        assert tools is None or load_tools(tools.to_json()) == tools
        return
    assert str(refused.param).startswith("tool")
    refused.to_json().encode()


def test_the_gateway_pays_for_no_grammar_and_no_tokenizer():
    code = "import sys, pipelines.tools; print({'llguidance', 'tokenizers', 'jinja2', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
