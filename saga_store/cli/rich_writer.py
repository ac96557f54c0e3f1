"""Blocks on a terminal, in colours and to its width, by rich; imported only where rich is there.

rich gets ``Text``, never its markup: a name may hold brackets.
"""

import re
from collections.abc import Sequence
from io import StringIO
from itertools import groupby
from operator import itemgetter
from typing import TextIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from saga_store.cli.blocks import GAP, Bar, Block, Cell, Column, Line, Table, Verbatim, fit, width

_STYLES = {
    "good": "green",
    "bad": "bold red",
    "warning": "yellow",
    "doubt": "bold yellow",
    "held": "cyan",
    "person": "bold magenta",
    "dim": "dim",
    "strong": "bold",
}
# What each kind of piece is drawn with, so that colours aren't needed to tell them apart.
_SOLID, _DASHED = "\N{BOX DRAWINGS HEAVY HORIZONTAL}", "\N{BOX DRAWINGS HEAVY DOUBLE DASH HORIZONTAL}"
# What it is drawn with, and what it ends with.
_STROKES = {
    "good": (_SOLID, _SOLID),
    "bad": (_SOLID, "\N{HEAVY MULTIPLICATION X}"),
    "doubt": (_DASHED, "?"),
    "held": (_DASHED, "\N{BLACK RIGHT-POINTING TRIANGLE}"),
    "person": ("\N{BLACK DIAMOND}",) * 2,
    "cut": ("\N{BOX DRAWINGS LIGHT QUADRUPLE DASH VERTICAL}",) * 2,
}
_RESET = "\x1b[0m"
_BLANK_END = re.compile(r"(?:\s|\x1b\[[0-9;]*m)*$")
_BAR_ROOM = 12
"""A bar that is shorter says nothing."""


def write(blocks: Sequence[Block], stream: TextIO, room: int) -> str:
    """Return what is to be written to a terminal that is so wide; ``stream`` tells what colours it has."""
    told = Console(file=stream)
    console = Console(
        file=StringIO(),
        force_terminal=True,
        color_system=told.color_system,  # type: ignore[arg-type] # rich gives it as str and takes it as Literal
        no_color=told.no_color,
        # There is a gap after a table's last column, too, for versions of rich differ in what they do without it.
        width=room + GAP,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    return "\n".join(_block(console, block, room) for block in blocks)


def _block(console: Console, block: Block, room: int) -> str:
    if isinstance(block, Verbatim):
        return block.text
    with console.capture() as capture:
        if isinstance(block, Line):
            parts = [_text(each) for each in block.cells]
            console.print(Padding(Text(" ").join(parts), (0, 0, 0, block.indent)), width=room)
        else:
            _print_table(console, block, room)
    return "\n".join(map(_without_end, capture.get().removesuffix("\n").split("\n")))


def _without_end(line: str) -> str:
    """Return the line without blanks at its end, in whatever colour."""
    seen = _BLANK_END.sub("", line)
    return f"{seen}{_RESET}" if "\x1b" in seen else seen


def _text(cell: Cell) -> Text:
    return Text(cell.whole, _STYLES.get(cell.kind, ""))


def _print_table(console: Console, table: Table, room: int) -> None:
    columns = fit(table, room)
    drawn = {index for row in table.rows for index, found in enumerate(row.cells) if isinstance(found, Bar)}
    if drawn:
        # What is left after the columns of text is for the bars.
        columns = [(index, wide) for index, wide in columns if index not in drawn]
        left = room - sum(wide + GAP for _, wide in columns)
        columns += [(index, left) for index in drawn if left >= _BAR_ROOM]
    part = _begin(table, columns, with_heads=any(column.head for column in table.columns))
    for row in table.rows:
        part.add_row(*(_drawn(console, row.cells[index], wide, table.columns[index]) for index, wide in columns))
        if row.below is not None:
            console.print(part)
            console.print(Padding(_text(row.below), (0, 0, 0, 4)), width=room)
            part = _begin(table, columns, with_heads=False)
    if part.row_count or not table.rows:
        console.print(part)


def _begin(table: Table, columns: Sequence[tuple[int, int]], *, with_heads: bool) -> RichTable:
    begun = RichTable(box=None, padding=(0, GAP, 0, 0), show_header=with_heads, header_style="bold")
    for index, wide in columns:
        column = table.columns[index]
        begun.add_column(
            Text(column.head),
            width=wide,
            justify="right" if column.right else "left",
            no_wrap=not column.wraps,
            overflow="fold" if column.wraps else "ellipsis",
        )
    return begun


def _drawn(console: Console, found: Cell | Bar, room: int, column: Column) -> Text:
    if isinstance(found, Bar):
        return _bar(found, room)
    if width(found.whole) <= room:
        return _text(found)
    if found.short is not None:
        found = Cell(found.short, found.kind)
    style = _STYLES.get(found.kind, "")
    if not (column.wraps and found.mark):
        return Text(found.whole, style)
    lines = Text(found.text).wrap(console, room - 2, overflow="fold")
    return Text(f"{found.mark} " + "\n  ".join(each.plain.rstrip() for each in lines), style)


def _bar(bar: Bar, room: int) -> Text:
    strokes: list[tuple[str, str]] = [(" ", "")] * room
    for begin, end, kind in bar.pieces:
        first = min(int(begin * room), room - 1)
        last = max(min(int(end * room), room), first + 1)
        drawn, ends = _STROKES.get(kind, _STROKES["good"])
        style = "dim" if kind == "cut" else _STYLES.get(kind, "")
        strokes[first:last] = [*[(drawn, style)] * (last - first - 1), (ends, style)]
    return Text.assemble(*(("".join(one for one, _ in run), style) for style, run in groupby(strokes, itemgetter(1))))
