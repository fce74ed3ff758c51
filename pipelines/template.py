"""Renders a model's chat template as transformers does, without importing transformers.

Follows `transformers.utils.chat_template_utils` (5.x): a Jinja immutable sandbox with trim_blocks,
lstrip_blocks, loop controls, its own `tojson`, `raise_exception`, `strftime_now` and the `generation` tag;
the special tokens are variables. Templates are files of a model, so code from elsewhere: beyond the sandbox,
what one may iterate, repeat and write is bounded here. (A process has no way to bound all that an expression
can compute; pipelines are an operator's choice.) Knows no tokenizer, and no format of messages and tools beyond
lists of dicts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipelines.errors import StageError

if TYPE_CHECKING:
    import jinja2

MAX_RENDERED = 64 * 2**20  # characters; far above any context, far below the machine's memory
MAX_REPEAT = 100_000  # for `range`, `'-' * n`, `ljust(n)` and the like: Jinja's own limit on a range
MAX_RANGED = 1_000_000  # iterations over all ranges of one rendering

_PROBE = "probe"  # a word that no template writes of itself
_SHOWN_AS_CODE = re.compile(r"""["']type["']\s*:\s*["']text["']""")
_WIDE = re.compile(r"\d{6}|:[^{}]*\{|[%.]\*")


class ChatTemplate:
    """One compiled template, with the special tokens it may name. `with_tools`: another, for chats that have tools.

    `response`: what the same files declare of the answers (transformers' `response_template`).
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        with_tools: ChatTemplate | None = None,
        response: Mapping[str, Any] | None = None,
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self.with_tools = with_tools
        self.response = response
        self._template, self._names = _compile(source)

    @classmethod
    def load(cls, home: Path, given: str = "") -> ChatTemplate | None:
        """The template in a prepared folder: a file, else a key of tokenizer_config.json; None without one.

        One that is `given` takes the place of all of them.
        """
        config = _read_json(home / "tokenizer_config.json")
        named = _named(config.get("chat_template"))
        for name, file in (
            ("default", home / "chat_template.jinja"),
            ("tool_use", home / "additional_chat_templates" / "tool_use.jinja"),
        ):
            if file.exists():
                named[name] = file.read_text(encoding="utf-8")
        if given:
            named = {"default": given}
        source = named.get("default") or next(iter(named.values()), None)
        if source is None:
            return None
        special = special_tokens(_read_json(home / "special_tokens_map.json") | config)
        other = named.get("tool_use", source)
        response = config.get("response_template")
        return cls(source, special, cls(other, special) if other != source else None, response)

    @property
    def takes_tools(self) -> bool:
        """Whether it shows the model the functions it is given."""
        return "tools" in self._names

    @cached_property
    def takes_system(self) -> bool:
        """Whether a chat may begin with a system message."""
        a, b = ("a", "b") if self.takes_strings else ([_text("a")], [_text("b")])
        try:
            self.render([{"role": "system", "content": a}, {"role": "user", "content": b}])
        except StageError:
            return False
        return True

    @cached_property
    def takes_strings(self) -> bool:
        """Whether a content may be a string: it shows one, or shows no list of parts either."""
        return self._shows(_PROBE) or not self.takes_parts

    @cached_property
    def takes_parts(self) -> bool:
        """Whether a content may be a list of parts, as transformers writes them: a part is not shown as code."""
        return self._shows([_text(_PROBE)])

    def places(self, word: str) -> bool:
        """Whether it writes `word` where a content has a picture among its parts."""
        try:
            return word in self.render([{"role": "user", "content": [{"type": "image"}, _text(_PROBE)]}])
        except StageError:
            return False

    def _shows(self, content: object) -> bool:
        try:
            rendered = self.render([{"role": "user", "content": content}])
        except StageError:
            return False
        return _PROBE in rendered and not _SHOWN_AS_CODE.search(rendered)

    def render(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] | None = None
    ) -> str:
        """The prompt up to where the assistant's answer begins."""
        from jinja2 import TemplateError

        try:
            return "".join(self._bounded(messages, tools))
        except TemplateError as error:
            raise _refused(error.message or type(error).__name__) from None
        except StageError:
            raise
        except RecursionError:
            raise _refused("it recurses too deeply") from None
        except Exception as error:  # a template can raise whatever an expression can: TypeError, KeyError…
            raise _refused(f"{type(error).__name__}: {error}") from None

    def _bounded(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] | None
    ) -> list[str]:
        blocks: list[str] = []
        room = MAX_RENDERED
        for block in self._template.generate(
            messages=[dict(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=True,
            range=_budgeted_range(),
            **self.special_tokens,
        ):
            room -= len(block)
            if room < 0:
                raise _refused(f"it renders to more than {MAX_RENDERED} characters")
            blocks.append(block)
        return blocks


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the rest by name, from tokenizer_config.json; an absent one is undefined."""
    extra = config.get("extra_special_tokens")
    named = {**config, **extra} if isinstance(extra, dict) else dict(config)
    found: dict[str, str] = {}
    for name, value in named.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _named(value: object) -> dict[str, str]:
    """A tokenizer_config's templates by name: one string is the default, a list names each."""
    if isinstance(value, list):
        return {str(item["name"]): str(item["template"]) for item in value}
    return {"default": value} if isinstance(value, str) else {}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def _refused(reason: str) -> StageError:
    return StageError(f"The chat template cannot render these messages: {reason}.", param="messages")


def _compile(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    """The template, and the names that it expects to be given."""
    # Imported here: a pipeline without a chat template need not pay for Jinja.
    import jinja2.meta
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; when rendering, it is its body."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own attribute)

        def parse(self, parser: Any) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    class Sandbox(ImmutableSandboxedEnvironment):
        """Jinja's sandbox bounds `range` only; `'-' * 10**10` would take the machine's memory."""

        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_sizes(left, right)
            if operator == "*":
                _check_product(left, right)
            elif isinstance(left, str):
                _check_pattern(left)
            return super().call_binop(context, operator, left, right)

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                _check_pattern(value.__self__)
            return wrapped

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(__obj, "__self__", None) is not None:  # a method of a value: ljust, zfill…
                _check_sizes(*args, *kwargs.values())
            return super().call(__context, __obj, *args, **kwargs)

    class Namespace(jinja2.utils.Namespace):
        """No private attributes, as in transformers; and no endless text, for loops can only write here."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # Jinja's trick: `namespace(self=…)` must work
            attributes = dict(*args[1:], **kwargs)
            for name, value in attributes.items():
                _check_attribute(name, value)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_attribute(name, value)
            super().__setitem__(name, value)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    for name in ("batch", "center", "format", "indent", "slice", "wordwrap"):
        environment.filters[name] = _bounded_filter(environment.filters[name])
    environment.filters["tojson"] = _bounded_filter(_tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = Namespace
    # The class itself would give templates `dict.update`, which the immutable sandbox does not see through.
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    del environment.globals["lipsum"]
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        return environment.from_string(source), frozenset(names)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template does not compile: line {error.lineno}: {error.message}") from None


def _check_sizes(*values: object) -> None:
    from jinja2.exceptions import SecurityError

    for value in values:
        if isinstance(value, int) and abs(value) > MAX_REPEAT:
            raise SecurityError(f"a template may not compute with {value:.0e}: the limit is {MAX_REPEAT}")


def _check_product(left: object, right: object) -> None:
    from jinja2.exceptions import SecurityError

    for repeated, times in ((left, right), (right, left)):
        sized = isinstance(repeated, (str, list, tuple)) and isinstance(times, int)
        if sized and len(repeated) * times > MAX_RENDERED:  # type: ignore[arg-type,operator]
            raise SecurityError(f"a template may not repeat something to more than {MAX_RENDERED}")


def _check_pattern(pattern: str) -> None:
    """A pattern for `%` or `format`: no field of a million characters, nor of a width that is computed."""
    from jinja2.exceptions import SecurityError

    if _WIDE.search(pattern):
        raise SecurityError(f"a template may not format fields wider than {MAX_REPEAT}")


def _check_attribute(name: object, value: object) -> None:
    from jinja2.exceptions import SecurityError

    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")
    if isinstance(value, str) and len(value) > MAX_RENDERED:
        raise SecurityError(f"a template may not build a text of more than {MAX_RENDERED} characters")


def _bounded_filter(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_sizes(*args, *kwargs.values())
        if args and isinstance(args[0], str) and plain.__name__ == "do_format":
            _check_pattern(args[0])
        return plain(*args, **kwargs)

    return bounded


def _budgeted_range() -> Callable[..., range]:
    """`range` for one rendering. Jinja limits each range; nested ones multiply, so their sum is limited."""
    left = MAX_RANGED

    def budgeted(*args: int) -> range:
        from jinja2.sandbox import safe_range

        nonlocal left
        found = safe_range(*args)
        left -= len(found)
        if left < 0:
            raise OverflowError(f"its ranges add up to more than {MAX_RANGED}")
        return found

    return budgeted


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML characters, which a model was not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
