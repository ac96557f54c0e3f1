"""The migration: the sagas' tables by ``saga_store.schema``, as ``saga-store upgrade`` does it, and the service's own.

``python -m examples.service.migrate``, with DATABASE_URL set; it may be run again. If the processes connect as another
role, APPLICATION_ROLE names it: it is granted what it needs of the service's own tables, and `saga-store grants` prints
what it needs of the sagas'. A service of your own has its own migrations in place of ``create_all``: docs/migrations.md
says how the two go together.
"""

import asyncio
import os

from sqlalchemy import text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import create_async_engine

from examples.service import outside
from examples.service.orders import Base, Stock
from saga_store import schema

GOODS = [{"item": "coffee", "free": 1000}, {"item": "tea", "free": 50}]

GRANTS = """
GRANT SELECT, UPDATE ON stock TO {role};
GRANT SELECT, INSERT, UPDATE ON orders TO {role};
GRANT SELECT, INSERT, DELETE ON reservations TO {role};
GRANT USAGE ON SCHEMA outside TO {role};
GRANT SELECT, INSERT, UPDATE ON outside.payments, outside.parcels TO {role}
"""


async def create_tables(url: str, role: str | None = None) -> None:
    """Create the service's own tables, and let a role use them that isn't their owner."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Stock).on_conflict_do_nothing(), GOODS)
        for statement in outside.TABLES.split(";"):
            await connection.execute(text(statement))
        if role:
            quoted = connection.dialect.identifier_preparer.quote_identifier(role)
            for statement in GRANTS.split(";"):
                await connection.exec_driver_sql(statement.format(role=quoted))
    await engine.dispose()


def main() -> None:
    url = os.environ["DATABASE_URL"]
    schema.upgrade(url)
    asyncio.run(create_tables(url, os.environ.get("APPLICATION_ROLE")))


if __name__ == "__main__":
    main()
