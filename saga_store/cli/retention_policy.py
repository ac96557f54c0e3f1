"""A policy of retention as options of a verb."""

import argparse
from datetime import timedelta

from saga_store.cli.verbs import term
from saga_store.errors import InvalidSagaDataError
from saga_store.retention import RetentionPolicy

_FOR_EVER = "ever"


def add_policy(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--completed", type=term, help="COMPLETED ones, unchanged for this long: 30d")
    parser.add_argument("--failed", type=term, help="FAILED ones, unchanged for this long: 365d")
    parser.add_argument(
        "--name",
        dest="names",
        metavar="NAME=90d",
        action="append",
        type=_named,
        default=[],
        help=f"those of a name, whether COMPLETED or FAILED; NAME={_FOR_EVER} keeps them",
    )


def asks_for_policy(given: argparse.Namespace) -> bool:
    return given.completed is not None or given.failed is not None or bool(given.names)


def policy_of(given: argparse.Namespace) -> RetentionPolicy:
    if not asks_for_policy(given):
        raise InvalidSagaDataError("--completed, --failed or --name", "must say what may go: --completed 30d")
    return RetentionPolicy(completed=given.completed, failed=given.failed, names=dict(given.names))


def _named(value: str) -> tuple[str, timedelta | None]:
    name, equals, kept = value.rpartition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{value!r} is no name and duration; write it like order=90d")
    return name, None if kept == _FOR_EVER else term(kept)
