"""As `alembic init` writes it, but for the lines that say why."""

import logging.config
import os

from alembic import context
from saga_store.migrations import include_name, record_version
from shop.models import Base  # type: ignore[import-not-found] # it is found in this project's folder, alembic's cwd
from sqlalchemy import create_engine, text

OPTIONS = {
    "target_metadata": Base.metadata,
    # Otherwise `revision --autogenerate` would propose to drop saga-store's tables.
    "include_name": include_name,
    # So that `saga-store check`, and the storage, know which of saga-store's revisions have been run.
    "on_version_apply": record_version,
    # Some of saga-store's revisions commit in between. So nothing of another revision is committed along with them.
    "transaction_per_migration": True,
}


def run_offline() -> None:
    context.configure(dialect_name="postgresql", literal_binds=True, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    engine = create_engine(os.environ["DATABASE_URL"])
    with engine.connect() as connection:
        # saga-store's statements must not wait for a table for long, since everybody else waits behind them.
        connection.execute(text("SET lock_timeout = '2s'"))
        # Alembic would take an open transaction for somebody else's, and commit nothing.
        connection.commit()
        context.configure(connection=connection, **OPTIONS)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


if context.config.config_file_name:
    logging.config.fileConfig(context.config.config_file_name, disable_existing_loggers=False)

if context.is_offline_mode():
    run_offline()
else:
    run_online()
