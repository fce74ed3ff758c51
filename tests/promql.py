"""Which metrics and labels a PromQL expression names: enough to check that they exist. promtool is the parser."""

from __future__ import annotations

import re

_WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset"}
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_GROUPED = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]")
_NAME = re.compile(r"(?<![\w.^])([a-zA-Z_:][\w:]*)(\s*\()?(\s*\{([^}]*)\})?")


def named(expression: str) -> tuple[dict[str, set[str]], set[str]]:
    """The labels that each metric is asked for, and those that all are grouped by."""
    text = _STRING.sub('""', expression)
    grouped = {label.strip() for labels in _GROUPED.findall(text) for label in labels.split(",") if label.strip()}
    text = _RANGE.sub("", _GROUPED.sub(" ", text))
    metrics: dict[str, set[str]] = {}
    for name, call, _, matchers in _NAME.findall(text):
        if not call and name not in _WORDS:
            labels = {part.split("=")[0].strip(" !~") for part in matchers.split(",") if part.strip()}
            metrics.setdefault(name, set()).update(labels)
    return metrics, grouped
