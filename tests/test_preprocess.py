"""The first stage: which ids come of which input, and what happens at the edge of the context."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pipelines.errors import StageError
from pipelines.preprocess import Preprocess
from pipelines.sampling import Sampling
from pipelines.template import ChatTemplate

CONTEXT = 64
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, 日本 😀"},
    {"role": "assistant", "content": "Hi  there\n"},
    {"role": "user", "content": " Why?"},
]


@pytest.fixture(scope="module")
def smollm2(smollm2_home):
    return Preprocess.load(smollm2_home, context=CONTEXT)


@pytest.fixture(scope="module")
def gemma3(gemma3_home):
    return Preprocess.load(gemma3_home, context=CONTEXT)


def words(template: str | None = None, **post: object) -> Preprocess:
    """One token a word, and <s> before each text as a post-processor's doing."""
    vocab = {"<s>": 0, "<unk>": 1, "user": 2, "system": 3, "developer": 4, "a": 5}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Preprocess(tokenizer, ChatTemplate(template) if template is not None else None, CONTEXT)


ROLES_AND_WORDS = "<s>{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"


def test_messages_become_the_ids_that_transformers_makes(smollm2, smollm2_home):
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_file=str(smollm2_home / "tokenizer.json"))
    template = (smollm2_home / "chat_template.jinja").read_text()
    wanted = reference.apply_chat_template(CHAT, chat_template=template, add_generation_prompt=True, return_dict=False)
    assert smollm2.run(messages=json.dumps(CHAT)).input_ids == wanted


def test_a_prompt_is_one_user_message(smollm2):
    messages = json.dumps([{"role": "user", "content": "Hi"}])
    assert smollm2.run(prompt="Hi").input_ids == smollm2.run(messages=messages).input_ids
    assert smollm2.run(prompt=b"Hi").input_ids == smollm2.run(messages=messages.encode()).input_ids


def test_text_is_continued_as_it_is(smollm2, gemma3):
    assert smollm2.tokenizer.decode(smollm2.run(text=" Once upon").input_ids) == " Once upon"
    ids = gemma3.run(text="Once upon").input_ids
    assert ids[0] == gemma3.tokenizer.token_to_id("<bos>")
    assert ids.count(ids[0]) == 1


def test_special_tokens_come_once():
    stage = words(ROLES_AND_WORDS)
    assert stage.run(text="a a").input_ids == [0, 5, 5]
    assert stage.run(prompt="a").input_ids == [0, 2, 5]


def test_developer_is_system_unless_the_template_knows_it():
    messages = json.dumps([{"role": "developer", "content": "a"}])
    assert words(ROLES_AND_WORDS).run(messages=messages).input_ids == [0, 3, 5]
    knowing = ROLES_AND_WORDS + "{# developer #}"
    assert words(knowing).run(messages=messages).input_ids == [0, 4, 5]


def test_a_base_model_takes_text_only(gemma3):
    for given in ({"prompt": "Hi"}, {"messages": json.dumps(CHAT)}):
        with pytest.raises(StageError, match=r"no chat template.*'text' \(POST /v1/completions\)") as refused:
            gemma3.run(**given)
        assert [refused.value.param] == list(given)


def test_a_picture_is_refused_by_its_place(smollm2):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    with pytest.raises(StageError, match="this pipeline takes text only") as refused:
        smollm2.run(messages=json.dumps([{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]))
    assert (refused.value.param, refused.value.code) == ("messages[0].content[1].type", "invalid_request")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "messages"),
        ({"prompt": "a", "text": "a"}, "text"),
        ({"prompt": "", "messages": "[]"}, "prompt"),
        ({"text": b"\xff"}, "text"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"messages": "["}, "messages"),
        ({"messages": '[{"role": "x"}]'}, "messages[0].role"),
        ({"text": ""}, "text"),
        ({"text": "a", "sampling": "["}, "sampling"),
        ({"text": "a", "sampling": b"\xff"}, "sampling"),
        ({"text": "a", "sampling": "[" * 100_000}, "sampling"),
        ({"text": "a", "sampling": '{"temperature": 3}'}, "temperature"),
    ],
)
def test_a_bad_input_is_named(smollm2, given, param):
    with pytest.raises(StageError) as refused:
        smollm2.run(**given)
    assert (refused.value.param, refused.value.code) == (param, "invalid_request")


def test_sampling_comes_back_complete(smollm2):
    prepared = smollm2.run(text="a b c", sampling=b'{"temperature": 0.5, "stop": "x"}')
    assert prepared.sampling.seed is not None
    assert prepared.sampling.max_tokens == CONTEXT - len(prepared.input_ids)
    assert (prepared.sampling.temperature, prepared.sampling.stop) == (0.5, ("x",))
    assert smollm2.run(text="a", sampling='{"seed": 7, "max_tokens": 5}').sampling == Sampling(5, seed=7)
    assert smollm2.run(text="a", sampling="").sampling.max_tokens == CONTEXT - 1


def test_a_prompt_as_long_as_the_context_leaves_nothing_to_say():
    stage = words(ROLES_AND_WORDS)
    assert stage.run(text="a " * (CONTEXT - 2)).sampling.max_tokens == 1
    for text in ("a " * (CONTEXT - 1), "a " * CONTEXT):
        with pytest.raises(StageError) as refused:
            stage.run(text=text)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "text")
    assert refused.value.message == (
        "This model's maximum context length is 64 tokens. However, your text resulted in 65 tokens. "
        "Please reduce the length of the text."
    )
    with pytest.raises(StageError, match="your prompt resulted in 82 tokens") as refused:
        stage.run(prompt="a " * 80)
    assert refused.value.param == "prompt"


def test_prompt_and_answer_must_fit_together():
    stage = words(ROLES_AND_WORDS)
    messages = json.dumps([{"role": "user", "content": "a"}])
    assert stage.run(messages=messages, sampling='{"max_tokens": 61}').sampling.max_tokens == 61
    with pytest.raises(StageError) as refused:
        stage.run(messages=messages, sampling='{"max_tokens": 62}')
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    assert refused.value.message == (
        "This model's maximum context length is 64 tokens. However, you requested 65 tokens (3 in the "
        "messages, 62 in the completion). Please reduce the length of the messages or the completion."
    )


WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def tools(**more: object) -> str:
    return json.dumps({"tools": [{"type": "function", "function": WEATHER}], **more})


@pytest.fixture(scope="module")
def roomy(smollm2_home):
    return Preprocess.load(smollm2_home, context=1024)


def test_tools_are_in_the_prompt_and_leave_the_answer_free(roomy):
    plain = roomy.run(prompt="Rome?")
    prepared = roomy.run(prompt="Rome?", tools=tools())
    assert prepared.sampling.response_format is None
    assert json.dumps(WEATHER) in roomy.tokenizer.decode(prepared.input_ids, skip_special_tokens=False)
    assert roomy.run(prompt="Rome?", tools=tools(tool_choice="none")).input_ids == plain.input_ids
    assert roomy.run(prompt="Rome?", tools='{"tools": []}').input_ids == plain.input_ids


def test_a_call_that_must_be_made_is_a_grammar(roomy):
    made = roomy.run(prompt="Rome?", tools=tools(tool_choice="required")).sampling.response_format
    assert made.kind == "grammar"
    assert '{\\"name\\": \\"weather\\", \\"arguments\\": ' in made.source
    asked = json.dumps({"response_format": {"type": "json_object"}})
    both = roomy.run(prompt="Rome?", tools=tools(), sampling=asked).sampling.response_format
    assert both.kind == "grammar"
    assert "(calls | answer)" in both.source
    forced = roomy.run(prompt="Rome?", tools=tools(tool_choice="required"), sampling=asked).sampling.response_format
    assert forced == made
    none = roomy.run(prompt="Rome?", tools=tools(tool_choice="none"), sampling=asked).sampling.response_format
    assert none.kind == "json_object"


def test_reasoning_that_the_prompt_begins_comes_before_the_call():
    template = "<s>{% for m in messages %} a{% endfor %}{{ tools | length if tools }} <think>{# </think> <tool_call> #}"
    sampling = words(template).run(prompt="a", tools=tools(tool_choice="required")).sampling
    assert "\nstart: thoughts SPACE calls\n" in "\n" + sampling.response_format.source


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"prompt": "a", "tools": "["}, "tools"),
        ({"prompt": "a", "tools": '{"tools": [{}]}'}, "tools[0].type"),
        ({"text": "a", "tools": tools()}, "tools"),
        ({"text_ids": [5], "tools": tools()}, "tools"),
    ],
)
def test_bad_tools_are_named(smollm2, given, param):
    with pytest.raises(StageError) as refused:
        smollm2.run(**given)
    assert refused.value.param == param


def test_the_steps_are_timed(smollm2):
    timed = []

    @contextmanager
    def stage(name):
        timed.append(name)
        yield

    smollm2.run(prompt="Hi", stage=stage)
    smollm2.run(text="Hi", stage=stage)
    assert timed == ["render", "tokenize", "tokenize"]


def test_truncation_and_padding_of_training_are_not_ours(tmp_path):
    tokenizer = words().tokenizer
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Preprocess.load(tmp_path, context=CONTEXT).run(text="a a a").input_ids == [0, 5, 5, 5]


def test_token_ids_are_taken_as_they_are(smollm2) -> None:
    prepared = smollm2.run(text_ids=[5, 6, 7], sampling='{"max_tokens": 3}')
    assert (prepared.input_ids, prepared.sampling.max_tokens) == ([5, 6, 7], 3)
    assert smollm2.run(text_ids=[5]).sampling.max_tokens == CONTEXT - 1


@pytest.mark.parametrize(
    ("inputs", "param", "code"),
    [
        ({"text_ids": [5, -1]}, "text_ids", "invalid_request"),
        ({"text_ids": [10**6]}, "text_ids", "invalid_request"),
        ({"text_ids": [2**40]}, "text_ids", "invalid_request"),
        ({"text_ids": []}, "text_ids", "invalid_request"),
        ({"text_ids": [5] * CONTEXT}, "text_ids", "context_length_exceeded"),
        ({"text_ids": [5], "text": "x"}, "text_ids", "invalid_request"),
    ],
)
def test_token_ids_that_cannot_be_continued(smollm2, inputs: dict[str, object], param: str, code: str) -> None:
    with pytest.raises(StageError) as caught:
        smollm2.run(**inputs)  # type: ignore[arg-type]
    assert (caught.value.param, caught.value.code) == (param, code)


def test_the_stages_start_without_torch_and_transformers():
    code = "import sys, pipelines.preprocess, pipelines.postprocess; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = done.stdout.split()
    assert "tokenizers" in loaded
    assert not {"torch", "transformers", "jinja2", "numpy", "llguidance"} & set(loaded)
