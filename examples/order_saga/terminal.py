"""What a person sees: lines, and plain tables with text to the left and numbers to the right."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any


def say(line: str = "") -> None:
    # Flushed, so that what is said through a pipe arrives when it is said.
    print(line, flush=True)  # noqa: T201 - a demo speaks to its terminal


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows under a title, their keys as the heading."""
    say(f"\n  {title}")
    if not rows:
        say("    (none)")
        return
    heading = list(rows[0])
    lines = [heading, *([_text(row[name]) for name in heading] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    numeric = [isinstance(value, int | Decimal) for value in rows[0].values()]
    for line in lines:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        say(f"    {'  '.join(cells).rstrip()}")


def _text(value: object) -> str:
    return "" if value is None else str(value)
