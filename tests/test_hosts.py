"""Applications with an Alembic history of their own, both ways; the example projects run from the built wheel."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, LiteralString

import psycopg
import pytest
from alembic import op
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import OperationalError

from saga_store import migrations, schema
from saga_store.cli.exits import Exit
from saga_store.schema import MigrationError, State
from saga_store.sqlalchemy.tables import REVISION
from tests.connections import engine_on
from tests.databases import Database
from tests.programs import psql
from tests.wheel import Environment

if TYPE_CHECKING:
    import subprocess

EXAMPLES = Path(__file__).parent.parent / "examples"
# What the example of an application's own revisions leads to; it is pinned, as such revisions are.
PINNED = "saga_store_0003"
OURS = {"saga_executions", "saga_logs", "saga_store_version"}


def tables_at(revision: str) -> set[str]:
    """Return which tables there are at a revision."""
    archives = {"saga_archives"} if revision >= "saga_store_0006" else set()
    return OURS | archives | ({"saga_shard"} if revision >= "saga_store_0008" else set())


@dataclass(frozen=True)
class Way:
    """One way to embed the migrations, by its example project.

    Attributes:
        example: Its folder.
        everything: What `alembic upgrade` is given for all of its history, and ours.
        own: The head of its own history.
        back: What `alembic downgrade` is given, one after the other, to undo everything.
        reached: Our revision that everything leads to.
    """

    example: str
    everything: str
    own: str
    back: tuple[str, ...]
    reached: str


WAYS = [
    Way("host_revision", "head", "head", ("base",), PINNED),
    Way("host_branch", "heads", "shop@head", ("shop@base", "saga_store@base"), REVISION),
]


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
        assert host.tables() == {"orders", "alembic_version", *tables_at(host.way.reached)}
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

    def test_the_command_knows_where_the_tables_are(self, host: Host) -> None:
        """`saga-store` finds them whole, and at the revision that the application's history has reached."""
        host.alembic("upgrade", host.way.everything)
        assert host.current() == host.way.reached
        checked = host.run("saga-store", "check")
        assert checked.returncode == (Exit.DONE if host.way.reached == REVISION else Exit.BEHIND), checked.stdout

    def test_on_paper(self, host: Host) -> None:
        """The application's SQL holds ours, and leads to the same tables."""
        done = psql(host.database, host.alembic("upgrade", host.way.everything, "--sql"))
        assert done.returncode == 0, done.stderr
        assert host.tables() == {"orders", "alembic_version", *tables_at(host.way.reached)}
        assert host.current() == host.way.reached
        host.alembic("upgrade", host.way.everything)


def run_revision(database: Database, *work: Callable[[], object], begun: bool = False) -> None:
    """Do work in one revision of an application, whose env.py is Alembic's own."""
    engine = create_engine(database.url("psycopg"))
    try:
        with engine.connect() as connection:
            if begun:
                connection.execute(text("SELECT 1"))
            context = MigrationContext.configure(connection)
            with context.begin_transaction(), Operations.context(context):
                for step in work:
                    step()
    finally:
        engine.dispose()


def query(database: Database, sql: LiteralString) -> list[tuple[object, ...]]:
    with psycopg.connect(database.url()) as connection:
        return connection.execute(sql).fetchall()


class StoppedError(Exception):
    """Something else in the application's revision went wrong."""


def stop() -> None:
    raise StoppedError


class TestRanges:
    """What an application's revision asks for, and what the tables are at."""

    def test_it_makes_the_same_tables_as_the_command(self, empty_database: Database) -> None:
        run_revision(empty_database, lambda: migrations.upgrade(from_="base", to=REVISION))
        assert schema.check(empty_database.url("psycopg")).state is State.CURRENT

    async def test_an_asynchronous_env_py_works_as_well(self, empty_database: Database) -> None:
        """Alembic's template for async engines hands its connection on through run_sync, with either driver."""

        def work(connection: Connection) -> None:
            context = MigrationContext.configure(connection)
            with context.begin_transaction(), Operations.context(context):
                migrations.upgrade(from_="base", to=REVISION)

        async with engine_on(empty_database.url("asyncpg")) as engine, engine.connect() as connection:
            await connection.run_sync(work)
        assert schema.check(empty_database.url("psycopg")).state is State.CURRENT

    def test_one_revision_after_the_other_up_and_down(self, empty_database: Database) -> None:
        """Each range is recorded, and back at the base nothing of ours is left."""
        url = empty_database.url("psycopg")
        line = ["base", *(found.revision for found in schema.history())]
        for lower, upper in pairwise(line):
            run_revision(empty_database, partial(migrations.upgrade, from_=lower, to=upper))
            assert schema.current(url) == upper
        for upper, lower in pairwise(line[::-1]):
            run_revision(empty_database, partial(migrations.downgrade, from_=upper, to=lower))
            assert (schema.current(url) or "base") == lower
        assert query(empty_database, "SELECT relname FROM pg_class WHERE relname LIKE 'saga%'") == []

    def test_tables_of_the_command_are_taken_over(self, database: Database) -> None:
        """What has been done isn't done again, neither all of the range nor its beginning."""
        run_revision(database, lambda: migrations.upgrade(from_="base", to="saga_store_0001"))
        assert schema.current(database.url("psycopg")) == REVISION
        schema.downgrade(database.url("psycopg"), "saga_store_0001")
        run_revision(database, lambda: migrations.upgrade(from_="base", to=REVISION))
        assert schema.check(database.url("psycopg")).state is State.CURRENT

    def test_a_gap_is_refused(self, empty_database: Database) -> None:
        """Tables that aren't where the range begins: somebody has left out a revision."""
        with pytest.raises(MigrationError, match="are at base, and this revision leads on from saga_store_0001"):
            run_revision(empty_database, lambda: migrations.upgrade(from_="saga_store_0001", to="saga_store_0002"))

    def test_a_way_back_from_below_is_refused(self, database: Database) -> None:
        with pytest.raises(
            MigrationError, match=f"are at {REVISION}, and this revision leads back from saga_store_0001"
        ):
            run_revision(database, lambda: migrations.downgrade(from_="saga_store_0001", to="base"))

    def test_tables_of_a_later_release_are_refused(self, database: Database) -> None:
        with psycopg.connect(database.url()) as connection:
            connection.execute("UPDATE saga_store_version SET version_num = 'saga_store_9999'")
        with pytest.raises(MigrationError, match="are at saga_store_9999, and this release knows saga_store_0001"):
            run_revision(database, lambda: migrations.upgrade(from_="base", to="saga_store_0001"))

    @pytest.mark.parametrize(
        ("work", "reason"),
        [
            (lambda: migrations.upgrade(from_="base", to="head"), "to='head' is no revision of this release: choose"),
            (lambda: migrations.upgrade(from_="0001", to="saga_store_0001"), "from_='0001' is no revision"),
            (lambda: migrations.upgrade(from_="saga_store_0001", to="base"), "'base' doesn't come after 'saga_store_0"),
            (lambda: migrations.downgrade(from_="base", to="saga_store_0001"), "doesn't come before 'base'"),
        ],
    )
    def test_a_bad_range_is_refused(self, database: Database, work: Callable[[], None], reason: str) -> None:
        with pytest.raises(MigrationError, match=re.escape(reason)):
            run_revision(database, work)

    def test_outside_a_revision_it_says_what_to_use(self, empty_database: Database) -> None:
        """Also after a migration of the same process has ended."""
        work = partial(migrations.upgrade, from_="base", to="saga_store_0001")
        run_revision(empty_database, work)
        with pytest.raises(MigrationError, match=re.escape("elsewhere use saga_store.schema.upgrade")):
            work()

    def test_after_a_migration_that_failed_it_says_so_too(self, empty_database: Database) -> None:
        """Alembic leaves the context of such a one behind, with a connection that is closed."""
        work = partial(migrations.upgrade, from_="base", to="saga_store_0001")
        with pytest.raises(StoppedError):
            run_revision(empty_database, stop)
        with pytest.raises(MigrationError, match=re.escape("elsewhere use saga_store.schema.upgrade")):
            work()


class TestTransaction:
    """The transaction is the application's."""

    def test_what_fails_later_undoes_ours(self, empty_database: Database) -> None:
        """As long as nothing of it commits in between, an application's revision is done wholly or not at all."""
        with pytest.raises(StoppedError):
            run_revision(empty_database, lambda: migrations.upgrade(from_="base", to="saga_store_0001"), stop)
        assert query(empty_database, "SELECT to_regclass('saga_logs'), to_regclass('saga_store_version')") == [
            (None, None)
        ]

    def test_what_has_committed_in_between_is_not_done_twice(self, empty_database: Database) -> None:
        """An index built concurrently commits what came before, and the next attempt goes on from there."""
        work = partial(migrations.upgrade, from_="base", to=REVISION)
        with pytest.raises(StoppedError):
            run_revision(empty_database, work, stop)
        assert schema.current(empty_database.url("psycopg")) == "saga_store_0006"
        run_revision(empty_database, work)
        assert schema.check(empty_database.url("psycopg")).state is State.CURRENT

    def test_a_transaction_that_alembic_cannot_commit_is_refused(self, empty_database: Database) -> None:
        with pytest.raises(MigrationError, match=re.escape("run the migrations in context.begin_transaction()")):
            run_revision(empty_database, lambda: migrations.upgrade(from_="base", to="saga_store_0001"), begun=True)


class TestWaits:
    """Everybody else waits behind a migration that waits for a table."""

    @pytest.mark.parametrize("own", ["0", "50ms"])
    def test_nothing_of_ours_waits_for_long(self, database: Database, own: str) -> None:
        """If somebody reads on, the revision fails soon, by the application's lock_timeout or else by ours."""
        schema.downgrade(database.url("psycopg"), "saga_store_0001")
        with psycopg.connect(database.url()) as reader:
            reader.execute("SELECT FROM saga_logs")
            with pytest.raises(OperationalError, match="lock timeout"):
                run_revision(
                    database,
                    lambda: op.execute(f"SET lock_timeout = '{own}'"),
                    lambda: migrations.downgrade(from_="saga_store_0001", to="base"),
                )
        assert schema.current(database.url("psycopg")) == "saga_store_0001"

    @pytest.mark.parametrize("own", ["0", "5s"])
    def test_the_application_keeps_its_setting(self, empty_database: Database, own: str) -> None:
        """Afterwards lock_timeout is what it was before."""
        seen: list[str] = []
        run_revision(
            empty_database,
            lambda: op.execute(f"SET lock_timeout = '{own}'"),
            lambda: migrations.upgrade(from_="base", to=REVISION),
            lambda: seen.append(op.get_bind().scalar(text("SHOW lock_timeout"))),
        )
        assert seen == [own]
