"""Adoption under load: processes of python-cqrs that go on, adopters that die, race, or find the tables locked.

Who can be where, for one table, between the rows "python-cqrs's" and "saga-store's":

| the adopter has just      | if it dies here           | an old process at the same time                      |
|---------------------------|---------------------------|------------------------------------------------------|
| added columns and the     | both or none: they are    | wrote before: the lock waited for its commit, and    |
| trigger                   | one transaction           | the batches find its row; later: the trigger does    |
| converted a batch         | the rest are NULL there,  | holds a row: that is left for the next pass, nobody  |
|                           | and the next one's        | waits; changes one: the trigger has the last word    |
| added checks, NOT VALID   | they are found, and stay  | what it writes is converted, and so passes them      |
| validated one             | the next is validated     | doesn't notice                                       |
| swapped a table's columns | all or nothing; the other | what it sends is cast to text, what it gets are its  |
|                           | table is another step     | labels; over asyncpg a prepared read fails once      |
| built an index            | an INVALID one is         | doesn't notice                                       |
|                           | replaced                  |                                                      |
| recorded the revision     | the upgrade is left       | doesn't notice                                       |

A second adopter waits for the migration lock, which the server frees when the first one's session has ended; a killed
one's session ends after its present statement. Undoing passes the same points the other way.

Two tests that begin anew for each point try about one in three, drawn at random, and all with
SAGA_STORE_TEST_EXTENT=whole, as CI does.
"""

import asyncio
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import psycopg
import pytest
from sqlalchemy import Engine, NullPool, create_engine, event

from saga_store import adoption, schema
from saga_store.schema import MigrationLockError
from saga_store.schema.fingerprint import State
from saga_store.schema.settings import Progress
from tests.cqrs_tables import OldProcess, connected, digest, missing, old_storage, undone, working
from tests.databases import Database
from tests.extent import WHOLE, stride
from tests.test_migrations import fingerprint

# Repeat with more than these after a change: SAGA_STORE_TEST_KILLS=200.
KILLS = int(os.environ.get("SAGA_STORE_TEST_KILLS", "12" if WHOLE else "6"))
# About as long as an adoption of these tables takes.
LONGEST_LIFE = 0.6


class Died(Exception):  # noqa: N818 - it is no error, but the end of an adopter
    """In place of a SIGKILL between two steps."""


def dies(goal: Callable[..., object], url: str, steps: int, name: str = "") -> bool:
    """Run an adopter that dies after so many steps (of that name), unless it has done everything before."""
    begun: list[str] = []

    def report(progress: Progress) -> None:
        if not progress.done and not progress.finished and name in progress.what:
            begun.append(progress.what)
        # A revision's own progress begins with its rows, and isn't a step's.
        if progress.finished and len(begun) == steps and progress.what == begun[-1]:
            raise Died

    try:
        goal(url, rewrite_below=0, report=report)
    except Died:
        return True
    return False


def is_cut(migrate: Callable[[Engine], object], url: str, changes: int) -> bool:
    """Migrate up to the last but one of so many statements that change something, unless there aren't as many."""
    made: list[str] = []

    def count(
        _connection: object, _cursor: object, statement: str, _parameters: object, _context: object, _many: object
    ) -> None:
        if statement.split(maxsplit=1)[0] in {"ALTER", "CREATE", "DROP", "DO", "UPDATE", "INSERT", "DELETE"}:
            made.append(statement)
            if len(made) == changes:
                raise Died

    engine = create_engine(url, poolclass=NullPool)
    event.listen(engine, "before_cursor_execute", count)
    try:
        migrate(engine)
    except Died:
        return True
    return False


@pytest.fixture
def url(cqrs_database: Database) -> str:
    return cqrs_database.url("psycopg")


class TestDyingAdopters:
    async def test_old_processes_work_at_every_point(
        self, cqrs_database: Database, database: Database, url: str
    ) -> None:
        """Each adopter takes one step and dies; the next one goes on, and in the end nothing is missing."""
        rows = digest(cqrs_database)
        async with old_storage(cqrs_database, "asyncpg") as one, old_storage(cqrs_database, "psycopg") as another:
            processes = OldProcess(one), OldProcess(another)
            deaths = 0
            while dies(adoption.adopt, url, 1):
                deaths += 1
                for process in processes:
                    await process.one_saga()

        assert deaths > 15
        assert fingerprint(cqrs_database) == fingerprint(database)
        assert digest(cqrs_database) == rows
        assert [missing(cqrs_database, process) for process in processes] == [[], []]

    def test_undoing_leads_back_from_every_point(self, cqrs_database: Database, url: str) -> None:
        """However far an adoption has got, and however far its undoing: the tables are python-cqrs's again."""
        before, rows = fingerprint(cqrs_database), digest(cqrs_database)
        steps = 1
        while dies(adoption.adopt, url, steps):
            dies(adoption.undo, url, steps // 2)
            adoption.undo(url, rewrite_below=0)
            assert fingerprint(cqrs_database) in (before, undone(before))
            steps += stride(6)

        assert steps > 15
        assert digest(cqrs_database) == rows

    def test_an_undoing_can_be_turned_back_at_every_point(
        self, cqrs_database: Database, database: Database, url: str
    ) -> None:
        rows = digest(cqrs_database)
        adoption.adopt(url)
        steps = 1
        while dies(adoption.undo, url, steps):
            adoption.adopt(url, rewrite_below=0)
            assert fingerprint(cqrs_database) == fingerprint(database)
            steps += stride(6)

        assert steps > 10
        assert digest(cqrs_database) == rows

    @pytest.mark.parametrize("way", ["upgrade", "downgrade"])
    def test_both_ways_are_open_wherever_a_migration_was_cut(
        self, cqrs_database: Database, database: Database, url: str, way: str
    ) -> None:
        """Within a revision: what it commits by itself is there already, and its own number isn't."""
        before, rows = fingerprint(cqrs_database), digest(cqrs_database)
        adopted, current = "saga_store_0001", fingerprint(database)
        migrate = schema.upgrade if way == "upgrade" else partial(schema.downgrade, revision=adopted)
        changes = 1
        left = True
        while left:
            for goal, wanted in ((adoption.adopt, (current,)), (adoption.undo, (before, undone(before)))):
                adoption.adopt(url, rewrite_below=0)
                if way == "upgrade":
                    schema.downgrade(url, adopted)
                left = is_cut(migrate, url, changes)
                goal(url, rewrite_below=0)
                assert fingerprint(cqrs_database) in wanted
            changes += stride(4)

        assert changes > 10
        assert digest(cqrs_database) == rows

    def test_what_was_never_part_of_a_migration_is_still_refused(self, cqrs_database: Database, url: str) -> None:
        adoption.adopt(url)
        schema.downgrade(url, "saga_store_0006")
        with connected(cqrs_database) as connection:
            connection.execute("ALTER TABLE saga_executions ADD CONSTRAINT ck_saga_executions_stub CHECK (version > 0)")

        assert adoption.plan(url, "undo").refusals == (
            "constraint saga_executions.ck_saga_executions_stub: unexpected, is CHECK (version > 0)",
        )

    @pytest.mark.parametrize(
        ("revision", "change", "kept"),
        [
            (
                "saga_store_0008",
                "ALTER TABLE saga_shard RENAME CONSTRAINT ck_saga_shard_shard TO shard_in_range",
                "INSERT INTO saga_shard (cluster, shard, shards, hash) VALUES (gen_random_uuid(), 0, 2, 'crc32')",
            ),
            (
                "saga_store_0006",
                "ALTER TABLE saga_archives DROP CONSTRAINT uq_saga_archives_archived_at",
                "INSERT INTO saga_archives (id, state, archived_by) VALUES (gen_random_uuid(), 'FAILED', 'alice')",
            ),
        ],
    )
    def test_drift_is_never_taken_for_an_interrupted_downgrade(
        self, cqrs_database: Database, url: str, revision: str, change: str, kept: str
    ) -> None:
        """To adopt once more takes nothing back that holds data."""
        adoption.adopt(url)
        if revision != "saga_store_0008":
            schema.downgrade(url, revision)
        with connected(cqrs_database) as connection:
            connection.execute(kept)
            connection.execute(change)

        assert not [step for step in adoption.plan(url).steps if step.kind == "downgrade"]
        adoption.adopt(url)
        with connected(cqrs_database) as connection:
            table = kept.split()[2]
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (1,)  # noqa: S608 - one of ours

    async def test_killed_at_random_moments_it_always_ends_clean(
        self, cqrs_database: Database, database: Database, url: str
    ) -> None:
        """Adopters and undoers get SIGKILL while old processes write over both drivers; the last one isn't killed."""
        rows = digest(cqrs_database)
        async with old_storage(cqrs_database, "asyncpg") as one, old_storage(cqrs_database, "psycopg") as another:
            processes = OldProcess(one), OldProcess(another)
            with adopter(url) as run:
                async with working(*processes):
                    for _ in range(KILLS):
                        goal = random.choice(["adopt", "adopt", "undo"])  # noqa: S311 - chance, not a secret
                        await asyncio.to_thread(run, goal, random.uniform(0, LONGEST_LIFE))  # noqa: S311 - the same
                    assert await asyncio.to_thread(run, "adopt", None) == 0

        assert schema.check(url).state is State.CURRENT
        assert fingerprint(cqrs_database) == fingerprint(database)
        assert digest(cqrs_database) == rows
        assert [missing(cqrs_database, process) for process in processes] == [[], []]


@contextmanager
def adopter(url: str) -> Iterator[Callable[[str, float | None], int]]:
    """Yield a function that has a child do its work, kills it after so many seconds, and returns its exit code."""
    line = [sys.executable, "-m", "tests.adopter", url]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as parent:
        assert parent.stdin
        assert parent.stdout
        lines = parent.stdout

        def run(goal: str, life: float | None) -> int:
            assert parent.stdin
            parent.stdin.write(f"{goal}\n")
            child = int(lines.readline())
            if life is not None and not select.select([lines], [], [], life)[0]:
                os.kill(child, signal.SIGKILL)  # its parent hasn't waited for it yet, or would have said so
            code = int(lines.readline())
            assert code in {0, -signal.SIGKILL}
            return code

        yield run
        parent.stdin.close()


class TestLockedTables:
    async def test_old_processes_go_on_meanwhile(self, cqrs_database: Database, database: Database, url: str) -> None:
        """Beside their writes rows are converted, over and over; no write fails, and none is lost."""
        rows = digest(cqrs_database)
        async with old_storage(cqrs_database, "asyncpg") as one, old_storage(cqrs_database, "psycopg") as another:
            processes = OldProcess(one), OldProcess(another)
            async with working(*processes):
                for _ in range(2):
                    await asyncio.to_thread(adoption.adopt, url, rewrite_below=0)
                    await asyncio.to_thread(adoption.undo, url, rewrite_below=0)
                await asyncio.to_thread(adoption.adopt, url, rewrite_below=0)

        assert fingerprint(cqrs_database) == fingerprint(database)
        assert digest(cqrs_database) == rows
        assert [missing(cqrs_database, process) for process in processes] == [[], []]

    def test_a_table_that_is_held_for_ever_is_given_up_with_its_holder(self, cqrs_database: Database, url: str) -> None:
        """In bounded time; nothing is half done, and once the holder is gone, running it again does it."""
        with psycopg.connect(cqrs_database.url()) as holder:
            holder.execute("SELECT 1 FROM saga_logs LIMIT 1")
            with pytest.raises(
                MigrationLockError, match=f"pid {holder.info.backend_pid}, .*AccessShareLock on saga_logs"
            ):
                adoption.adopt(url, rewrite_below=0, lock_wait=timedelta(seconds=1))
        with connected(cqrs_database) as connection:
            query = "SELECT count(*) FROM pg_attribute WHERE attname LIKE '%converted' AND NOT attisdropped"
            assert connection.execute(query).fetchone() == (0,)

        adoption.adopt(url)
        assert schema.check(url).state is State.CURRENT

    def test_a_row_that_is_held_keeps_neither_others_nor_the_rest_waiting(
        self, cqrs_database: Database, url: str
    ) -> None:
        """A run of python-cqrs's holds its saga's row while a step works: the rest of the batch is converted."""
        taken: list[psycopg.Connection] = []

        def hold_a_row(progress: Progress) -> None:
            if progress.what == "saga_executions: fill the columns" and not taken:
                taken.append(psycopg.connect(cqrs_database.url()))
                taken[0].execute("UPDATE saga_executions SET name = name WHERE id = md5('saga 7')::uuid")

        with pytest.raises(MigrationLockError, match="RowExclusiveLock on saga_executions"):
            adoption.adopt(url, rewrite_below=0, lock_wait=timedelta(seconds=1), report=hold_a_row)
        with connected(cqrs_database) as connection:
            query = "SELECT array_agg(id) FROM saga_executions WHERE status_converted IS NULL"
            (left,) = connection.execute(query).fetchone() or ()
            assert connection.execute("SELECT ARRAY[md5('saga 7')::uuid]").fetchone() == (left,)
        taken[0].rollback()
        taken[0].close()

        adoption.adopt(url)
        assert schema.check(url).state is State.CURRENT

    async def test_adopters_that_race_do_it_once(self, url: str) -> None:
        """The second one waits for the first, and finds nothing left to do."""
        steps = await asyncio.gather(*(asyncio.to_thread(adoption.adopt, url, rewrite_below=0) for _ in range(3)))

        assert sorted(map(bool, steps)) == [False, False, True]
        assert schema.check(url).state is State.CURRENT

    def test_an_index_that_was_left_invalid_is_replaced(self, cqrs_database: Database, url: str) -> None:
        assert dies(adoption.adopt, url, 1, "build ix_saga_logs_saga_id")
        with connected(cqrs_database) as connection:
            connection.execute(
                "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_saga_logs_saga_id'::regclass"
            )
        adoption.adopt(url)

        assert schema.check(url).state is State.CURRENT
