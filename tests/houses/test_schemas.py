"""Two schemas, each verb, each search path: what isn't in the schema that was meant stays as it is."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import psycopg
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from psycopg.sql import SQL, Identifier
from sqlalchemy import MetaData, create_engine, event, text
from sqlalchemy.pool import NullPool

from saga_store import adoption, migrations, schema
from saga_store.grants import grants
from saga_store.schema.scripts import make_config
from saga_store.sqlalchemy.tables import REVISION
from tests.databases import Database, Databases

DRIVERS = ["psycopg", "asyncpg"]
NAMES = ["shop", 'A b"c', "ünï", "100%", ":x", "$place$", "it's"]
BEHIND = "saga_store_0001"

# Everything that a schema holds: its tables with their columns, constraints, indexes and privileges, and every row.
CATALOG = """
    SELECT format('%%s %%s', c.oid, c.relname), to_jsonb(c) - 'relfrozenxid' - 'relminmxid' - 'relpages' - 'reltuples'
        - 'relallvisible' - 'relallfrozen' - 'relhasindex',
        (SELECT jsonb_agg(to_jsonb(a) ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = c.oid),
        (SELECT jsonb_agg(to_jsonb(k) ORDER BY k.oid) FROM pg_constraint k WHERE k.conrelid = c.oid),
        (SELECT to_jsonb(x) FROM pg_index x WHERE x.indexrelid = c.oid)
    FROM pg_class c WHERE c.relnamespace = to_regnamespace(quote_ident(%s)) ORDER BY c.oid
"""


def digest(database: Database, name: str) -> object:
    with psycopg.connect(database.url()) as connection:
        tables = "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace(quote_ident(%s)) AND relkind = 'r'"
        rows = {
            table: connection.execute(SQL("SELECT * FROM {} ORDER BY 1").format(Identifier(name, table))).fetchall()
            for (table,) in connection.execute(tables, [name]).fetchall()
        }
        return connection.execute(CATALOG, [name]).fetchall(), rows


@pytest.fixture(scope="module")
def in_public(databases: Databases) -> Iterator[Database]:
    """Tables in public, with a saga in them."""
    with databases.empty() as database:
        schema.upgrade(database.url("psycopg"))
        with psycopg.connect(database.url(), autocommit=True) as connection:
            connection.execute(
                "INSERT INTO saga_executions (id, name, context) VALUES (gen_random_uuid(), 'theirs', '{}')"
            )
            connection.execute(
                "INSERT INTO saga_logs (saga_id, step_name, action, status) "
                "SELECT id, 'pay', 'act', 'STARTED' FROM saga_executions"
            )
        yield database


def schemas(database: Database, name: str, at: str | None) -> None:
    """Make a schema of that name, first in everybody's search path, and bring it to a revision."""
    with psycopg.connect(database.url(), autocommit=True) as admin:
        admin.execute(SQL("CREATE SCHEMA {}").format(Identifier(name)))
    if at is not None:
        schema.upgrade(database.url("psycopg"), at, schema=name)
    with psycopg.connect(database.url(), autocommit=True) as admin:
        admin.execute(
            SQL("ALTER DATABASE {} SET search_path = {}, public").format(Identifier(database.name), Identifier(name))
        )


@pytest.fixture
def arranged(databases: Databases, in_public: Database) -> Iterator[Callable[[str, str | None], Database]]:
    """Make a copy of those tables beside a schema that comes before public in the search path."""
    with databases.clone(in_public) as database:

        def arrange(name: str, at: str | None) -> Database:
            schemas(database, name, at)
            return database

        yield arrange


def on_paper(script: str, database: Database) -> None:
    """Run a script as psql does, statement by statement."""
    with psycopg.connect(database.url(), autocommit=True) as connection:
        for statement in script.split(";\n\n"):
            if statement.strip():
                connection.execute(statement.encode())
        assert "public" in str(connection.execute("SHOW search_path").fetchone())


def in_a_host(
    database: Database,
    work: Callable[[], None],
    *,
    convention: str | None = None,
    translate: Mapping[str | None, str] | None = None,
) -> None:
    """Run it as a revision of an application's."""
    conventions = dict.fromkeys(("ck", "fk", "ix"), convention) if convention else None
    options = {"schema_translate_map": translate} if translate else {}
    engine = create_engine(database.url("psycopg"), poolclass=NullPool, execution_options=options)
    with engine.connect() as connection:
        before = connection.scalar(text("SELECT current_setting('search_path')"))
        connection.commit()
        metadata = MetaData(naming_convention=conventions)
        context = MigrationContext.configure(connection, opts={"target_metadata": metadata})
        with Operations.context(context), context.begin_transaction():
            work()
        assert connection.scalar(text("SELECT current_setting('search_path')")) == before


def as_a_branch(database: Database, *, convention: str | None = None) -> None:
    """Run the revisions as those of a second branch, which only Alembic and the application call."""
    for script in reversed(list(ScriptDirectory.from_config(make_config()).walk_revisions())):
        in_a_host(database, script.module.upgrade, convention=convention)


Arrange = Callable[[str, str | None], Database]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("named", [False, True], ids=["by the path", "named"])
class TestVerbs:
    """The tables of public are there for the finding, and none of it is touched."""

    @pytest.mark.parametrize("at", [None, BEHIND, REVISION], ids=["empty", "behind", "current"])
    def test_up_and_down(self, arranged: Arrange, driver: str, at: str | None, *, named: bool) -> None:
        """Whatever the schema has already, it gets what is missing, and gives it all back; public stays as it is."""
        database = arranged('A b"c', at)
        before = digest(database, "public")
        url, where = database.url(driver), 'A b"c' if named else None
        assert schema.current(url, schema=where) == at
        state = schema.State.CURRENT if at == REVISION else schema.State.BEHIND
        assert schema.check(url, schema=where).state is state
        schema.upgrade(url, schema=where)
        assert schema.check(url, schema='A b"c').state is schema.State.CURRENT
        schema.stamp(url, BEHIND, schema=where)
        assert schema.current(url, schema=where) == BEHIND
        schema.stamp(url, REVISION, schema=where)
        schema.downgrade(url, "base", schema=where)
        assert schema.current(url, schema=where) is None
        assert digest(database, "public") == before

    def test_what_is_not_there_cannot_be_taken_back(self, arranged: Arrange, driver: str, *, named: bool) -> None:
        """Nor is what is there further along the path; it is said where that is."""
        database = arranged("shop", None)
        before = digest(database, "public")
        with pytest.raises(schema.MigrationError, match=r"nothing of saga-store's in schema shop.* --schema public"):
            schema.downgrade(database.url(driver), "base", schema="shop" if named else None)
        assert digest(database, "public") == before


class TestNames:
    @pytest.mark.parametrize("name", NAMES)
    def test_any_schema_online_and_on_paper(self, databases: Databases, name: str) -> None:
        """Whatever its name, the tables come into it and nowhere else, and the session's path comes back."""
        with databases.empty() as database:
            schemas(database, name, None)
            for driver in DRIVERS:
                schema.upgrade(database.url(driver), schema=name)
                schema.downgrade(database.url(driver), "base", schema=name)
            on_paper(schema.sql(schema=name), database)
            assert schema.check(database.url(), schema=name).state is schema.State.CURRENT
            on_paper(schema.sql("head", "base"), database)
            assert schema.current(database.url(), schema=name) is None
            on_paper(schema.sql(), database)
            assert schema.check(database.url(), schema=name).state is schema.State.CURRENT
            with psycopg.connect(database.url()) as connection:
                assert connection.execute(CATALOG, ["public"]).fetchall() == []

    def test_the_schema_of_the_role(self, databases: Databases, in_public: Database) -> None:
        """PostgreSQL's own default, with a schema that is named like the role."""
        with databases.clone(in_public) as database:
            before = digest(database, "public")
            with psycopg.connect(database.url(), autocommit=True) as admin:
                admin.execute(SQL("CREATE SCHEMA {}").format(Identifier(str(database.address.username))))
            assert schema.current(database.url()) is None
            schema.upgrade(database.url())
            schema.downgrade(database.url(), "base")
            assert digest(database, "public") == before

    def test_a_listener_that_sets_the_path_is_refused(self, arranged: Arrange) -> None:
        """Each transaction of such an engine would be in a schema of somebody else's."""
        database = arranged("shop", None)
        before = digest(database, "public")
        engine = create_engine(database.url("psycopg"), poolclass=NullPool)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("SET LOCAL search_path = public"))
        with pytest.raises(schema.MigrationError, match="sets the search_path of each transaction"):
            schema.upgrade(engine, schema="shop")
        assert digest(database, "public") == before


class TestOthers:
    """Adoption, grants and applications' own histories."""

    def test_grants(self, arranged: Arrange) -> None:
        database = arranged("shop", REVISION)
        before = digest(database, "public")
        with psycopg.connect(database.url(), autocommit=True) as admin:
            admin.execute("CREATE ROLE house_of_shop")
            try:
                admin.execute(grants("house_of_shop", schema=None).encode())
                assert schema.check_grants(database.url(), "house_of_shop") == []
                assert digest(database, "public") == before
            finally:
                admin.execute("DROP OWNED BY house_of_shop; DROP ROLE house_of_shop")

    @pytest.mark.parametrize("driver", DRIVERS)
    def test_adoption(self, cqrs_database: Database, driver: str) -> None:
        """python-cqrs's tables in public aren't adopted for those of another schema."""
        schemas(cqrs_database, "shop", None)
        before = digest(cqrs_database, "public")
        url = cqrs_database.url(driver)
        with pytest.raises(adoption.AdoptionError, match="there is none in schema shop"):
            adoption.adopt(url)
        schema.upgrade(url, BEHIND)
        adoption.adopt(url)
        assert schema.check(url, schema="shop").state is schema.State.CURRENT
        assert digest(cqrs_database, "public") == before

    @pytest.mark.parametrize("way", ["path", "named", "translated"])
    def test_a_revision_that_calls_ours(self, arranged: Arrange, way: str) -> None:
        database = arranged("shop", None)
        before = digest(database, "public")
        translate: dict[str | None, str] | None = {None: "shop"} if way == "translated" else None
        where = "shop" if way == "named" else None
        if way != "path":
            with psycopg.connect(database.url(), autocommit=True) as admin:
                admin.execute(SQL("ALTER DATABASE {} RESET search_path").format(Identifier(database.name)))
        in_a_host(database, partial(migrations.upgrade, from_="base", to=REVISION, schema=where), translate=translate)
        assert schema.check(database.url(), schema="shop").state is schema.State.CURRENT
        in_a_host(database, partial(migrations.downgrade, from_=REVISION, to="base", schema=where), translate=translate)
        assert schema.current(database.url(), schema="shop") is None
        assert digest(database, "public") == before

    def test_a_second_branch(self, arranged: Arrange) -> None:
        """An index of public's isn't taken for that of the schema."""
        database = arranged("shop", None)
        before = digest(database, "public")
        as_a_branch(database)
        schema.stamp(database.url(), REVISION)
        assert schema.check(database.url()).state is schema.State.CURRENT
        assert digest(database, "public") == before


class TestNamingConventions:
    """An application's convention is for its own constraints."""

    CONVENTION = "x_%(table_name)s_%(constraint_name)s"
    IDENTITIES = "SELECT oid, indrelid FROM pg_constraint JOIN pg_index ON conindid = indexrelid ORDER BY oid"

    @pytest.mark.parametrize("way", ["revision", "branch"])
    def test_none_changes_our_names(self, empty_database: Database, way: str) -> None:
        if way == "branch":
            as_a_branch(empty_database, convention=self.CONVENTION)
            schema.stamp(empty_database.url(), REVISION)
        else:
            upgrade = partial(migrations.upgrade, from_="base", to=REVISION)
            in_a_host(empty_database, upgrade, convention=self.CONVENTION)
        assert schema.check(empty_database.url()).state is schema.State.CURRENT

    def test_a_check_of_the_application_s_stays(self, empty_database: Database) -> None:
        """Though its name has one of ours in it; ours is dropped whatever a convention has put before its name."""
        url = empty_database.url("psycopg")
        schema.upgrade(url)
        with psycopg.connect(empty_database.url(), autocommit=True) as admin:
            admin.execute(
                "ALTER TABLE saga_executions "
                "RENAME CONSTRAINT ck_saga_executions_stub TO ck_saga_executions_ck_saga_executions_stub"
            )
            theirs = {"app_ck_saga_executions_lease_owner_prefix", "ck_saga_executions_stub_is_small"}
            for name in theirs:
                admin.execute(
                    SQL("ALTER TABLE saga_executions ADD CONSTRAINT {} CHECK (name <> '')").format(Identifier(name))
                )
            schema.downgrade(url, "saga_store_0001")
            left = admin.execute(
                "SELECT conname FROM pg_constraint WHERE conrelid = 'saga_executions'::regclass AND contype = 'c'"
            ).fetchall()
        assert {name for (name,) in left} == {"ck_saga_executions_status", *theirs}

    @pytest.mark.parametrize("driver", [*DRIVERS, "paper"])
    def test_names_that_one_has_changed_are_healed_in_place(self, empty_database: Database, driver: str) -> None:
        """Every constraint and index gets its name back, with the same identity: nothing is built again."""
        url = empty_database.url(driver if driver in DRIVERS else None)
        schema.upgrade(url, "saga_store_0003")
        with psycopg.connect(empty_database.url(), autocommit=True) as admin:
            found = admin.execute(
                "SELECT conrelid::regclass::text, conname FROM pg_constraint WHERE contype IN ('p', 'f', 'c') "
                "AND connamespace = 'public'::regnamespace AND conname NOT LIKE '%lease' AND conname NOT LIKE '%pkc'"
            ).fetchall()
            for table, name in found:
                rename = SQL("ALTER TABLE {} RENAME CONSTRAINT {} TO {}")
                admin.execute(rename.format(Identifier(table), Identifier(name), Identifier(f"ck_{table}_{name}")))
            admin.execute("ALTER INDEX ix_saga_logs_saga_id RENAME TO x_saga_logs_ix_saga_logs_saga_id")
            before = set(admin.execute(self.IDENTITIES.encode()).fetchall())
            assert len(found) == 6
            if driver == "paper":
                on_paper(schema.sql("saga_store_0003", "head"), empty_database)
            else:
                schema.upgrade(url)
            assert schema.check(url).state is schema.State.CURRENT
            # Later revisions add some.
            assert before <= set(admin.execute(self.IDENTITIES.encode()).fetchall())
