"""How the verbs of ``saga`` print: for a person as blocks, for a machine as one JSON object or one a line."""

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saga_store.cli.blocks import Block, Line, Verbatim, as_text
from saga_store.cli.console import Console, warn
from saga_store.cli.exits import Exit, worst_of
from saga_store.cli.storages import missing_of, reason_of
from saga_store.storage import SagaStorage

_NARROWEST = 60
# For a stdout whose encoding has no such signs.
_IN_ASCII = str.maketrans(
    {
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{EM DASH}": "-",
        "\N{HEAVY CHECK MARK}": "+",
        "\N{HEAVY MULTIPLICATION X}": "x",
        "\N{BLACK DIAMOND}": "*",
        "\N{BLACK RIGHT-POINTING TRIANGLE}": ">",
        "\N{MIDDLE DOT}": ".",
        "\N{RIGHTWARDS ARROW}": "->",
        "\N{BOX DRAWINGS HEAVY HORIZONTAL}": "=",
        "\N{BOX DRAWINGS HEAVY DOUBLE DASH HORIZONTAL}": "~",
        "\N{BOX DRAWINGS LIGHT QUADRUPLE DASH VERTICAL}": ":",
        "\N{BOX DRAWINGS LIGHT QUADRUPLE DASH HORIZONTAL}": "-",
        **{chr(0x2581 + level): str(level + 1) for level in range(8)},  # the bars of a histogram
    }
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ndjson", action="store_true", help="print JSON, an object a line")


class Output:
    """Prints what a verb has found; of the forms only the one that was asked for is worked out."""

    def __init__(self, given: argparse.Namespace, console: Console) -> None:
        self.in_lines: bool = given.ndjson
        self.for_machines: bool = given.json or given.ndjson
        self.console = console
        self.on_terminal: bool = not self.for_machines and sys.stdout is not None and sys.stdout.isatty()
        self._missing: set[int] = set()

    def found(
        self, blocks: Sequence[Block], facts: Mapping[str, Any], lines: Iterable[Mapping[str, Any]] | None = None
    ) -> None:
        """Print what the command was called for; ``lines`` are what the facts are in lines, if they are several.

        Raises:
            UnprintableError: It couldn't be written.
        """
        if self.in_lines:
            self.console.lines([facts] if lines is None else lines)
        else:
            self.console.product("" if self.for_machines else self.text(blocks), **facts)

    def note(self, said: Iterable[Line | Verbatim]) -> None:
        """Say beside what a machine reads what else a person should know."""
        for each in said:
            warn(as_text([each], None))

    def lacks(self, storage: SagaStorage, shards: Iterable[int]) -> None:
        """Say which shards are missing in what was found, and why; each once."""
        reasons = missing_of(storage)
        for shard in sorted(set(shards) - self._missing):
            # One that has answered meanwhile has no reason any more.
            why = reason_of(reasons[shard]) if shard in reasons else f"shard {shard} didn't answer"
            warn(f"{why}; its sagas are missing here")
            self._missing.add(shard)

    def code(self, code: Exit) -> Exit:
        """Return how a verb ends that has found, or done, what there was on the shards that answered."""
        return worst_of([code, Exit.PARTLY]) if self._missing else code

    def done(
        self, blocks: Sequence[Block], facts: Mapping[str, Any], lines: Iterable[Mapping[str, Any]] | None = None
    ) -> None:
        """Print what was done, which isn't undone if that can't be printed."""
        if self.in_lines and lines is not None:
            self.console.results(lines)
        else:
            self.console.result("" if self.for_machines else self.text(blocks), **facts)

    def text(self, blocks: Sequence[Block]) -> str:
        """Return blocks as stdout can show them: in colours on a terminal, if rich is installed."""
        if self.on_terminal:
            room = max(shutil.get_terminal_size().columns, _NARROWEST)
            found = _in_colours(blocks, room) or as_text(blocks, room)
        else:
            found = as_text(blocks, None)
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        try:
            found.encode(encoding)
        except UnicodeEncodeError:
            spelled = found.translate(_IN_ASCII)
            found = spelled.encode(encoding, "backslashreplace").decode(encoding)
        return found


def _in_colours(blocks: Sequence[Block], room: int) -> str | None:
    """Return blocks as rich writes them; None if it isn't installed, or the terminal is a dumb one."""
    if os.environ.get("TERM", "dumb") in {"dumb", "unknown"}:
        return None
    try:
        from saga_store.cli import rich_writer  # noqa: PLC0415 - an extra, and slow to import
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] != "rich":
            raise
        return None
    return rich_writer.write(blocks, sys.stdout, room)
