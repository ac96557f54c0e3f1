"""Whether a database is what this release needs: what the catalog says of its tables, beside what a revision makes.

Alembic's comparison doesn't look into CHECKs, nor for indexes that are INVALID. The words are the same on every
version of PostgreSQL that is supported, and in every schema.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources

from sqlalchemy import Connection, bindparam, text

from saga_store.schema.privileges import require_readable
from saga_store.schema.scripts import recorded_revision
from saga_store.schema.session import enter_schema
from saga_store.sqlalchemy import Base
from saga_store.sqlalchemy.tables import REVISION

Fingerprint = Mapping[str, str]
"""For each thing, such as ``column saga_logs.details``, what it is."""

# Names are unqualified where the search_path finds them, and `pretty` texts leave the schema out as well.
# Comments and the order of columns make no difference to anybody; NOT NULL stands at the column on every version.
_CATALOG = text("""
WITH tables AS (
    SELECT c.oid, c.relname, c.relkind, c.relpersistence, c.reloptions
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = current_schema() AND c.relname IN :tables AND c.relkind IN ('r', 'p')
)
SELECT 'table ' || relname, CASE relkind WHEN 'p' THEN 'partitioned' ELSE 'ordinary' END
    || CASE relpersistence WHEN 'p' THEN '' ELSE ', not logged' END
    || COALESCE(', ' || (SELECT string_agg(option, ', ' ORDER BY option) FROM unnest(reloptions) AS option), '')
FROM tables
UNION ALL
SELECT 'column ' || t.relname || '.' || a.attname,
    format_type(a.atttypid, a.atttypmod)
    || CASE WHEN a.attcollation IN (0, y.typcollation) THEN '' ELSE ' COLLATE ' || quote_ident(l.collname) END
    || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
    || CASE a.attidentity WHEN '' THEN '' ELSE ' IDENTITY' END
    || COALESCE(CASE a.attgenerated WHEN '' THEN ' DEFAULT ' ELSE ' GENERATED ' END
        || pg_get_expr(d.adbin, d.adrelid, TRUE), '')
FROM tables t
JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_type y ON y.oid = a.atttypid
LEFT JOIN pg_collation l ON l.oid = a.attcollation
LEFT JOIN pg_attrdef d ON d.adrelid = t.oid AND d.adnum = a.attnum
UNION ALL
SELECT 'constraint ' || t.relname || '.' || k.conname,
    pg_get_constraintdef(k.oid, TRUE) || CASE WHEN k.condeferrable THEN ' (deferrable)' ELSE '' END
FROM tables t JOIN pg_constraint k ON k.conrelid = t.oid
WHERE k.contype <> 'n'
UNION ALL
SELECT 'index ' || t.relname || '.' || i.relname,
    pg_get_indexdef(i.oid, 0, TRUE) || CASE WHEN x.indisvalid AND x.indisready THEN '' ELSE ' INVALID' END
FROM tables t JOIN pg_index x ON x.indrelid = t.oid JOIN pg_class i ON i.oid = x.indexrelid
UNION ALL
SELECT 'trigger ' || t.relname || '.' || g.tgname,
    pg_get_triggerdef(g.oid, TRUE) || CASE WHEN g.tgenabled = 'O' THEN '' ELSE ' (not enabled as usual)' END
FROM tables t JOIN pg_trigger g ON g.tgrelid = t.oid
WHERE NOT g.tgisinternal
""").bindparams(bindparam("tables", list(Base.metadata.tables), expanding=True))


def read_fingerprint(connection: Connection) -> Fingerprint:
    """Read that of our tables, in a transaction that has entered their schema."""
    return {str(thing): str(being) for thing, being in connection.execute(_CATALOG)}


@cache
def expected_fingerprints() -> Mapping[str, Fingerprint]:
    """What each revision makes; ``make fingerprints`` writes it."""
    found = json.loads(resources.files(__package__).joinpath("fingerprints.json").read_text(encoding="utf-8"))
    return dict(found)


def differences(expected: Fingerprint, found: Fingerprint) -> list[str]:
    """Return a line for each thing that differs."""
    lines = [f"{thing}: missing, should be {expected[thing]}" for thing in sorted(expected.keys() - found.keys())]
    lines += [f"{thing}: unexpected, is {found[thing]}" for thing in sorted(found.keys() - expected.keys())]
    lines += [
        f"{thing}: is {found[thing]}, should be {expected[thing]}"
        for thing in sorted(expected.keys() & found.keys())
        if expected[thing] != found[thing]
    ]
    return lines


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
