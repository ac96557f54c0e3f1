"""The migrations, through the commands that a deploy pipeline types."""

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from saga_store.sqlalchemy import Base
from saga_store.sqlalchemy.tables import REVISION
from tests.databases import Database
from tests.programs import dump, psql
from tests.rows import digests, seed

ROOT = Path(__file__).parent.parent
REVISIONS = [script.revision for script in ScriptDirectory(str(ROOT / "migrations")).walk_revisions()][::-1]

SCHEMES = ["postgresql+psycopg", "postgresql+asyncpg", "postgresql", "postgres"]

# Everything of the schema that a comparison of models doesn't see: the catalog's own words.
FINGERPRINT = """
    SELECT 'column', c.relname, a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull,
        pg_get_expr(d.adbin, d.adrelid) || '', col_description(c.oid, a.attnum)
    FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace AND c.relname <> 'saga_store_version'
    UNION ALL
    SELECT 'table', c.relname, c.reloptions::text, NULL, obj_description(c.oid)
    FROM pg_class c
    WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace AND c.relname <> 'saga_store_version'
    UNION ALL
    SELECT 'constraint', c.relname, k.conname, pg_get_constraintdef(k.oid), k.convalidated::text
    FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
    WHERE c.relnamespace = 'public'::regnamespace AND c.relname <> 'saga_store_version'
    UNION ALL
    SELECT 'index', c.relname, i.relname, pg_get_indexdef(i.oid), x.indisvalid::text
    FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class c ON c.oid = x.indrelid
    WHERE c.relnamespace = 'public'::regnamespace AND c.relname <> 'saga_store_version'
    UNION ALL
    SELECT 'sequence', c.relname, NULL, NULL, NULL
    FROM pg_class c WHERE c.relkind = 'S' AND c.relnamespace = 'public'::regnamespace
"""

Fingerprint = set[tuple[str | None, ...]]


def fingerprint(database: Database) -> Fingerprint:
    with psycopg.connect(database.url()) as connection:
        return set(connection.execute(FINGERPRINT).fetchall())


def alembic(*arguments: str, url: str | None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command as a pipeline does, with no more environment than it takes."""
    environment = {key: value for key, value in os.environ.items() if key != "DATABASE_URL"}
    if url:
        environment["DATABASE_URL"] = url
    line = [sys.executable, "-m", "alembic", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def succeed(*arguments: str, url: str | None, cwd: Path = ROOT) -> str:
    result = alembic(*arguments, url=url, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def fail(*arguments: str, url: str | None) -> str:
    result = alembic(*arguments, url=url)
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


def config(**attributes: object) -> Config:
    config = Config(ROOT / "alembic.ini")
    config.attributes.update(attributes)
    return config


class TestCommands:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_up_check_and_down(self, empty_database: Database, scheme: str) -> None:
        """upgrade, current, check and downgrade work with every way to write the URL."""
        url = make_url(empty_database.url()).set(drivername=scheme).render_as_string(hide_password=False)
        succeed("upgrade", "head", url=url)
        assert f"{REVISION} (head)" in succeed("current", url=url)
        assert "No new upgrade operations detected." in succeed("check", url=url)
        succeed("downgrade", "base", url=url)
        assert fingerprint(empty_database) == set()

    def test_from_another_folder(self, empty_database: Database, tmp_path: Path) -> None:
        """`alembic -c path/to/alembic.ini` finds its scripts and the package wherever it is called."""
        succeed("-c", str(ROOT / "alembic.ini"), "upgrade", "head", url=empty_database.url(), cwd=tmp_path)
        assert fingerprint(empty_database)

    def test_offline_sql_needs_no_database_and_gives_the_same_schema(
        self, database: Database, empty_database: Database
    ) -> None:
        """What `upgrade head --sql` prints can be replayed by psql as it is, and leads to the same catalog."""
        done = psql(empty_database, succeed("upgrade", "head", "--sql", url=None))

        assert (done.returncode, done.stderr) == (0, "")
        assert dump(empty_database) == dump(database)
        assert fingerprint(empty_database) == fingerprint(database)
        assert f"{REVISION} (head)" in succeed("current", url=empty_database.url())

    def test_the_tables_of_a_host_are_not_touched(self, empty_database: Database) -> None:
        """A host's own `alembic_version` and tables stay, and aren't reported as drift."""
        with psycopg.connect(empty_database.url(), autocommit=True) as connection:
            connection.execute("CREATE TABLE orders (id int); CREATE TABLE alembic_version (version_num varchar(32))")
            connection.execute("INSERT INTO alembic_version VALUES ('host_0042')")
            succeed("upgrade", "head", url=empty_database.url())
            succeed("check", url=empty_database.url())
            succeed("downgrade", "base", url=empty_database.url())

            assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("host_0042",)]
            assert connection.execute("SELECT to_regclass('orders') IS NOT NULL").fetchone() == (True,)

    @pytest.mark.parametrize(
        ("change", "reported"),
        [
            ("DROP INDEX ix_saga_logs_created_at", "ix_saga_logs_created_at"),
            ("ALTER TABLE saga_executions ALTER version TYPE bigint", "version"),
            ("ALTER TABLE saga_logs ADD COLUMN note text", "note"),
        ],
    )
    def test_check_notices_drift(self, database: Database, change: str, reported: str) -> None:
        """`alembic check` fails, and names what differs."""
        with psycopg.connect(database.url(), autocommit=True) as connection:
            connection.execute(change.encode())
        assert reported in fail("check", url=database.url())


class TestBadUrls:
    def test_no_url_says_what_to_set(self) -> None:
        for arguments in (["upgrade", "head"], ["downgrade", "base"], ["current"], ["check"]):
            assert "set DATABASE_URL, such as postgresql+psycopg://" in fail(*arguments, url=None)

    def test_a_server_that_is_down_is_named_without_its_password(self) -> None:
        for driver in ("psycopg", "asyncpg"):
            said = fail("upgrade", "head", url=f"postgresql+{driver}://me:secret@127.0.0.1:1/shop")
            assert f"can't connect to shop at 127.0.0.1:1 as me, over {driver}: " in said
            assert "secret" not in said

    def test_another_database_or_driver_is_refused(self) -> None:
        for url in ("mysql://localhost/shop", "postgresql+psycopg2://localhost/shop", "sqlite://"):
            assert "needs PostgreSQL over psycopg or asyncpg" in fail("upgrade", "head", url=url)

    def test_what_is_no_url_is_refused_without_repeating_it(self) -> None:
        said = fail("upgrade", "head", url="secret@localhost")
        assert "doesn't begin with postgresql://" in said
        assert "secret" not in said


class TestThroughThePythonApi:
    def test_a_connection_of_the_callers(self, empty_database: Database) -> None:
        """The migrations run and are committed on the connection that was passed in."""
        engine = create_engine(empty_database.url("psycopg"))
        with engine.connect() as connection:
            command.upgrade(config(connection=connection), "head")
        engine.dispose()
        assert fingerprint(empty_database)

    def test_a_connection_in_a_transaction_is_refused(self, empty_database: Database) -> None:
        """Otherwise Alembic would leave the commit to somebody else, and exit as if all was well."""
        engine = create_engine(empty_database.url("psycopg"))
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            with pytest.raises(CommandError, match="in a transaction already"):
                command.upgrade(config(connection=connection), "head")
        engine.dispose()
        assert fingerprint(empty_database) == set()

    async def test_inside_a_running_loop(self, empty_database: Database) -> None:
        """asyncpg says what to do instead; its connection passed in through run_sync works."""
        with pytest.raises(CommandError, match="inside a running event loop"):
            command.upgrade(config(url=empty_database.url("asyncpg")), "head")

        engine = create_async_engine(empty_database.url("asyncpg"))
        async with engine.connect() as connection:
            await connection.run_sync(lambda sync: command.upgrade(config(connection=sync), "head"))
        await engine.dispose()
        assert fingerprint(empty_database)


class TestStairway:
    @pytest.mark.parametrize("revision", REVISIONS)
    def test_every_revision_goes_up_down_and_up_again(self, empty_database: Database, revision: str) -> None:
        """Down leads to where up came from, and up again to the same schema."""
        with_url = config(url=empty_database.url("psycopg"))
        before = ScriptDirectory.from_config(with_url).get_revision(revision)
        assert before is not None
        down = before.down_revision or "base"
        assert isinstance(down, str)
        command.upgrade(with_url, down) if down != "base" else None
        # To have the version table there from the beginning.
        command.stamp(with_url, down)
        below = fingerprint(empty_database), dump(empty_database)
        command.upgrade(with_url, revision)
        above = fingerprint(empty_database), dump(empty_database)
        command.downgrade(with_url, down)
        assert (fingerprint(empty_database), dump(empty_database)) == below
        command.upgrade(with_url, revision)
        assert (fingerprint(empty_database), dump(empty_database)) == above

    @pytest.mark.parametrize("revision", REVISIONS[1:])
    def test_rows_survive_the_way_down_and_up(self, empty_database: Database, revision: str) -> None:
        """Every value of the columns that stay is as it was."""
        with_url = config(url=empty_database.url("psycopg"))
        command.upgrade(with_url, revision)
        seed(empty_database)
        rows = digests(empty_database)
        command.downgrade(with_url, "-1")
        assert digests(empty_database) == rows
        command.upgrade(with_url, revision)
        assert digests(empty_database) == rows

    def test_there_is_one_head_and_the_package_needs_it(self) -> None:
        assert ScriptDirectory(str(ROOT / "migrations")).get_heads() == [REVISION]

    def test_ids_fit_and_are_ours(self) -> None:
        """They share a namespace with the host's, and VARCHAR(32)."""
        assert all(revision.startswith("saga_store_") and len(revision) <= 32 for revision in REVISIONS)


class TestModels:
    def test_mapped_classes_and_migrations_make_the_same_schema(
        self, database: Database, empty_database: Database
    ) -> None:
        """Compared by the catalog: types, defaults, comments, constraint texts, index definitions, options."""
        engine = create_engine(empty_database.url("psycopg"))
        Base.metadata.create_all(engine)
        engine.dispose()
        assert fingerprint(empty_database) == fingerprint(database)
