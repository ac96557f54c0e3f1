"""The steps that lead from one form of the tables to the other, worked out from what the catalog shows.

There is no record of progress that could disagree with the tables: whoever runs again after a crash looks, and gets
the steps that are left. Each step is a transaction, or can be repeated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from saga_store.adoption.forms import (
    ENUMS,
    EXECUTIONS,
    FILLFACTOR,
    LATER,
    LEASE,
    LOGS,
    SEQUENCE,
    TABLES,
    Column,
    Form,
    columns_of,
    key_name,
    trigger_of,
    unfilled,
)
from saga_store.adoption.revision import Index, comments, indexes
from saga_store.adoption.shape import Shape, Table

NO_LOCK = "nothing"
SHORT = "everybody, for milliseconds"
WRITING = "everybody, while it rewrites the tables"
ROWS = "writers of the rows of one batch, for as long as a batch takes"
NOBODY = "nobody; it waits for running transactions"

BATCH = 5_000

Kind = Literal["transaction", "fill", "index", "stamp", "upgrade", "downgrade"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the way.

    Attributes:
        name: What it does, in a few words.
        kind: One transaction; batches, which are repeated until no row is left; an index, built concurrently; or what
            the migrations do.
        tables: Which tables it locks against everybody while it lasts, in order.
        blocks: Whom it keeps waiting, and for how long.
        statements: Its SQL.
        index: The index that it builds.
        revision: Where it is after a migration.
    """

    name: str
    kind: Kind
    tables: tuple[str, ...]
    blocks: str
    statements: tuple[str, ...]
    index: Index | None = None
    revision: str = ""


def steps(shape: Shape, target: Form, *, rewrite: bool) -> list[Step]:
    """Return what is left to do until both tables have the form ``target``.

    Args:
        shape: What there is; without differences.
        target: Where to.
        rewrite: Whether to do it in one transaction, which keeps everybody waiting; otherwise row by row beside the
            writers. What was begun beside the writers is finished beside them.
    """
    tables = [shape.tables[name] for name in TABLES]
    begun = any(table.under_way and table.form != target for table in tables)
    found = [_abandon(table) for table in tables if table.under_way and table.form == target]
    if rewrite and not begun:
        found += _rewrite([table for table in tables if table.form != target], target)
    else:
        found += _beside([table for table in tables if table.form != target], target)
    if target == "saga-store":
        found += [step for table in tables for step in _indexes(table, rewritten=rewrite and not begun)]
    if found:
        # The planner knows nothing of columns that are new, and autovacuum comes when it comes.
        found.append(Step("gather statistics", "transaction", (), NOBODY, (f"ANALYZE {', '.join(TABLES)}",)))
    return found


def finish(shape: Shape) -> list[Step]:
    """Return what is left to do until nothing of python-cqrs's is left."""
    if not shape.enums:
        return []
    casts = (f"DROP CAST ({name} AS text)" for name, enum in shape.enums.items() if enum.castable)
    statements = (*casts, *(f"DROP TYPE {name}" for name in shape.enums))
    return [Step("drop python-cqrs's types, and the casts", "transaction", (), NO_LOCK, statements)]


def _abandon(table: Table) -> Step:
    """Undo what was begun in the other direction, before anything of it counted."""
    columns = [column for column in columns_of(table.name) if column.beside in table.all("column")]
    added = [name for name in LEASE if table.form == "cqrs" and name in table.all("column")]
    drops = [f"DROP COLUMN {name}" for name in [*(column.beside for column in columns), *added]]
    statements = (*_drop_trigger(table), f"ALTER TABLE {table.name} {', '.join(drops)}")
    return Step(f"{table.name}: drop what was begun", "transaction", (table.name,), SHORT, statements)


def _rewrite(tables: list[Table], target: Form) -> Iterator[Step]:
    if not tables:
        return
    statements = [statement for table in tables for statement in _rewritten(table, target)]
    names = tuple(table.name for table in tables)
    yield Step(f"rewrite {' and '.join(names)}", "transaction", names, WRITING, tuple(statements))


def _rewritten(table: Table, target: Form) -> Iterator[str]:
    columns = columns_of(table.name)
    if target == "saga-store":
        yield from _add_columns(table)
    else:
        yield from _undress_columns(table)
    casts = [
        f"ALTER COLUMN {column.name} TYPE {column.type_in(target)} USING {_converted(column, target)}"
        for column in columns
    ]
    yield f"ALTER TABLE {table.name} {', '.join(casts)}"
    if target == "saga-store":
        for column in columns:
            yield f"ALTER TABLE {table.name} ADD CONSTRAINT {column.check} CHECK ({column.allowed(column.name)})"
    yield from _dress(table, target)
    if target == "saga-store":
        yield from (index.statement(concurrently=False) for index in indexes(table.name))


def _beside(tables: list[Table], target: Form) -> Iterator[Step]:
    for table in tables:
        if not table.under_way:
            yield _begin(table, target)
        if table.unfilled or not table.under_way:
            yield _fill(table, target)
    for table in tables:
        yield from _constrain(table, target)
    # One after the other at the end: an old process's prepared reads fail at most once.
    for table in tables:
        yield _swap(table, target)


def _begin(table: Table, target: Form) -> Step:
    """Add the columns and the trigger at once: no row can be written in between."""
    columns = columns_of(table.name)
    added = [f"ADD COLUMN {column.beside} {column.type_in(target)}" for column in columns]
    values = [f"NEW.{column.beside} := {_converted(column, target, row='NEW.')};" for column in columns]
    name, body = trigger_of(table.name), " ".join(values)
    # Whatever the path of a writer's session is, the types are found by that of this one.
    path = "SET search_path FROM CURRENT"
    statements = (
        f"ALTER TABLE {table.name} {', '.join(added)}",
        *(_add_columns(table) if target == "saga-store" else ()),
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql {path} AS $$ BEGIN {body} RETURN NEW; END $$",
        f"CREATE TRIGGER {name} BEFORE INSERT OR UPDATE ON {table.name} FOR EACH ROW EXECUTE FUNCTION {name}()",
    )
    return Step(f"{table.name}: add columns, and a trigger", "transaction", (table.name,), SHORT, statements)


def _fill(table: Table, target: Form) -> Step:
    """Make the statements for the first batch, for one after another, and for whether rows are left.

    Rows that a writer has locked are left out, and get another pass: a batch that waited for one row would keep the
    writers of all its other rows waiting. The trigger converts them too, if they are written meanwhile.
    """
    columns = columns_of(table.name)
    values = ", ".join(f"{column.beside} = {_converted(column, target, row='t.')}" for column in columns)
    first, following = (
        f"WITH batch AS MATERIALIZED (SELECT id FROM {table.name} WHERE {unfilled(table.name)}{after} "  # noqa: S608 - our names
        f"ORDER BY id LIMIT {BATCH} FOR NO KEY UPDATE SKIP LOCKED), "
        f"filled AS (UPDATE {table.name} t SET {values} FROM batch WHERE t.id = batch.id RETURNING t.id) "
        "SELECT id AS last, (SELECT count(*) FROM filled) AS rows FROM batch ORDER BY id DESC LIMIT 1"
        for after in ("", " AND id > :after")
    )
    left = f"SELECT EXISTS (SELECT FROM {table.name} WHERE {unfilled(table.name)})"  # noqa: S608 - names of ours
    return Step(f"{table.name}: fill the columns", "fill", (table.name,), ROWS, (first, following, left))


def _constrain(table: Table, target: Form) -> Iterator[Step]:
    wanted = {column.filled: f"{column.beside} IS NOT NULL" for column in columns_of(table.name)}
    if target == "saga-store":
        wanted |= {column.check: column.allowed(column.beside) for column in columns_of(table.name)}
    found = table.all("constraint")
    missing = {name: condition for name, condition in wanted.items() if name not in found}
    if missing:
        added = [f"ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID" for name, condition in missing.items()]
        statement = f"ALTER TABLE {table.name} {', '.join(added)}"
        yield Step(f"{table.name}: add the checks", "transaction", (table.name,), SHORT, (statement,))
    for name in wanted:
        if found.get(name, "NOT VALID").endswith("NOT VALID"):
            statement = f"ALTER TABLE {table.name} VALIDATE CONSTRAINT {name}"
            yield Step(f"{table.name}: validate {name}", "transaction", (), NOBODY, (statement,))


def _swap(table: Table, target: Form) -> Step:
    columns = columns_of(table.name)
    name = table.name
    statements = [
        *_drop_trigger(table),
        *(_undress_columns(table) if target == "cqrs" else ()),
        f"ALTER TABLE {name} {', '.join(f'DROP COLUMN {column.name}' for column in columns)}",
        *(f"ALTER TABLE {name} RENAME COLUMN {column.beside} TO {column.name}" for column in columns),
        # Without a scan: the validated checks prove it, if they are dropped only afterwards.
        f"ALTER TABLE {name} {', '.join(f'ALTER COLUMN {column.name} SET NOT NULL' for column in columns)}",
        f"ALTER TABLE {name} {', '.join(f'DROP CONSTRAINT {column.filled}' for column in columns)}",
        *_dress(table, target),
    ]
    return Step(f"{name}: swap the columns", "transaction", (name,), SHORT, tuple(statements))


def _indexes(table: Table, *, rewritten: bool) -> Iterator[Step]:
    if rewritten and table.form == "cqrs":
        return
    built = {name for name, definition in table.all("index").items() if not definition.endswith(" INVALID")}
    for index in indexes(table.name):
        if index.name not in built:
            statement = index.statement(concurrently=True)
            yield Step(f"build {index.name}", "index", (), NOBODY, (statement,), index)


def _drop_trigger(table: Table) -> Iterator[str]:
    name = trigger_of(table.name)
    yield f"DROP TRIGGER {name} ON {table.name}"
    yield f"DROP FUNCTION {name}()"


def _add_columns(table: Table) -> Iterator[str]:
    wanted = LATER | LEASE if table.name == EXECUTIONS else {}
    missing = [f"ADD COLUMN {name} {kind}" for name, kind in wanted.items() if name not in table.all("column")]
    if missing:
        yield f"ALTER TABLE {table.name} {', '.join(missing)}"


def _undress_columns(table: Table) -> Iterator[str]:
    """Take away what is ours and hangs on columns that are about to change."""
    for column in columns_of(table.name):
        yield f"ALTER TABLE {table.name} DROP CONSTRAINT IF EXISTS {column.check}"
    for index in indexes(table.name):
        yield f"DROP INDEX IF EXISTS {index.name}"
    if table.name == EXECUTIONS:
        drops = ", ".join(f"DROP COLUMN {name}" for name in LEASE)
        yield f"ALTER TABLE {table.name} ALTER COLUMN status DROP DEFAULT, {drops}"


def _dress(table: Table, target: Form) -> Iterator[str]:
    """Give the table all that isn't rows: casts, names, defaults, the sequence, storage parameters, comments.

    What old processes send is still cast to their types, and has to pass for text from the moment that the columns
    are text, and not before: two values of a type that passes for text can't be compared any more.
    """
    for column in columns_of(table.name):
        if column.cqrs in ENUMS and target == "saga-store":
            yield f"CREATE CAST ({column.cqrs} AS text) WITH INOUT AS IMPLICIT"
        elif column.cqrs in ENUMS:
            yield f"DROP CAST ({column.cqrs} AS text)"
    for name, definition in table.all("constraint").items():
        wanted = key_name(definition, table.name, target)
        if wanted and wanted != name:
            yield f'ALTER TABLE {table.name} RENAME CONSTRAINT "{name}" TO {wanted}'
    if table.name == LOGS:
        yield from _sequence(table, target)
    elif target == "saga-store":
        yield f"ALTER TABLE {table.name} ALTER COLUMN status SET DEFAULT 'PENDING', ALTER COLUMN version SET DEFAULT 1"
        yield f"ALTER TABLE {table.name} SET ({FILLFACTOR})"
    else:
        yield f"ALTER TABLE {table.name} RESET (fillfactor)"
    yield from comments(table.name, target)


def _sequence(table: Table, target: Form) -> Iterator[str]:
    """Change an identity into a sequence or back, to go on where the other left off."""
    old, new = table.sequence, "saga_store_logs_id"
    if target == "saga-store":
        yield f"CREATE SEQUENCE {new} AS bigint"
        yield f"SELECT setval('{new}', last_value, is_called) FROM {old}"  # noqa: S608 - the catalog's own name
        yield f"ALTER TABLE {LOGS} ALTER COLUMN id DROP IDENTITY"
        yield f"ALTER SEQUENCE {new} RENAME TO {SEQUENCE}"
        yield f"ALTER TABLE {LOGS} ALTER COLUMN id SET DEFAULT nextval('{SEQUENCE}')"
        yield f"ALTER SEQUENCE {SEQUENCE} OWNED BY {LOGS}.id"
        # An identity's sequence needs no privilege of its own.
        for role in table.writers:
            yield f"GRANT USAGE ON SEQUENCE {SEQUENCE} TO {role}"
    else:
        yield f"ALTER TABLE {LOGS} ALTER COLUMN id DROP DEFAULT"
        yield f"ALTER SEQUENCE {old} OWNED BY NONE"
        yield f"ALTER SEQUENCE {old} RENAME TO {new}"
        yield f"ALTER TABLE {LOGS} ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY"
        yield f"SELECT setval('{SEQUENCE}', last_value, is_called) FROM {new}"  # noqa: S608 - a name of ours
        yield f"DROP SEQUENCE {new}"


def _converted(column: Column, target: Form, *, row: str = "") -> str:
    value = f"{row}{column.name}"
    # An enum has no cast but to and from text.
    return f"{value}::text::{column.type_in(target)}" if column.cqrs in ENUMS else f"{value}::{column.type_in(target)}"
