"""Whether a database is what this release needs."""

from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Connection

from saga_store.schema.fingerprint import differences, enter_schema, expected_fingerprints, read_fingerprint
from saga_store.schema.privileges import require_readable
from saga_store.schema.scripts import recorded_revision
from saga_store.sqlalchemy.tables import REVISION


class State(StrEnum):
    """How a database stands to this release, the gravest first."""

    AHEAD = "ahead"
    """At a revision that this release doesn't know: a later one has migrated it, and should work with it."""
    BEHIND = "behind"
    """At an earlier revision, or at none: upgrade it."""
    DRIFTED = "drifted"
    """At the right revision, but somebody has changed the tables since."""
    CURRENT = "current"
    """As it should be."""


@dataclass(frozen=True, slots=True)
class Check:
    """What a check has found.

    Attributes:
        state: In a word.
        found: The revision that the database records; None: none.
        needed: The revision that this release needs.
        differences: A line for each thing that isn't as its revision makes it, also if the database is behind; empty
            if it is ahead, since what it should look like isn't known here.
    """

    state: State
    found: str | None
    needed: str
    differences: tuple[str, ...] = ()


def check_connection(connection: Connection, schema: str | None) -> Check:
    """Read, in one transaction that changes nothing, and that may go through any pooler."""
    with connection.begin():
        enter_schema(connection, schema)
        require_readable(connection, schema)
        found = recorded_revision(connection)
        fingerprint = read_fingerprint(connection)
    expected = expected_fingerprints()
    if found is not None and found not in expected:
        return Check(State.AHEAD, found, REVISION)
    lines = tuple(differences(expected[found] if found else {}, fingerprint))
    if found != REVISION:
        return Check(State.BEHIND, found, REVISION, lines)
    return Check(State.DRIFTED if lines else State.CURRENT, found, REVISION, lines)
