"""The command ``saga-store``. Nothing else of the package reads the environment or prints.

A verb is added by a module of its own: a function ``register(verbs)``, which stands in ``REGISTERED``.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from saga_store.cli import adopt, distribute, grants, metrics, migrate, retention, saga, shards, web
from saga_store.cli.carrying import carry_out
from saga_store.cli.console import Console, close, write
from saga_store.cli.exits import Exit
from saga_store.cli.verbs import Verbs

_URL = re.compile(r"postgres(?:ql)?[\w+]*:/|://[^/]*@")


class _Parser(argparse.ArgumentParser):
    """Exits with the code of what went wrong also where that can't be printed, as Python 3.11.2 doesn't."""

    def _print_message(self, message: str, file: object = None) -> None:
        is_asked_for = file is sys.stdout
        write(sys.stdout if is_asked_for else sys.stderr, message)


# Whatever follows them is never shown with its credentials.
_TAKING_URLS = {"--url", "--to", "--archive", "verify"}

REGISTERED = (
    migrate.register,
    adopt.register,
    grants.register,
    saga.register,
    retention.register,
    metrics.register,
    web.register,
    shards.register,
    distribute.register,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code (see ``Exit``); wrong usage exits with 2, as argparse does."""
    parser = make_parser()
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        _refuse_stray_urls(parser, arguments)
        given = parser.parse_args(arguments)
        if not hasattr(given, "run"):
            parser.print_help()
            return Exit.USAGE
        console = Console(as_json=given.json)
        if given.schema is not None and getattr(given, "shards", None) is not None:
            return console.fail(
                ValueError("--schema and --shards can't be given together: shards have theirs"), Exit.USAGE
            )
        return carry_out(given.run, given, console)
    finally:
        close()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs; the documentation is made of it, too."""
    parser: argparse.ArgumentParser = _Parser(
        prog="saga-store",
        description="Manage saga-store's tables in PostgreSQL.",
        epilog="Exit codes: " + "; ".join(f"{code.value} {code.meaning}" for code in Exit),
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    verbs = Verbs(parser.add_subparsers(title="commands", metavar="COMMAND"))
    for register in REGISTERED:
        register(verbs)
    return parser


def _version() -> str:
    try:
        return version("saga-store")
    except PackageNotFoundError:
        return "of a checkout, not installed"


def _refuse_stray_urls(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Exit if there is a URL where none belongs, before its password stands in somebody's message."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if _URL.search(argument) and before not in _TAKING_URLS and argument.split("=")[0] not in _TAKING_URLS:
            parser.error("a URL stands where none belongs: give it behind --url, or set DATABASE_URL")
