"""How a verb is added to the command."""

import argparse
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NoReturn

from saga_store.cli.console import Console
from saga_store.cli.exits import Exit
from saga_store.grants import check_schema
from saga_store.inspection import visible
from saga_store.schema.settings import LOCK_WAIT, seconds
from saga_store.telling import read_duration

Run = Callable[[argparse.Namespace, Console], int]


class _TerseParser(argparse.ArgumentParser):
    """Says in one line what is wrong, in place of all that would be right; every character of it can be seen."""

    def parse_known_args(  # type: ignore[override] # one of its overloads is all that argparse calls
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(Exit.USAGE, f"{self.prog}: {visible(message)}; see --help\n")


class Verbs:
    """The verbs of the command; each gets the options that all of its kind have."""

    def __init__(self, subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        self._subparsers = subparsers

    def parser(self, name: str) -> argparse.ArgumentParser:
        """Return that of a verb that was added, for more options."""
        return self._subparsers.choices[name]

    def group(self, name: str, *, summary: str) -> "Verbs":
        """Add a noun, and return what its own verbs are added to."""
        parser = self._subparsers.add_parser(name, help=summary, description=summary)
        return Verbs(
            parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_TerseParser)
        )

    def add(self, name: str, run: Run, *, summary: str, database: bool, waits: bool = False) -> argparse.ArgumentParser:
        """Add a verb and return its parser, for options of its own.

        Args:
            name: What is typed.
            run: Called with what was parsed; returns the exit code.
            summary: One sentence for the help.
            database: Whether it needs one, and so ``--url``.
            waits: Whether it takes locks, and so ``--lock-wait``.
        """
        parser = self._subparsers.add_parser(name, help=summary, description=summary)
        parser.set_defaults(run=run)
        parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
        parser.add_argument(
            "--schema", metavar="NAME", type=_schema, help="where the tables are (default: by the search_path)"
        )
        if database:
            parser.add_argument("--url", help="the database; without it, DATABASE_URL of the environment")
        if waits:
            parser.add_argument(
                "--lock-wait",
                metavar="SECONDS",
                type=_seconds,
                default=LOCK_WAIT,
                help="how long to wait for another migration, and then in each revision for the tables (default: 60)",
            )
        return parser


def _schema(name: str) -> str:
    try:
        check_schema(name)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return name


def _seconds(value: str) -> timedelta:
    try:
        return seconds(value)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{value!r} can't be used: {exc}") from exc


def duration(value: str) -> timedelta:
    """Read a duration such as 90s, for argparse."""
    try:
        return read_duration(value)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def term(value: str) -> timedelta:
    """Read how long something is kept: a duration with its unit, for 30 may mean days to who writes it; or 0."""
    found = duration(value)
    if found and value[-1].isdigit():
        raise argparse.ArgumentTypeError(f"{value!r:.60} has no unit; write it like 90s, 12h or 30d")
    return found
