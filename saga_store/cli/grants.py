"""The verb for what the application's own role needs: prints it, or checks whether it still holds."""

import argparse

from saga_store import schema
from saga_store.cli.console import Console
from saga_store.cli.exits import Exit
from saga_store.cli.migrate import given_url
from saga_store.cli.verbs import Verbs
from saga_store.grants import grants


def register(verbs: Verbs) -> None:
    parser = verbs.add(
        "grants",
        _grants,
        summary="Print the GRANTs for the application's role, for psql; or check whether they still hold.",
        database=True,
    )
    parser.add_argument("--role", required=True, help="the role that the application connects as")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--read-only", action="store_true", help="for views and reports: let the role only read")
    kind.add_argument(
        "--archiver",
        action="store_true",
        help="for `saga-store archive`: let the role read, and let go what is archived",
    )
    parser.add_argument(
        "--check", action="store_true", help="look in the database whether the role may do that, and no more"
    )


def _grants(given: argparse.Namespace, console: Console) -> int:
    try:
        if given.check:
            return _check(given, console)
        script = grants(given.role, schema=given.schema, read_only=given.read_only, archiver=given.archiver)
    except ValueError as exc:
        return console.fail(exc, Exit.USAGE)
    console.product(script.rstrip(), sql=script)
    return Exit.DONE


def _check(given: argparse.Namespace, console: Console) -> int:
    kind = {"read_only": given.read_only, "archiver": given.archiver}
    faults = schema.check_grants(given_url(given), given.role, schema=given.schema, **kind)
    lines = [f"{given.role} may do what it has to, and no more"]
    if faults:
        remedy = (
            "Run the script of `saga-store grants` again, as the owner of the tables: it mends this, or says why not."
        )
        lines = [*(f"{given.role}: {fault}" for fault in faults), remedy]
    console.result("\n".join(lines), role=given.role, faults=faults)
    return Exit.DRIFTED if faults else Exit.DONE
