"""Tables filled with millions of rows, in minutes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import LiteralString

import psycopg
from psycopg.sql import SQL

_INDEXES: LiteralString = """
    SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid)
    FROM pg_index
    WHERE indrelid IN ('saga_executions'::regclass, 'saga_logs'::regclass) AND NOT indisprimary
"""


@contextmanager
def filling(url: str) -> Iterator[psycopg.Connection]:
    """Give a connection to fill the tables by, which are then as if they had been used, vacuumed and analyzed.

    A full table's indexes are built in a fraction of the time that rows take to fill them, so there are none meanwhile.
    """
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        connection.execute("SET maintenance_work_mem = '1GB'")
        connection.execute("SET work_mem = '256MB'")
        connection.execute("SET session_replication_role = replica")  # each entry has its saga
        indexes = connection.execute(_INDEXES).fetchall()
        for name, _ in indexes:
            connection.execute(SQL("DROP INDEX {}").format(SQL(name)))
        yield connection
        for _, definition in indexes:
            connection.execute(definition.encode())
        connection.execute("VACUUM (ANALYZE)")
