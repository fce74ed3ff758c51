"""Answers whose format the tokenizer declares itself: transformers' `response_template`, followed as text arrives.

Such a declaration names regions of an answer (content, reasoning, calls), each with what opens and closes it, and how
to read what it holds; text outside of them is the region that nothing opens. Text streams; a call goes out when its
region closes, and a region that holds none is content, its markers included. Knows no prompt and no chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import regex

from pipelines.answer.calls import typed
from pipelines.answer.deltas import Arguments, Call, Content, Delta, Reasoning, merged, new_call_id
from pipelines.tools import NAME

_REASONING = ("reasoning_content", "reasoning", "thinking")
_MARK = regex.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")
_PLACEHOLDER = regex.compile(r"\{(\w+(?:\.\w+)*)\}")


@dataclass(frozen=True)
class Region:
    name: str
    opens: Any  # patterns, or None
    closes: Any
    fixed: bool  # whether both are literal texts, which no further character changes
    parser: str
    args: Mapping[str, Any]
    transform: Any
    each: bool
    join: str


@dataclass(frozen=True)
class Declared:
    regions: tuple[Region, ...]
    implicit: Region | None  # the one that nothing opens
    anchor: Any  # what ends the prompt, but for the beginning of the answer that it may hold
    marks: frozenset[str]  # markers in it, which may be special tokens

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Declared:
        """Raises ValueError for a declaration that cannot be followed."""
        try:
            if spec.get("version", 1) != 1:
                raise ValueError(f"version {spec['version']} is not known")
            regions = tuple(_region(name, field) for name, field in spec["fields"].items())
            anchor = _anchor(spec, "start_anchor", "start_anchor_pattern")[0]
        except (AttributeError, KeyError, TypeError, regex.error) as error:
            raise ValueError(f"response_template: {type(error).__name__}: {error}") from None
        implicit = [region for region in regions if region.opens is None]
        if len(implicit) > 1:
            raise ValueError("response_template: more than one field has no 'open'")
        explicit = [
            pattern for region in regions if region.opens for pattern in (region.opens, region.closes) if pattern
        ]
        marks = {mark for pattern in explicit for mark in _MARK.findall(pattern.pattern.replace("\\", ""))}
        return cls(regions, implicit[0] if implicit else None, anchor, frozenset(marks))

    def prefill(self, prompt: str) -> str:
        """The beginning of the answer that the prompt holds already."""
        ends = [found.end() for found in self.anchor.finditer(prompt)] if self.anchor else []
        return prompt[ends[-1] :] if ends else ""


def _region(name: str, field: Mapping[str, Any]) -> Region:
    opens, fixed_open = _anchor(field, "open", "open_pattern")
    closes, fixed_close = _anchor(field, "close", "close_pattern")
    return Region(
        name=name,
        opens=opens,
        closes=closes,
        fixed=fixed_open and fixed_close,
        parser=field.get("content", "text"),
        args=field.get("content_args", {}),
        transform=field.get("transform"),
        each=field.get("transform_each", False),
        join=field.get("join") or "",
    )


def _anchor(field: Mapping[str, Any], literal: str, pattern: str) -> tuple[Any, bool]:
    """A pattern, and whether it is of literal texts of which none begins another."""
    if literal in field:
        texts = [field[literal]] if isinstance(field[literal], str) else list(field[literal])
        texts.sort(key=len, reverse=True)
        fixed = not any(a is not b and a.startswith(b) for a in texts for b in texts)
        return regex.compile("|".join(map(regex.escape, texts)), regex.DOTALL), fixed
    return (regex.compile(field[pattern], regex.DOTALL), False) if pattern in field else (None, True)


class DeclaredParser:
    """One answer (`parser.AnswerParser`)."""

    def __init__(self, declared: Declared, schemas: Mapping[str, Mapping[str, Any]], prefill: str = "") -> None:
        self._declared = declared
        self._schemas = schemas
        self._pending = prefill
        self._out: list[Delta] = []
        self._calls = 0
        self._told: set[str] = set()  # regions that have given text
        self._enter(declared.implicit, None)
        self._step(final=False)
        self._out = []  # what the prompt holds is no answer

    def push(self, text: str) -> list[Delta]:
        self._pending += text
        return self._step(final=False)

    def finish(self) -> list[Delta]:
        return self._step(final=True)

    def _step(self, *, final: bool) -> list[Delta]:
        while True:
            found, hold = self._search(final)
            if found is None:
                break
            opening, match = found
            self._take(self._pending[: match.start()])
            self._pending = self._pending[match.end() :]
            self._leave("" if opening else match.group())
            self._enter(opening or self._declared.implicit, match if opening else None)
        self._take(self._pending[:hold])
        self._pending = self._pending[hold:]
        if final:
            self._leave("")
        out, self._out = self._out, []
        return merged(out)

    def _search(self, final: bool) -> tuple[tuple[Region | None, Any] | None, int]:
        """The next marker that is certain, with the region it opens; and up to where no marker can begin."""
        region, implicit = self._region, self._declared.implicit
        watched: list[tuple[Region | None, Any, bool]]
        if region is not None and region is not implicit:
            watched = [(None, region.closes, region.fixed)]
        else:
            watched = [(other, other.opens, other.fixed) for other in self._declared.regions]
            watched += [(None, implicit.closes, implicit.fixed)] if implicit else []
        best: tuple[Region | None, Any] | None = None
        hold = len(self._pending)
        for opening, pattern, fixed in watched:
            match = pattern.search(self._pending, partial=not final) if pattern else None
            if match is None or not (match.partial or match.group()):
                continue
            if match.partial or (match.end() == len(self._pending) and not (fixed or final)):
                hold = min(hold, match.start())
            elif best is None or match.start() < best[1].start():
                best = opening, match
        return (best, hold) if best and best[1].start() < hold else (None, hold)

    def _enter(self, region: Region | None, opened: Any) -> None:
        self._region = region
        self._opener = opened.group() if opened else ""
        self._groups: Mapping[str, str] = {k: v for k, v in opened.groupdict().items() if v} if opened else {}
        self._body = ""  # of what is read when its region closes
        self._space = ""  # of a text, which may be its end
        self._fresh = True

    def _take(self, text: str) -> None:
        region = self._region
        if region is None or not text:  # between regions the declaration knows no text
            return
        if region.name == "tool_calls":
            self._body += text
            return
        if region.args.get("strip", True):
            text = self._space + text
            text = text.lstrip() if self._fresh else text
            self._space = text[len(text.rstrip()) :]
            text = text.rstrip()
        if not text:
            return
        if self._fresh and region.name in self._told:
            text = region.join + text
        self._fresh = False
        self._told.add(region.name)
        self._out.append(Reasoning(text) if region.name in _REASONING else Content(text))

    def _leave(self, closer: str) -> None:
        region = self._region
        if region is None or region.name != "tool_calls":
            return
        try:
            calls = list(_calls(region, self._body, self._groups, self._schemas))
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            self._out.append(Content(self._opener + self._body + closer))
            return
        for name, arguments in calls:
            self._out += [Call(self._calls, new_call_id(), name), Arguments(self._calls, arguments)]
            self._calls += 1


def _calls(
    region: Region, body: str, groups: Mapping[str, str], schemas: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """The calls of a region, each a name and its arguments' JSON. Raises whatever a bad text makes of them."""
    content = _parsed(region.parser, region.args, body)
    if region.transform is None:
        values = content
    elif region.each:
        values = [_filled(region.transform, {**groups, **item}) for item in content]
    else:
        values = _filled(region.transform, {**groups, "content": content})
    for value in values if isinstance(values, list) else [values]:
        function = value.get("function", value)
        name, arguments = function["name"], function.get("arguments") or {}
        if not NAME.fullmatch(name):
            raise ValueError(name)
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        properties = schemas.get(name, {}).get("properties", {})
        if region.parser != "json":  # values are text, and the schema says of which kind
            texts = ((key, item) for key, item in arguments.items() if isinstance(item, str))
            arguments = {**arguments, **{key: json.loads(typed(item, properties.get(key))) for key, item in texts}}
        text = json.dumps(dict(arguments), ensure_ascii=False)
        text.encode()
        yield name, text


def _parsed(parser: str, args: Mapping[str, Any], text: str) -> Any:
    if parser == "json":
        return _json(text, args)
    if parser == "xml-inline":
        found = regex.finditer(args["tag_pattern"], text, flags=regex.DOTALL)
        return {match["key"]: _value(match["value"], args) for match in found}
    if parser == "kv-lines":
        lines = (line.partition(args.get("kv_sep", ":")) for line in text.split(args.get("line_sep", "\n")))
        return {key.strip(): _value(value.strip(), args) for key, separator, value in lines if separator}
    return text.strip()


def _value(text: str, args: Mapping[str, Any]) -> Any:
    inner = args.get("value_parser")
    return _parsed(inner.get("name", "text"), inner.get("args", {}), text) if inner else text


def _json(text: str, args: Mapping[str, Any]) -> Any:
    """JSON, or a dialect with quotes of its own and bare keys."""
    quotes = "|".join(
        f"{regex.escape(opened)}(.*?){regex.escape(closed)}" for opened, closed in args.get("string_delims", [])
    )
    parts = regex.split(f"(?:{quotes})", text, flags=regex.DOTALL) if quotes else [text]
    step = len(args.get("string_delims", [])) + 1  # each quoted text comes as one group of these
    written = []
    for index, part in enumerate(parts):
        if index % step:
            written.append("" if part is None else json.dumps(part))
        elif args.get("unquoted_keys"):
            written.append(regex.sub(r"(?<=[{,]\s*)(\w+)\s*:", r'"\1":', part))
        else:
            written.append(part)
    try:
        return json.loads("".join(written))
    except ValueError:
        if args.get("allow_non_json"):
            return text.strip()
        raise


def _filled(transform: Any, scope: Mapping[str, Any]) -> Any:
    """A template of the value, whose placeholders are whole strings: `{content.name}`."""
    if isinstance(transform, dict):
        return {key: _filled(value, scope) for key, value in transform.items()}
    if isinstance(transform, list):
        return [_filled(value, scope) for value in transform]
    placeholder = _PLACEHOLDER.fullmatch(transform) if isinstance(transform, str) else None
    if placeholder is None:
        return transform
    value: Any = scope
    for key in placeholder[1].split("."):
        value = value[key]
    return value
