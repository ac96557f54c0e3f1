"""The verb that prints what the application's own role needs."""

import argparse

from saga_store.cli.console import Console
from saga_store.cli.exits import Exit
from saga_store.cli.verbs import Verbs
from saga_store.grants import grants


def register(verbs: Verbs) -> None:
    parser = verbs.add(
        "grants",
        _grants,
        summary="Print the GRANTs for the application's role, for psql; in the schema public, unless another is named.",
        database=False,
    )
    parser.add_argument("--role", required=True, help="the role that the application connects as")


def _grants(given: argparse.Namespace, console: Console) -> int:
    try:
        script = grants(given.role, schema=given.schema or "public")
    except ValueError as exc:
        return console.fail(exc, Exit.USAGE)
    console.result(script.rstrip(), sql=script)
    return Exit.DONE
