"""Rows for tests of migrations: written with the columns of the first revision, which every later one has."""

import psycopg
from psycopg.sql import SQL, Identifier

from saga_store.schema.fingerprint import expected_fingerprints
from tests.databases import Database

TABLES = ("saga_executions", "saga_logs")

SEED = """
    INSERT INTO saga_executions (id, name, status, context, version, lease_owner, lease_expires_at, created_at)
    SELECT CAST(md5(CAST(n AS text)) AS uuid), 'order-' || n,
        (ARRAY['PENDING', 'RUNNING', 'COMPENSATING', 'COMPLETED', 'FAILED'])[n %% 5 + 1],
        json_build_object('n', n, 'text', repeat('x', n %% 50)), n %% 7 + 1,
        CASE WHEN n %% 5 = 1 THEN 'worker' END, CASE WHEN n %% 5 = 1 THEN now() + interval '1 hour' END,
        now() - make_interval(mins => n)
    FROM generate_series(1, %(sagas)s) AS n;
"""
SEED_LOGS = """
    INSERT INTO saga_logs (saga_id, step_name, action, status, details)
    SELECT id, 'step', 'act', 'COMPLETED', name FROM saga_executions
"""


def seed(database: Database, sagas: int = 200) -> None:
    with psycopg.connect(database.url(), autocommit=True) as connection:
        connection.execute(SEED, {"sagas": sagas})
        connection.execute(SEED_LOGS)
        connection.execute("ANALYZE")


def digests(database: Database) -> list[tuple[object, ...]]:
    """Return the number of rows of each table, and a digest of the columns that the first revision made."""
    first = next(iter(expected_fingerprints().values()))
    found = []
    with psycopg.connect(database.url(), autocommit=True) as connection:
        for table in TABLES:
            prefix = f"column {table}."
            columns = SQL(", ").join(Identifier(key.removeprefix(prefix)) for key in first if key.startswith(prefix))
            query = SQL("SELECT count(*), md5(string_agg(CAST(({}) AS text), ';' ORDER BY id)) FROM {}")
            row = connection.execute(query.format(columns, Identifier(table))).fetchone()
            assert row is not None
            found.append(tuple(row))
    return found
