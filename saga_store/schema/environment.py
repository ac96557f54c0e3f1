"""What Alembic's env.py does: connect, and run the revisions that the command asks for."""

import os

from alembic import context
from alembic.runtime.migration import MigrationInfo
from sqlalchemy import Connection

from saga_store.schema.connections import Bind, connected, database_url
from saga_store.schema.scripts import VERSION_TABLE
from saga_store.sqlalchemy import Base


def run() -> None:
    """Run Alembic's present command: offline, or on the ``bind`` or ``url`` of its configuration or DATABASE_URL."""
    if context.is_offline_mode():
        _run(dialect_name="postgresql", literal_binds=True)
    else:
        connected(_bind(), _migrate)


def _bind() -> Bind:
    attributes = context.config.attributes
    for name in ("connection", "engine", "bind"):
        if attributes.get(name) is not None:
            return attributes[name]  # type: ignore[no-any-return] # Alembic's attributes are untyped
    return database_url(attributes.get("url") or os.environ.get("DATABASE_URL"))


def _migrate(connection: Connection) -> None:
    _run(connection=connection)


def _run(**where: object) -> None:
    context.configure(
        **where,  # type: ignore[arg-type] # keywords of Alembic's, passed on
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        include_name=_is_ours,
        compare_server_default=True,
        transaction_per_migration=True,
        on_version_apply=_note,  # type: ignore[arg-type] # which is called with keywords
    )
    with context.begin_transaction():
        context.run_migrations()


def _note(*, step: MigrationInfo, **_others: object) -> None:
    context.config.attributes.setdefault("applied", []).append(step.up_revision_id)


def _is_ours(name: str | None, kind: str, _parents: object) -> bool:
    """Look at no tables but ours: `alembic check` runs in databases that hold others."""
    return kind != "table" or name in Base.metadata.tables
