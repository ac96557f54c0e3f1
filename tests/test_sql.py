"""The SQL that is sent, whole, as files that a reviewer can read: tests/sql/*.sql, one a statement.

They hold what psycopg is given. ``make sql`` writes them anew; a change of a statement shows in the review.
"""

import os
import re
from pathlib import Path

import pytest

from saga_store.model import SagaStatus
from saga_store.sqlalchemy import inspection_sql, read_sql, retention_sql
from saga_store.sqlalchemy.statement import Statement
from tests.test_repository import SAVES

FOLDER = Path(__file__).parent / "sql"
_FIND = frozenset({"name", "window", "after_created_at", "after_id"})
_KINDS = (SagaStatus.PENDING, SagaStatus.FAILED, SagaStatus.COMPLETED)


def constants(module: object, prefix: str) -> dict[str, Statement]:
    return {
        f"{prefix} {name.lower().replace('_', ' ')}": value
        for name, value in vars(module).items()
        if isinstance(value, Statement)
    }


STATEMENTS = {
    **{f"write {name}": statement for name, statement in SAVES.items() if name.count(";") != 1},
    **constants(read_sql, "read"),
    **constants(inspection_sql, "inspect"),
    **constants(retention_sql, "retain"),
    "inspect find": inspection_sql.find(_FIND, _KINDS, samples=False),
    "inspect find, sampled": inspection_sql.find(_FIND, _KINDS, samples=True),
    "inspect count": inspection_sql.count(frozenset({"name"}), _KINDS, samples=False),
    "inspect interventions": inspection_sql.interventions(asks_who=True, goes_on=True),
}


def path_of(name: str) -> Path:
    return FOLDER / f"{re.sub(r'[^a-z]+', '_', name.lower()).strip('_')}.sql"


def text_of(statement: Statement) -> str:
    """Return the statement with nothing changed but the white space at the beginning of its lines."""
    sql = re.sub(r"(WITH|\),) (\w+ AS (?:MATERIALIZED )?\()", r"\1\n\2", statement.spelled(None).named)
    lines = [line.strip() for line in sql.strip().splitlines() if line.strip()]
    indented, depth = [], 0
    for line in lines:
        closing = len(line) - len(line.lstrip(")"))
        indented.append("    " * max(depth - closing, 0) + line)
        depth += line.count("(") - line.count(")")
    return "\n".join(indented) + "\n"


@pytest.mark.parametrize("name", STATEMENTS)
def test_it_is_as_written_down(name: str) -> None:
    path, text = path_of(name), text_of(STATEMENTS[name])
    if os.environ.get("SAGA_STORE_WRITE_SQL"):
        path.write_text(text)
    assert path.read_text() == text, "if that is meant, `make sql` writes it down"


def test_nothing_else_is_written_down() -> None:
    paths = {path_of(name) for name in STATEMENTS}
    assert set(FOLDER.glob("*.sql")) == paths
    assert len(paths) == len(STATEMENTS)


@pytest.mark.parametrize("name", STATEMENTS)
def test_every_table_is_in_the_schema_that_was_named(name: str) -> None:
    """So that nothing is found along the search path."""
    spelled = STATEMENTS[name].spelled('a"%b')
    for sql, schema in ((spelled.numbered, '"a""%b".'), (spelled.named, '"a""%%b".')):
        tables = re.findall(r"(\S*)\bsaga_(?:executions|logs|archives|store_version)\b(?!_)", sql)
        assert all(found.endswith(schema) for found in tables)
