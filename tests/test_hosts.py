"""Applications with an Alembic history of their own, both ways; the example projects run from the built wheel."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from alembic import context as alembic_context
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection, Engine, create_engine, text

from saga_store import migrations, schema
from saga_store.schema import MigrationError
from tests.databases import Database
from tests.wheel import Environment, build_wheel, install_wheel

EXAMPLES = Path(__file__).parent.parent / "examples"
OURS = {"saga_executions", "saga_logs", "saga_store_version"}


@dataclass(frozen=True)
class Way:
    """One way to embed the migrations: its example project, and what it calls all of its history, and its own head."""

    example: str
    everything: str
    own: str
    back: tuple[str, ...]


WAYS = [
    Way("host_revision", "head", "head", ("base",)),
    Way("host_branch", "heads", "shop@head", ("shop@base", "saga_store@base")),
]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("wheel")
    return install_wheel(build_wheel(folder), folder / "environment")


@dataclass(frozen=True)
class Host:
    """A copy of an example project, and a database for it."""

    way: Way
    folder: Path
    environment: Environment
    database: Database

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        settings = {"DATABASE_URL": self.database.url("psycopg")}
        return self.environment.run(*command, cwd=self.folder, settings=settings)

    def alembic(self, *arguments: str) -> str:
        done = self.run("python", "-W", "error", "-m", "alembic", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def current(self) -> str:
        done = self.run("saga-store", "current")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def tables(self) -> set[str]:
        with psycopg.connect(self.database.url()) as connection:
            rows = connection.execute(
                "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
            )
            return {name for (name,) in rows}

    def write_revision(self, name: str, body: str) -> None:
        (self.folder / "migrations" / "versions" / f"{name}.py").write_text(body)


@pytest.fixture
def host(way: Way, tmp_path: Path, installed: Environment, empty_database: Database) -> Host:
    folder = shutil.copytree(EXAMPLES / way.example, tmp_path / "project")
    return Host(way, folder, installed, empty_database)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.example)
class TestExamples:
    def test_up_and_down(self, host: Host) -> None:
        """One command makes the application's tables and ours, and back again nothing is left but its version table."""
        host.alembic("upgrade", host.way.everything)
        assert host.tables() == {"orders", "alembic_version", *OURS}
        host.alembic("check")
        for target in host.way.back:
            host.alembic("downgrade", target)
        assert host.tables() == {"alembic_version"}

    def test_autogenerate_leaves_our_tables_alone(self, host: Host) -> None:
        """It proposes what the application's own table lacks, and nothing else."""
        host.alembic("upgrade", host.way.everything)
        with psycopg.connect(host.database.url()) as connection:
            connection.execute("ALTER TABLE orders DROP COLUMN customer")
        host.alembic("revision", "--autogenerate", "--rev-id=shop_9999", "-m=Catch up", f"--head={host.way.own}")
        written = (host.folder / "migrations" / "versions" / "shop_9999.py").read_text()
        operations = [line.strip() for line in written.splitlines() if line.strip().startswith("op.")]
        assert operations == [
            "op.add_column('orders', sa.Column('customer', sa.String(length=255), nullable=False))",
            "op.drop_column('orders', 'customer')",
        ]

    def test_saga_store_knows_where_the_tables_are(self, host: Host) -> None:
        host.alembic("upgrade", host.way.everything)
        assert host.current() == "saga_store_0001"

    def test_offline(self, host: Host) -> None:
        """The application's SQL on paper holds ours, and leads to the same tables."""
        script = host.alembic("upgrade", host.way.everything, "--sql")
        with psycopg.connect(host.database.url(), autocommit=True) as connection:
            connection.execute(script.encode())
        assert host.tables() == {"orders", "alembic_version", *OURS}
        assert host.current() == "saga_store_0001"
