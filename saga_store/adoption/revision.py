"""What the first revision gives the tables beside columns, read from the revision itself, which is frozen."""

import io
import re
from collections.abc import Iterator
from functools import cache

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from saga_store.adoption.forms import EXECUTIONS, LOGS, Form
from saga_store.schema.scripts import make_config

REVISION = "saga_store_0001"
"""The revision whose tables an adoption makes; ``upgrade`` leads on from there."""

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


def indexes(table: str) -> dict[str, str]:
    """Return the statements that create our indexes of a table, by the index's name."""
    found = (re.match(rf"CREATE (?:UNIQUE )?INDEX (\w+) ON {table} ", statement) for statement in _statements())
    return {match[1]: match.string for match in found if match}


@cache
def _statements() -> tuple[str, ...]:
    script = ScriptDirectory.from_config(make_config()).get_revision(REVISION)
    output = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": output, "literal_binds": True}
    )
    with Operations.context(context):
        script.module.upgrade()
    return tuple(" ".join(statement.split()) for statement in output.getvalue().split(";\n") if statement.strip())
