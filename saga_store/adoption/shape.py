"""Read what the tables look like, and say in what they differ from those that are known."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, text

from saga_store.adoption.forms import CONVERTED, CQRS, ENUMS, TABLES, Form, columns_of, key_name, optional, unfilled
from saga_store.adoption.revision import REVISION
from saga_store.schema.fingerprint import Fingerprint, differences, expected_fingerprints, read_fingerprint

_TABLES = text("""
SELECT c.relname, c.oid, pg_get_serial_sequence(quote_ident(c.relname), 'id') AS sequence,
    ARRAY(
        SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END
        FROM aclexplode(c.relacl) a WHERE a.privilege_type = 'INSERT' AND a.grantee <> c.relowner
    ) AS writers
FROM pg_class c
WHERE c.relnamespace = to_regnamespace(quote_ident(current_schema())) AND c.relname IN ('saga_executions', 'saga_logs')
""")

# What no CREATE TABLE of python-cqrs's makes, in words.
_ODDITIES = text("""
SELECT 'inherits, or is inherited from' FROM pg_inherits WHERE inhrelid = :oid OR inhparent = :oid
UNION ALL
SELECT 'has row security: policies would have to be made anew' FROM pg_class
WHERE oid = :oid AND (relrowsecurity OR EXISTS (SELECT FROM pg_policy WHERE polrelid = :oid))
UNION ALL
SELECT 'has the rule ' || rulename FROM pg_rewrite WHERE ev_class = :oid
UNION ALL
SELECT 'belongs to ' || pg_get_userbyid(relowner) || ', whose rights ' || current_user || ' does not have'
FROM pg_class WHERE oid = :oid AND NOT pg_has_role(relowner, 'USAGE')
UNION ALL
SELECT 'column ' || attname || ' has privileges of its own, which a new column would lose'
FROM pg_attribute WHERE attrelid = :oid AND attname = ANY(:converted) AND attacl IS NOT NULL
UNION ALL
SELECT DISTINCT 'column ' || a.attname || ' is used by ' || pg_describe_object(d.classid, d.objid, 0)
FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
WHERE d.refclassid = CAST('pg_class' AS regclass) AND d.refobjid = :oid AND a.attname = ANY(:converted)
    -- Constraints, indexes and triggers are compared one by one.
    AND d.classid NOT IN (
        CAST('pg_constraint' AS regclass), CAST('pg_class' AS regclass),
        CAST('pg_trigger' AS regclass), CAST('pg_attrdef' AS regclass)
    )
""")

_ENUMS = text("""
SELECT t.typname AS name, ARRAY(SELECT CAST(enumlabel AS text) FROM pg_enum WHERE enumtypid = t.oid
        ORDER BY enumsortorder) AS labels,
    pg_has_role(t.typowner, 'USAGE') AS owned,
    EXISTS (SELECT FROM pg_cast WHERE castsource = t.oid AND casttarget = CAST('text' AS regtype)) AS castable
FROM pg_type t
WHERE t.typtype = 'e' AND t.typnamespace = to_regnamespace(quote_ident(current_schema()))
    AND t.typname IN ('sagastatus', 'sagastepstatus')
""")

# What else in the database needs the types; arrays of them are the server's own doing.
_USERS_OF_TYPES = text("""
SELECT 'type ' || t.typname || ': is used by ' || pg_describe_object(d.classid, d.objid, d.objsubid)
FROM pg_type t JOIN pg_depend d ON d.refclassid = CAST('pg_type' AS regclass) AND d.refobjid IN (t.oid, t.typarray)
WHERE t.typnamespace = to_regnamespace(quote_ident(current_schema())) AND t.typname IN ('sagastatus', 'sagastepstatus')
    AND d.deptype <> 'i' AND d.classid NOT IN (CAST('pg_cast' AS regclass), CAST('pg_type' AS regclass))
    AND NOT (d.classid = CAST('pg_class' AS regclass) AND d.objid IN (
        SELECT oid FROM pg_class WHERE relnamespace = t.typnamespace AND relname IN ('saga_executions', 'saga_logs')
    ))
""")

_MAY_CREATE = text("SELECT current_schema(), has_schema_privilege(current_schema(), 'CREATE')")


@dataclass(frozen=True, slots=True)
class Table:
    """One of the two tables.

    Attributes:
        name: Which one.
        rows: How many.
        unfilled: Whether some of them have still to be converted, while columns stand beside others.
        things: Its part of the fingerprint.
        sequence: The sequence that ids come from, qualified.
        writers: The roles that may insert, quoted, beside its owner.
        oddities: What no CREATE TABLE of python-cqrs's makes, in words.
    """

    name: str
    rows: int
    unfilled: bool
    things: Mapping[str, str]
    sequence: str | None
    writers: tuple[str, ...]
    oddities: tuple[str, ...]

    @property
    def form(self) -> Form:
        return "saga-store" if self.all("column").get("status", "").startswith("character varying") else "cqrs"

    @property
    def under_way(self) -> bool:
        """Whether a column has been put beside another, to take its place."""
        return any(column.beside in self.all("column") for column in columns_of(self.name))

    def all(self, kind: str) -> dict[str, str]:
        """Return its columns, constraints, indexes or triggers, by name."""
        prefix = f"{kind} {self.name}."
        return {thing.removeprefix(prefix): being for thing, being in self.things.items() if thing.startswith(prefix)}

    def with_usual_names(self) -> dict[str, str]:
        """Return its things, but with the usual names of its keys, which a renaming leaves as they were."""
        things = dict(self.things)
        for name, definition in self.all("constraint").items():
            usual = key_name(definition, self.name, self.form)
            if usual is None or f"constraint {self.name}.{usual}" in things:
                continue
            things[f"constraint {self.name}.{usual}"] = things.pop(f"constraint {self.name}.{name}")
            if index := things.pop(f"index {self.name}.{name}", None):
                things[f"index {self.name}.{usual}"] = re.sub(r'INDEX ("[^"]*"|\S+) ON', f"INDEX {usual} ON", index)
        return things


@dataclass(frozen=True, slots=True)
class Enum:
    """One of python-cqrs's enum types, and whether it has been made castable to text."""

    labels: tuple[str, ...]
    owned: bool
    castable: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """What there is in the schema, of theirs and of ours."""

    schema: str | None
    may_create: bool
    tables: Mapping[str, Table]
    enums: Mapping[str, Enum]
    other_users: tuple[str, ...]
    fingerprint: Fingerprint

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables.values())


def read(connection: Connection) -> Shape:
    """Read the catalog, and count the rows; what is looked at is the first schema of the search path."""
    schema, may_create = connection.execute(_MAY_CREATE).one()
    fingerprint = read_fingerprint(connection)
    return Shape(
        schema=schema,
        may_create=bool(may_create),
        tables={row.relname: _table(connection, row, fingerprint) for row in connection.execute(_TABLES).all()},
        enums={row.name: Enum(tuple(row.labels), row.owned, row.castable) for row in connection.execute(_ENUMS)},
        other_users=tuple(connection.scalars(_USERS_OF_TYPES)),
        fingerprint=fingerprint,
    )


def _table(connection: Connection, row: Row[Any], fingerprint: Fingerprint) -> Table:
    where = {"oid": row.oid, "converted": [column.name for column in columns_of(row.relname)]}
    table = Table(
        name=row.relname,
        rows=connection.scalar(text(f"SELECT count(*) FROM {row.relname}")) or 0,  # noqa: S608 - one of two names
        unfilled=False,
        things={thing: being for thing, being in fingerprint.items() if _is_of(thing, row.relname)},
        sequence=row.sequence,
        writers=tuple(row.writers),
        oddities=tuple(connection.scalars(_ODDITIES, where)),
    )
    if not table.under_way:
        return table
    query = text(f"SELECT EXISTS (SELECT FROM {table.name} WHERE {unfilled(table.name)})")  # noqa: S608 - the same
    return replace(table, unfilled=bool(connection.scalar(query)))


def unknown(shape: Shape) -> Iterator[str]:
    """Say, a line for each, in what the schema differs from what python-cqrs makes, and from what we make of it."""
    if not shape.may_create:
        yield f"schema {shape.schema}: CREATE is missing among this role's privileges"
    for name in TABLES:
        table = shape.tables.get(name)
        if table is None:
            yield f"table {name}: there is none in schema {shape.schema}"
            continue
        yield from _differences(table)
        yield from (f"table {name}: {oddity}" for oddity in table.oddities)
    yield from _enum_differences(shape)


def _differences(table: Table) -> list[str]:
    every = expected_fingerprints()[REVISION] if table.form == "saga-store" else CQRS
    expected = {thing: being for thing, being in every.items() if _is_of(thing, table.name)}
    found = table.with_usual_names()
    known = optional(table.name, table.form)
    if table.form == "saga-store":
        # Indexes are built one by one, once the table has its form; one that was interrupted is INVALID.
        known |= {thing: {being, f"{being} INVALID"} for thing, being in expected.items() if thing.startswith("index ")}
    for thing, allowed in known.items():
        if thing not in found or not allowed or found[thing] in allowed:
            found.pop(thing, None)
            expected.pop(thing, None)
    return differences(expected, found)


def _is_of(thing: str, table: str) -> bool:
    return re.split("[ .]", thing)[1] == table


def _enum_differences(shape: Shape) -> Iterator[str]:
    for column in CONVERTED:
        name, labels = column.cqrs, ENUMS.get(column.cqrs)
        table, enum = shape.tables.get(column.table), shape.enums.get(name)
        if labels is None or table is None:
            continue
        if enum is None:
            if table.form == "cqrs":
                yield f"type {name}: there is none in schema {shape.schema}"
            continue
        if enum.labels != labels:
            yield f"type {name}: is {', '.join(enum.labels)}, should be {', '.join(labels)}"
        if enum.castable and table.form == "cqrs":
            yield f"type {name}: has a cast to text, which there should not be"
        if not enum.owned:
            yield f"type {name}: belongs to another role, whose rights this one does not have"
    # Once a type passes for text, its values can't be compared with each other any more.
    yield from shape.other_users
