"""What is shown to a person, before it is known how wide their terminal is: lines, tables and bars; no I/O.

Text gets in here by ``cell`` and ``shown``, which make every character visible. So whatever writes blocks can't be made
to write anything but text, whatever names, owners and errors hold.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from saga_store.inspection import visible

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
GAP = 2
"""How many blanks stand between two columns."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Some text of one kind.

    Attributes:
        text: The text, visible.
        kind: What it is: good, bad, warning, doubt, held, person, dim, strong; empty: nothing special.
        short: What will do where there is little room.
        mark: A sign before it, so that colours aren't needed to tell its kind; what is wrapped goes on beside it.
    """

    text: str
    kind: str = ""
    short: str | None = None
    mark: str = ""

    @property
    def whole(self) -> str:
        return f"{self.mark} {self.text}" if self.mark else self.text


@dataclass(frozen=True, slots=True)
class Bar:
    """Pieces of a bar, each from where to where on a scale of 0 to 1, and of what kind."""

    pieces: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """Cells beside each other, wrapped where the terminal ends, indented by so many blanks."""

    cells: tuple[Cell, ...] = ()
    indent: int = 0


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Lines that are to be copied: they are never wrapped or cut."""

    text: str


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        head: Its heading.
        least: How narrow it may get, if it isn't narrower anyway.
        likes: How wide it gets, if it needs to, before others get more than their least.
        leaves: If there isn't room for all, the columns with the greatest number go first; 0 never goes.
        right: Whether it is flush right.
        wraps: Whether what is longer goes on in the next line, in place of being cut.
    """

    head: str
    least: int = 4
    likes: int = 0
    leaves: int = 0
    right: bool = False
    wraps: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table, with text below it that isn't bound to a column."""

    cells: tuple[Cell | Bar, ...]
    below: Cell | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows in columns. A column of bars is left out where nothing can be drawn."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def natural_widths(self) -> list[int]:
        widths = [width(column.head) for column in self.columns]
        for row in self.rows:
            for index, one in enumerate(row.cells):
                widths[index] = max(widths[index], width(one.whole) if isinstance(one, Cell) else 0)
        return widths


Block = Line | Table | Verbatim


def cell(text: str, kind: str = "", *, short: str | None = None, mark: str = "") -> Cell:
    return Cell(visible(text), kind, None if short is None else visible(short), mark)


def line(*parts: str | Cell, indent: int = 0) -> Line:
    """Return a line of these cells, beside each other with a blank in between."""
    return Line(tuple(part if isinstance(part, Cell) else cell(part) for part in parts), indent)


def shown(text: str, kind: str = "", *, indent: int = 0) -> list[Line]:
    """Return a text of several lines."""
    return [line(cell(each, kind), indent=indent) for each in text.split("\n")]


# Vowels and finals of Korean syllables, which are one with what stands before them.
_JOINED = frozenset(map(chr, [*range(0x1160, 0x1200), *range(0xD7B0, 0xD7FC)]))


def width(text: str) -> int:
    """Return how many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    return sum(map(_width, text))


def _width(character: str) -> int:
    if unicodedata.category(character) in {"Mn", "Me", "Mc"} or character in _JOINED:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def cut(text: str, room: int) -> str:
    """Return the text, or as much of its beginning as there is room for."""
    if width(text) <= room:
        return text
    taken, kept = 0, 0
    for character in text:
        taken += _width(character)
        if taken > room - 1:
            break
        kept += 1
    return text[:kept] + ELLIPSIS


def fit(table: Table, room: int) -> list[tuple[int, int]]:
    """Return the columns for which there is room, by their indexes, and how wide each may be."""
    natural = table.natural_widths()
    least = [min(wide, column.least) for wide, column in zip(natural, table.columns, strict=True)]
    kept = list(range(len(natural)))

    def taken(widths: Sequence[int]) -> int:
        return sum(widths[index] for index in kept) + GAP * (len(kept) - 1)

    while taken(least) > room and (rank := max(table.columns[index].leaves for index in kept)):
        kept = [index for index in kept if table.columns[index].leaves != rank]
    widths = list(least)
    likes = [min(wide, column.likes) for wide, column in zip(natural, table.columns, strict=True)]
    for wanted in (likes, natural):
        _widen(widths, wanted, kept, room - taken(widths))
    return [(index, widths[index]) for index in kept]


def _widen(widths: list[int], wanted: Sequence[int], kept: Sequence[int], left: int) -> None:
    """Let columns grow towards what they want; who needs little gets it all, the others share what is left."""
    lacks = {index: wanted[index] - widths[index] for index in kept if wanted[index] > widths[index]}
    growing = sorted(lacks, key=lambda index: lacks[index])
    for position, index in enumerate(growing):
        more = max(min(lacks[index], left // (len(growing) - position)), 0)
        widths[index] += more
        left -= more


def as_text(blocks: Sequence[Block], room: int | None) -> str:
    """Return blocks as plain text; no row of a table is longer than ``room``, if there is an end to it."""
    lines: list[str] = []
    for block in blocks:
        match block:
            case Verbatim(text):
                lines += text.split("\n")
            case Line(cells, indent):
                lines.append(" " * indent + " ".join(each.whole for each in cells))
            case Table():
                lines += _rows(block, room)
    return "\n".join(one.rstrip() for one in lines)


def _rows(table: Table, room: int | None) -> list[str]:
    drawn = {index for row in table.rows for index, found in enumerate(row.cells) if isinstance(found, Bar)}
    fitting = list(enumerate(table.natural_widths())) if room is None else fit(table, room)
    columns = [(index, wide) for index, wide in fitting if index not in drawn]

    def row(cells: Sequence[Cell]) -> str:
        padded = []
        for (index, wide), one in zip(columns, cells, strict=True):
            text = cut(one.whole if one.short is None or width(one.whole) <= wide else one.short, wide)
            blanks = " " * (wide - width(text))
            padded.append(blanks + text if table.columns[index].right else text + blanks)
        return (" " * GAP).join(padded)

    lines = [row([Cell(table.columns[index].head) for index, _ in columns])]
    for each in table.rows:
        lines.append(row([found for index, _ in columns if isinstance(found := each.cells[index], Cell)]))
        if each.below is not None:
            below = f"    {each.below.whole}"
            lines.append(below if room is None else cut(below, room))
    return lines
