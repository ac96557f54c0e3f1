"""What the first revision gives the tables beside columns, read from the revision itself, which is frozen."""

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from saga_store.adoption.forms import EXECUTIONS, LOGS, Form
from saga_store.schema.scripts import make_config

REVISION = "saga_store_0001"
"""The revision whose tables an adoption makes; ``upgrade`` leads on from there."""


@dataclass(frozen=True, slots=True)
class Index:
    """An index of ours; its definition is what follows the table's name."""

    name: str
    table: str
    definition: str
    unique: bool

    def statement(self, *, concurrently: bool) -> str:
        kind = f"{'UNIQUE ' if self.unique else ''}INDEX{' CONCURRENTLY' if concurrently else ''}"
        return f"CREATE {kind} {self.name} ON {self.table} {self.definition}"


# python-cqrs's own words.
_CQRS_COMMENTS = {
    EXECUTIONS: {
        "id": "Saga ID",
        "name": "Saga Name",
        "status": "Current status of the saga",
        "context": "Serialized context",
        "version": "Optimistic locking version",
        "created_at": "Creation timestamp",
        "updated_at": "Last update timestamp",
        "recovery_attempts": "Number of recovery attempts",
    },
    LOGS: {
        "id": "Log ID",
        "saga_id": "Saga ID",
        "step_name": "Name of the step",
        "action": "Action performed (act/compensate)",
        "status": "Status of the step",
        "details": "Additional details or error message",
        "created_at": "Timestamp of the log entry",
    },
}


def comments(table: str, form: Form) -> Iterator[str]:
    """Yield the statements that comment a table and its columns as those of that form are."""
    if form == "saga-store":
        for statement in _statements():
            if statement.startswith((f"COMMENT ON TABLE {table} ", f"COMMENT ON COLUMN {table}.")):
                yield statement
        return
    yield f"COMMENT ON TABLE {table} IS NULL"
    for column, comment in _CQRS_COMMENTS[table].items():
        yield f"COMMENT ON COLUMN {table}.{column} IS '{comment}'"


def indexes(table: str) -> list[Index]:
    """Return our indexes of a table."""
    form = rf"CREATE (UNIQUE )?INDEX (\w+) ON {table} (.+)"
    found = (re.fullmatch(form, statement) for statement in _statements())
    return [Index(match[2], table, match[3], unique=bool(match[1])) for match in found if match]


@contextmanager
def quietly() -> Iterator[None]:
    """Keep Alembic from logging a migration's beginning where there is none."""
    logger = logging.getLogger("alembic.runtime.migration")
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(_record: logging.LogRecord) -> bool:
    return False


@cache
def _statements() -> tuple[str, ...]:
    (script,) = ScriptDirectory.from_config(make_config()).get_revisions(REVISION)
    output = io.StringIO()
    with quietly():
        context = MigrationContext.configure(
            dialect_name="postgresql", opts={"as_sql": True, "output_buffer": output, "literal_binds": True}
        )
    with Operations.context(context):
        script.module.upgrade()
    return tuple(" ".join(statement.split()) for statement in output.getvalue().split(";\n") if statement.strip())
