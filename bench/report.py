"""Numbers for people and programs: percentiles, tables, a JSON line. Does not know what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence


def percentile(values: Sequence[float], percent: float, zeros: int = 0) -> float:
    """The nearest-rank percentile of `values` and of as many further `zeros`; nan of nothing."""
    count = len(values) + zeros
    if not count:
        return math.nan
    rank = max(1, math.ceil(count * percent / 100))
    return 0.0 if rank <= zeros else sorted(values)[rank - zeros - 1]


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return math.nan
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def milliseconds(seconds: Sequence[float], zeros: int = 0) -> dict[str, float]:
    return {f"p{percent}": percentile(seconds, percent, zeros) * 1000 for percent in (50, 90, 99)}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they need; the first to the left, numbers to the right."""
    cells = [list(head), *([shown(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        first, *rest = (cell.ljust(widths[0]) if not i else cell.rjust(widths[i]) for i, cell in enumerate(row))
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def shown(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def json_line(result: Mapping[str, object]) -> str:
    """The last line of every bench: numbers to four figures, null where there was nothing to measure."""
    return json.dumps(_rounded(result), separators=(",", ":"))


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _rounded(held) for key, held in value.items()}
    return [_rounded(held) for held in value] if isinstance(value, (list, tuple)) else value
