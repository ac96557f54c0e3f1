"""The database of each row: its tables, and the proof that every saga is in them."""

from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString

import psycopg
from alembic import command
from alembic.config import Config

from benchmarks.peers import create_cqrs_tables
from benchmarks.rows import Row, Schema
from benchmarks.server import BenchmarkError, Server
from benchmarks.workload import LOG_ENTRIES, STEPS

ALEMBIC_INI = Path(__file__).parent.parent / "alembic.ini"
MIGRATED = "migrated"


@dataclass(frozen=True, slots=True)
class Tables:
    """How to count finished sagas and entries of their history, how many entries make a saga, and what to vacuum."""

    sagas: LiteralString
    entries: LiteralString
    entries_per_saga: int
    vacuum: LiteralString


OF_SAGAS = Tables(
    "SELECT count(*) FROM saga_executions WHERE status::text = 'COMPLETED'",
    "SELECT count(*) FROM saga_logs",
    LOG_ENTRIES,
    "VACUUM (ANALYZE) saga_executions, saga_logs",
)
OF_WORKFLOWS = Tables(
    "SELECT count(*) FROM dbos.workflow_status WHERE status = 'SUCCESS'",
    "SELECT count(*) FROM dbos.operation_outputs",
    len(STEPS),
    "VACUUM (ANALYZE) dbos.workflow_status, dbos.operation_outputs",
)
TABLES: dict[Schema, Tables] = {"saga_store": OF_SAGAS, "cqrs": OF_SAGAS, "dbos": OF_WORKFLOWS}


@dataclass(slots=True)
class Bed:
    """A row's own database. ``sagas`` says how many must be in it."""

    name: str
    url: str
    tables: Tables
    sagas: int = 0

    def settle(self, sagas: int) -> None:
        """See that so many more sagas are there, complete with their history, and clean up after them."""
        self.sagas += sagas
        with psycopg.connect(self.url, autocommit=True) as connection:
            found = [connection.execute(query).fetchone() for query in (self.tables.sagas, self.tables.entries)]
            if found != [(self.sagas,), (self.sagas * self.tables.entries_per_saga,)]:
                raise BenchmarkError(f"{self.name}: of {self.sagas} sagas, sagas and log entries found: {found}")
            connection.execute(self.tables.vacuum)


def make_template(server: Server) -> None:
    """Make the database that beds with our tables are copies of."""
    config = Config(str(ALEMBIC_INI))
    config.attributes["url"] = server.create(MIGRATED)
    command.upgrade(config, "head")


def make_beds(server: Server, rows: tuple[Row, ...]) -> dict[str, Bed]:
    make_template(server)
    return {row.key: _make_bed(server, row) for row in rows}


def _make_bed(server: Server, row: Row) -> Bed:
    name = f"bench_{row.key.replace('-', '_')}"
    url = server.create(name, **({"template": MIGRATED} if row.schema == "saga_store" else {}))
    if row.schema == "cqrs":
        create_cqrs_tables(url)
    return Bed(name, url, TABLES[row.schema])
