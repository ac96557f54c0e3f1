"""The verbs that migrate: upgrade, downgrade, stamp, current, check, history, sql."""

import argparse
import os
from dataclasses import asdict

from saga_store import schema
from saga_store.cli.console import Console
from saga_store.cli.exits import Exit
from saga_store.cli.verbs import Verbs


def register(verbs: Verbs) -> None:
    upgrade = verbs.add("upgrade", _upgrade, summary="Bring the database up to date.", database=True, waits=True)
    upgrade.add_argument("revision", nargs="?", default="head", help="where to (default: head)")
    upgrade.add_argument("--create-schema", action="store_true", help="create the schema if it isn't there")
    downgrade = verbs.add(
        "downgrade", _downgrade, summary="Undo revisions, with what they hold.", database=True, waits=True
    )
    downgrade.add_argument("revision", help="where to: an id, -1 for one step, or base for no tables at all")
    stamp = verbs.add("stamp", _stamp, summary="Record a revision and run nothing.", database=True, waits=True)
    stamp.add_argument("revision")
    verbs.add("current", _current, summary="Print the revision that the database is at.", database=True)
    check = verbs.add(
        "check", _check, summary="Fail unless the database is what this release needs: a gate, a probe.", database=True
    )
    check.add_argument("--strict", action="store_true", help="fail for notes, too, which do no harm")
    verbs.add("history", _history, summary="List the revisions of this release.", database=False)
    sql = verbs.add("sql", _sql, summary="Print a migration as SQL, for psql -v ON_ERROR_STOP=1.", database=False)
    sql.add_argument("range", nargs="?", default="base:head", help="FROM:TO, up or down (default: base:head)")
    sql.add_argument("--create-schema", action="store_true", help="create the schema if it isn't there")


def given_url(given: argparse.Namespace) -> str:
    """Return the database that was given to the command."""
    return given.url or os.environ.get("DATABASE_URL", "")


def _upgrade(given: argparse.Namespace, console: Console) -> int:
    applied = schema.upgrade(
        given_url(given),
        given.revision,
        schema=given.schema,
        create_schema=given.create_schema,
        lock_wait=given.lock_wait,
        report=console.report,
    )
    console.result(f"applied {', '.join(applied)}" if applied else "nothing to do", applied=applied)
    return Exit.DONE


def _downgrade(given: argparse.Namespace, console: Console) -> int:
    undone = schema.downgrade(given_url(given), given.revision, schema=given.schema, lock_wait=given.lock_wait)
    console.result(f"undid {', '.join(undone)}" if undone else "nothing to do", undone=undone)
    return Exit.DONE


def _stamp(given: argparse.Namespace, console: Console) -> int:
    schema.stamp(given_url(given), given.revision, schema=given.schema, lock_wait=given.lock_wait)
    return _current(given, console)


def _current(given: argparse.Namespace, console: Console) -> int:
    found = schema.current(given_url(given), schema=given.schema)
    console.product(found or "none", revision=found)
    return Exit.DONE


def _check(given: argparse.Namespace, console: Console) -> int:
    found = schema.check(given_url(given), schema=given.schema, strict=given.strict)
    at = f"at {found.found or 'no revision'}, {found.needed} is needed"
    if found.state is schema.State.AHEAD:
        at += ": a later release has migrated it"
    lines = [f"{found.state}: the database is {at}", *found.differences, *(f"note: {note}" for note in found.notes)]
    console.result("\n".join(lines), **asdict(found))
    return {
        schema.State.CURRENT: Exit.DONE,
        schema.State.BEHIND: Exit.BEHIND,
        schema.State.AHEAD: Exit.AHEAD,
        schema.State.DRIFTED: Exit.DRIFTED,
    }[found.state]


def _history(_given: argparse.Namespace, console: Console) -> int:
    revisions = schema.history()
    lines = [f"{found.revision}  {found.description}" for found in revisions]
    console.product("\n".join(lines), revisions=[asdict(found) for found in revisions])
    return Exit.DONE


def _sql(given: argparse.Namespace, console: Console) -> int:
    start, _, end = given.range.partition(":")
    script = schema.sql(start or "base", end or "head", schema=given.schema, create_schema=given.create_schema)
    console.product(script.rstrip(), sql=script)
    return Exit.DONE
