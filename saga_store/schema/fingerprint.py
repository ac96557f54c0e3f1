"""Whether a database is what this release needs: what the catalog says of its tables, beside what a revision makes.

Alembic's comparison doesn't look into CHECKs, nor for indexes that are INVALID. The words are the same on every
version of PostgreSQL that is supported, and in every schema.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources

from sqlalchemy import Connection, bindparam, text

from saga_store.schema.privileges import require_readable
from saga_store.schema.scripts import recorded_revision
from saga_store.schema.session import enter_schema, found_elsewhere
from saga_store.sqlalchemy import Base
from saga_store.sqlalchemy.tables import REVISION

Fingerprint = Mapping[str, str]
"""For each thing, such as ``column saga_logs.details``, what it is."""

# Names are unqualified where the search_path finds them, and `pretty` texts leave the schema out as well.
# A sequence that belongs to its column has the usual name here, for that may have been taken.
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
        || CASE WHEN pg_get_expr(d.adbin, d.adrelid, TRUE) = 'nextval(' || quote_literal(CAST(CAST(
            pg_get_serial_sequence(quote_ident(t.relname), a.attname) AS regclass) AS text)) || '::regclass)'
        THEN 'nextval(' || quote_literal(t.relname || '_' || a.attname || '_seq') || '::regclass)'
        ELSE pg_get_expr(d.adbin, d.adrelid, TRUE) END, '')
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

# What the role that asks may not do, and what else there is that no revision makes.
_SURROUNDINGS = text("""
WITH tables AS (
    SELECT c.oid, c.relname, c.relrowsecurity FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = current_schema() AND c.relname IN :tables AND c.relkind IN ('r', 'p')
),
needs AS (
    SELECT t.*, w.privilege, w.command FROM tables t JOIN (VALUES
        ('saga_executions', 'SELECT', 'r'), ('saga_executions', 'INSERT', 'a'), ('saga_executions', 'UPDATE', 'w'),
        ('saga_logs', 'SELECT', 'r'), ('saga_logs', 'INSERT', 'a')
    ) AS w (relname, privilege, command) ON w.relname = t.relname
),
sequences AS (
    SELECT s.oid, s.relkind FROM tables t JOIN pg_depend d ON d.refobjid = t.oid
        AND d.refclassid = CAST('pg_class' AS regclass) AND d.classid = CAST('pg_class' AS regclass) AND d.deptype = 'a'
    JOIN pg_class s ON s.oid = d.objid
)
SELECT TRUE AS is_fault, 'table ' || relname || ': ' || current_user || ' may not ' || privilege
    || '; run the script of saga-store grants, or ask as the role of the application' AS line
FROM needs WHERE NOT has_table_privilege(oid, privilege)
UNION ALL
SELECT TRUE, 'sequence ' || CAST(CAST(s.oid AS regclass) AS text) || ': ' || current_user
    || ' may not use it; run the script of saga-store grants, or ask as the role of the application'
FROM sequences s WHERE CASE relkind WHEN 'S' THEN NOT has_sequence_privilege(s.oid, 'USAGE') ELSE FALSE END
UNION ALL
SELECT TRUE, 'table ' || relname || ': row-level security is on, and no policy lets '
    || CASE WHEN row_security_active(oid) THEN CAST(current_user AS text) ELSE 'anybody but its owner' END || ' '
    || privilege || '; CREATE POLICY for the role of the application, or ALTER TABLE ' || relname
    || ' DISABLE ROW LEVEL SECURITY'
FROM needs n WHERE relrowsecurity AND NOT EXISTS (
    SELECT FROM pg_policy p WHERE p.polrelid = n.oid AND p.polpermissive AND p.polcmd IN ('*', n.command)
        AND (NOT row_security_active(n.oid) OR EXISTS (
            SELECT FROM unnest(p.polroles) AS r WHERE CASE WHEN r = 0 THEN TRUE ELSE pg_has_role(r, 'USAGE') END))
)
UNION ALL
SELECT FALSE, 'statistics ' || t.relname || '.' || e.stxname || ': unexpected; nothing minds them'
FROM tables t JOIN pg_statistic_ext e ON e.stxrelid = t.oid
UNION ALL
SELECT FALSE, 'publication ' || t.relname || '.' || p.pubname || ': unexpected; nothing minds it'
FROM tables t JOIN pg_publication_rel r ON r.prrelid = t.oid JOIN pg_publication p ON p.oid = r.prpubid
ORDER BY 2
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
    return [_told(thing, expected.get(thing), found.get(thing)) for thing in _differing(expected, found)]


def unfinished(revision: str, found: Fingerprint, *, back: bool) -> list[str]:
    """Return what differs from a recorded revision because the way to a neighbour of it was interrupted.

    That is, what is as the neighbour has it, or a check that isn't validated yet, or an INVALID index of that name.
    Between two revisions that differ in tables or columns nothing is: those come and go in one transaction, and what
    they hold with them.

    Args:
        revision: The one that is recorded.
        found: What there is.
        back: Whether to look at the one before it, to which a downgrade was on its way, or at the one after.
    """
    known = list(expected_fingerprints())
    place = known.index(revision) + (-1 if back else 1)
    if not 0 <= place < len(known):
        return []
    here, there = expected_fingerprints()[revision], expected_fingerprints()[known[place]]
    if any(thing.startswith(("table ", "column ")) for thing in here.keys() ^ there.keys()):
        return []

    def halfway(thing: str) -> bool:
        one, present, other = here.get(thing), found.get(thing), there.get(thing)
        if (one is None) is (other is None):
            return one != other and present == other
        built = _meaning(one or other or "")
        return present is None or _meaning(present) in {built, f"{built} NOT VALID", f"{built} INVALID"}

    return [thing for thing in _differing(here, found) if halfway(thing)]


def compare(revision: str, found: Fingerprint) -> tuple[list[str], list[str]]:
    """Return faults, with which the application or the next migration would fail, and notes, each with what to do."""
    expected = expected_fingerprints()[revision]
    upgrading = unfinished(revision, found, back=False)
    faults: list[str] = []
    notes: list[str] = []
    differing = _differing(expected, found)
    renamed = _renamed(differing, expected, found)
    for thing in differing:
        if thing in renamed.values():
            continue
        wanted, present = expected.get(thing), found.get(thing)
        if thing in renamed:
            other = renamed[thing]
            remedy, harmless = f"it is called {other.partition('.')[2]}: {_rename(thing, other)}", False
        elif thing in upgrading:
            remedy, harmless = "an upgrade is under way, or was interrupted: saga-store upgrade goes on with it", False
        else:
            remedy, harmless = _remedy(thing, wanted, present)
        (notes if harmless else faults).append(f"{_told(thing, wanted, present)}; {remedy}")
    return faults, notes


def _differing(expected: Fingerprint, found: Fingerprint) -> list[str]:
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    both = sorted(expected.keys() & found.keys())
    return missing + unexpected + [thing for thing in both if _meaning(expected[thing]) != _meaning(found[thing])]


def _told(thing: str, wanted: str | None, present: str | None) -> str:
    if present is None:
        return f"{thing}: missing, should be {wanted}"
    return f"{thing}: unexpected, is {present}" if wanted is None else f"{thing}: is {present}, should be {wanted}"


def _meaning(text: str) -> str:
    """Return the same for texts that mean the same: a dump that was restored has casts and parentheses elsewhere.

    Between text and varchar without a length a cast changes nothing, nor do parentheses around a single word, nor does
    the order of values in a list.
    """
    text = _CAST.sub(lambda found: found[1] or "", text)
    before = ""
    while before != text:
        before, text = text, _NEEDLESS.sub(r"\1", text)
    return _LIST.sub(lambda found: f"ANY ARRAY[{', '.join(sorted(_LITERAL.findall(found[1])))}]", text)


_LITERAL = re.compile(r"'(?:[^']|'')*'")
_CAST = re.compile(rf"({_LITERAL.pattern})|::(?:character varying|text)\b(?!\()(?:\[\])?")
_ARRAY = rf"ARRAY\[{_LITERAL.pattern}(?:, {_LITERAL.pattern})*\]"
_NEEDLESS = re.compile(rf"(?<![\w\"])\(({_LITERAL.pattern}|\w+|{_ARRAY})\)")
_LIST = re.compile(rf"ANY ({_ARRAY})")


def _renamed(differing: list[str], expected: Fingerprint, found: Fingerprint) -> dict[str, str]:
    """Return which missing constraints are there under another name."""
    others = {
        (thing.partition(".")[0], _meaning(found[thing])): thing
        for thing in differing
        if thing.startswith("constraint ") and thing not in expected
    }
    missing = [thing for thing in differing if thing.startswith("constraint ") and thing not in found]
    keys = {thing: (thing.partition(".")[0], _meaning(expected[thing])) for thing in missing}
    return {thing: others[key] for thing, key in keys.items() if key in others}


def _rename(thing: str, other: str) -> str:
    table, _, name = thing.removeprefix("constraint ").partition(".")
    return f'ALTER TABLE {table} RENAME CONSTRAINT "{other.partition(".")[2]}" TO {name}'


def _remedy(  # noqa: PLR0911 - a table of cases, one line each
    thing: str, wanted: str | None, present: str | None
) -> tuple[str, bool]:
    """Return what to do about a thing that differs, and whether it may just as well stay as it is."""
    kind, _, place = thing.partition(" ")
    table, _, name = place.partition(".")
    match kind:
        case "table":
            return _table_remedy(table, wanted, present)
        case "index":
            return _index_remedy(name, wanted, present)
        case "column" if wanted is None:
            if str(present).endswith(" NOT NULL"):
                return f'writes leave it out, and are refused: ALTER TABLE {table} ALTER "{name}" DROP NOT NULL', False
            return "nothing uses it, and nothing minds it", True
        case "column":
            return f"give the column that type, default and NOT NULL by ALTER TABLE {table}, or restore it", False
        case "trigger" if wanted is None:
            return f'see whether it changes or refuses rows: DROP TRIGGER "{name}" ON {table}', "not enabled" in str(
                present
            )
        case _ if wanted is None:
            return f'it may refuse writes: ALTER TABLE {table} DROP CONSTRAINT "{name}"', False
        case _ if present is not None and _meaning(present) == f"{_meaning(wanted)} NOT VALID":
            return f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}", False
        case _:
            drop = f"DROP CONSTRAINT {name}, " if present else ""
            return f"ALTER TABLE {table} {drop}ADD CONSTRAINT {name} {wanted}", False


def _table_remedy(table: str, wanted: str | None, present: str | None) -> tuple[str, bool]:
    def kind(text: str | None) -> list[str]:
        return [part for part in (text or "").split(", ") if "=" not in part]

    if wanted is None or present is None:
        return "name the schema of the tables, or stamp the revision that they are at, or restore them", False
    if kind(wanted) == kind(present):
        options = ", ".join(part for part in wanted.split(", ") if "=" in part)
        usual = f"ALTER TABLE {table} SET ({options})" if options else f"ALTER TABLE {table} RESET (...)"
        return f"a matter of taste; the usual is {usual}", True
    return f"ALTER TABLE {table} SET LOGGED, or make it an ordinary one again", False


def _index_remedy(name: str, wanted: str | None, present: str | None) -> tuple[str, bool]:
    if wanted is None:
        if str(present).endswith(" INVALID"):
            return f'a REINDEX under way, or what is left of one: then DROP INDEX CONCURRENTLY "{name}"', True
        if str(present).startswith("CREATE UNIQUE"):
            return f'it may refuse writes: DROP INDEX CONCURRENTLY "{name}"', False
        return "it costs a little of every write; keep it if a query of yours needs it", True
    if present is None:
        return f"build it: {wanted.replace('INDEX', 'INDEX CONCURRENTLY', 1)}", False
    if present == f"{wanted} INVALID":
        return f"REINDEX INDEX CONCURRENTLY {name}", False
    return f"DROP INDEX CONCURRENTLY {name}, then {wanted.replace('INDEX', 'INDEX CONCURRENTLY', 1)}", False


class State(StrEnum):
    """How a database stands to this release, the gravest first."""

    AHEAD = "ahead"
    """At a revision that this release doesn't know: a later one has migrated it, and should work with it."""
    BEHIND = "behind"
    """At an earlier revision, or at none: upgrade it."""
    DRIFTED = "drifted"
    """At the right revision, but there are faults, as when somebody has changed the tables since."""
    CURRENT = "current"
    """As it should be."""


@dataclass(frozen=True, slots=True)
class Check:
    """What a check has found.

    Attributes:
        state: In a word.
        found: The revision that the database records; None: none.
        needed: The revision that this release needs.
        differences: The faults, a line for each, with what to do: what isn't as its revision makes it, and what the
            role that asks may not do, so that the application or the next migration would fail. Also if the database is
            behind; empty if it is ahead, since what it should look like isn't known here.
        notes: What differs and does no harm, such as an index more, a line for each.
    """

    state: State
    found: str | None
    needed: str
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether this release works with the database: it is current, or a later release has migrated it."""
        return self.state in {State.CURRENT, State.AHEAD}


def check_connection(connection: Connection, schema: str | None, *, strict: bool) -> Check:
    """Read, in one transaction that changes nothing, and that may go through any pooler."""
    with connection.begin():
        enter_schema(connection, schema)
        require_readable(connection, schema)
        found = recorded_revision(connection)
        fingerprint = read_fingerprint(connection)
        surroundings = connection.execute(_SURROUNDINGS).all()
        elsewhere = found_elsewhere(connection, schema) if found is None else ""
    if found is not None and found not in expected_fingerprints():
        return Check(State.AHEAD, found, REVISION)
    if found is None:
        return Check(
            State.BEHIND, found, REVISION, tuple(differences({}, fingerprint)), (elsewhere,) if elsewhere else ()
        )
    faults, notes = compare(found, fingerprint)
    faults += [row.line for row in surroundings if row.is_fault]
    notes += [row.line for row in surroundings if not row.is_fault]
    state = State.DRIFTED if faults or (strict and notes) else State.CURRENT
    return Check(state if found == REVISION else State.BEHIND, found, REVISION, tuple(faults), tuple(notes))
