"""The reference of the tables, from the mapped classes, which tests compare with what the migrations make."""

from collections.abc import Iterator

from sqlalchemy import CheckConstraint, Column, ForeignKeyConstraint, Table, UniqueConstraint
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, DefaultClause

from saga_store.sqlalchemy import Base

_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call] # SQLAlchemy's own


def as_markdown() -> str:
    """Return a section for each table: its columns, constraints and indexes."""
    return "\n".join(line for table in Base.metadata.tables.values() for line in _section(table))


def _section(table: Table) -> Iterator[str]:
    yield f"## {table.name}\n"
    yield "| Column | Type | NULL | Default | |"
    yield "|---|---|---|---|---|"
    for column in table.columns:
        yield _row(column)
    yield ""
    yield "| Constraint or index | |"
    yield "|---|---|"
    keys = ", ".join(column.name for column in table.primary_key)
    yield f"| `{table.primary_key.name}` | `PRIMARY KEY ({keys})` |"
    for constraint in sorted(table.constraints - {table.primary_key}, key=lambda found: str(found.name)):
        yield f"| `{constraint.name}` | {_constraint(constraint)} |"
    for index in sorted(table.indexes, key=lambda found: str(found.name)):
        sql = str(CreateIndex(index).compile(dialect=_DIALECT)).removeprefix("CREATE ")
        yield f"| `{index.name}` | `{' '.join(sql.split())}` |"
    yield ""


def _row(column: Column[object]) -> str:
    kind = column.type.compile(dialect=_DIALECT).lower()
    default = column.server_default
    given = f"`{default.arg}`" if isinstance(default, DefaultClause) else "an identity" if column.identity else ""
    return f"| `{column.name}` | {kind} | {'yes' if column.nullable else ''} | {given} | {column.comment or ''} |"


def _constraint(constraint: object) -> str:
    match constraint:
        case CheckConstraint():
            return f"`CHECK ({' '.join(str(constraint.sqltext).split())})`"
        case UniqueConstraint():
            return f"`UNIQUE ({', '.join(column.name for column in constraint.columns)})`"
        case ForeignKeyConstraint():
            (element,) = constraint.elements
            return f"`FOREIGN KEY ({', '.join(constraint.column_keys)}) REFERENCES {element.target_fullname}`"
    raise TypeError(constraint)
