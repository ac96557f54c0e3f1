"""What the tables really are, by the catalog's own words, beside what their revision makes.

Alembic's comparison doesn't look into CHECKs, nor for indexes that are INVALID. The words are the same on every
version of PostgreSQL that is supported, and in every schema.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources

from sqlalchemy import Connection, bindparam, text

from saga_store.sqlalchemy import Base

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

_SEARCH_PATH = text("SELECT set_config('search_path', quote_ident(COALESCE(:schema, current_schema())), TRUE)")


def enter_schema(connection: Connection, schema: str | None) -> None:
    """Let names mean those of the schema, or of the session's own, until the end of the transaction."""
    connection.execute(_SEARCH_PATH, {"schema": schema})


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
