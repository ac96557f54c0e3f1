"""How the views read a table of some size: by its indexes, and only what they show."""

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.views import DAY, SOME_SAGA, STUCK, View, statements_of
from saga_store import SagaStatus
from saga_store.inspection import MOST_COUNTED, SagaCondition, SagaQuery
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.sqlalchemy.inspection_sql import READ_ONLY
from saga_store.sqlalchemy.statement import Spelling
from saga_store.sqlalchemy.wire import Parameters
from tests.databases import Database, Databases

# Over 60 days; of 30 sagas one is unfinished and one failed. Contexts are some hundred bytes long.
SAGAS_SQL = """
    INSERT INTO saga_executions (
        id, name, status, context, recovery_attempts, lease_owner, lease_expires_at, created_at, updated_at
    )
    SELECT CAST(md5(CAST(n AS text)) AS uuid), 'order-' || n % 7,
        CASE n % 30 WHEN 0 THEN 'RUNNING' WHEN 1 THEN 'FAILED' ELSE 'COMPLETED' END,
        json_build_object('n', n, 'text', repeat('x', 300)), n % 6,
        CASE WHEN n % 90 = 0 THEN 'worker-1' END, CASE WHEN n % 90 = 0 THEN now() - interval '1 day' END,
        now() - make_interval(secs => n * 172.8), now() - make_interval(secs => n * 172.8 - 60)
    FROM generate_series(1, 30000) AS n
    ORDER BY n DESC
"""
LOGS_SQL = """
    INSERT INTO saga_logs (saga_id, step_name, action, status, details, created_at)
    SELECT e.id, 'step-' || s.n, 'act', s.status, s.details, e.created_at + make_interval(secs => s.n)
    FROM saga_executions e
    CROSS JOIN (
        VALUES (1, 'STARTED', NULL), (1, 'COMPLETED', NULL), (2, 'STARTED', NULL), (2, 'FAILED', 'error 7')
    ) AS s (n, status, details)
    ORDER BY e.created_at
"""
INTERVENTIONS_SQL = """
    INSERT INTO saga_logs (saga_id, step_name, action, status, details)
    SELECT id, 'saga_store.break_lease', 'act', 'COMPLETED', '{"by": "alice", "reason": "x"}'
    FROM saga_executions
    WHERE status = 'RUNNING'
    LIMIT 50
"""


def since() -> datetime:
    return datetime.now(UTC) - 7 * DAY


async def third_page(storage: SqlAlchemySagaStorage) -> None:
    first = await storage.find_sagas()
    second = await storage.find_sagas(after=first.after)
    await storage.find_sagas(after=second.after)


async def later_page_of_stuck(storage: SqlAlchemySagaStorage) -> None:
    first = await storage.find_sagas(SagaQuery(conditions=STUCK), limit=10)
    await storage.find_sagas(SagaQuery(conditions=STUCK), limit=10, after=first.after)


# Each with the most pages that it may touch: a page of a list has 50 sagas, with 16 pages for the history of each; a
# sample here has 1,000 unfinished sagas or 1,000 failed ones.
LIST, SAMPLE = 1_500, 20_000
VIEWS: dict[str, tuple[View, int]] = {
    "all": (lambda storage: storage.find_sagas(), LIST),
    "third page": (third_page, LIST),
    "stuck": (lambda storage: storage.find_sagas(SagaQuery(conditions=STUCK)), SAMPLE),
    "later page of stuck": (later_page_of_stuck, SAMPLE),
    "held": (lambda storage: storage.find_sagas(SagaQuery(conditions=[SagaCondition.HELD])), LIST),
    "failed": (lambda storage: storage.find_sagas(SagaQuery(statuses=[SagaStatus.FAILED])), LIST),
    "running": (lambda storage: storage.find_sagas(SagaQuery(statuses=[SagaStatus.RUNNING])), LIST),
    "a name": (lambda storage: storage.find_sagas(SagaQuery(name="order-3")), LIST),
    "a name of none": (lambda storage: storage.find_sagas(SagaQuery(name="none")), LIST),
    "a context of none": (lambda storage: storage.find_sagas(SagaQuery(context={"n": -1})), LIST),
    "a step, in doubt, silent": (
        lambda storage: storage.find_sagas(SagaQuery(step="step-2", in_doubt=True, silent_for=DAY)),
        SAMPLE,
    ),
    "an owner": (lambda storage: storage.find_sagas(SagaQuery(lease_owner="worker-1")), LIST),
    "an id": (lambda storage: storage.find_sagas(SagaQuery(id_prefix="c4ca4238")), 60),
    "a day": (
        lambda storage: storage.find_sagas(SagaQuery(created_after=since(), created_before=since() + DAY)),
        LIST,
    ),
    "count": (lambda storage: storage.count_sagas(), LIST),
    "count of failed": (lambda storage: storage.count_sagas(SagaQuery(statuses=[SagaStatus.FAILED])), 100),
    "count of stuck": (lambda storage: storage.count_sagas(SagaQuery(conditions=STUCK)), SAMPLE),
    "groups": (lambda storage: storage.group_sagas(SagaQuery(conditions=STUCK)), SAMPLE),
    "groups of failed": (lambda storage: storage.group_sagas(SagaQuery(statuses=[SagaStatus.FAILED])), SAMPLE),
    "interventions": (lambda storage: storage.find_interventions(since=since(), limit=10), 80),
    "more interventions": (
        lambda storage: storage.find_interventions(since=since(), by="alice", limit=10, after="9999999"),
        80,
    ),
    "the end of a history": (lambda storage: storage.get_recent_history(SOME_SAGA), 60),
    "a context": (lambda storage: storage.peek_context(SOME_SAGA), 10),
    "figures": (lambda storage: storage.get_figures(), SAMPLE),
    "exhausted": (lambda storage: storage.find_sagas(SagaQuery(conditions=[SagaCondition.EXHAUSTED])), LIST),
    "abandoned": (lambda storage: storage.find_sagas(SagaQuery(conditions=[SagaCondition.ABANDONED])), LIST),
    "stale": (lambda storage: storage.find_sagas(SagaQuery(conditions=[SagaCondition.STALE])), SAMPLE),
    "active": (lambda storage: storage.find_sagas(SagaQuery(conditions=[SagaCondition.ACTIVE])), SAMPLE),
    "finished": (lambda storage: storage.find_sagas(SagaQuery(conditions=[SagaCondition.FINISHED])), LIST),
    "completed": (lambda storage: storage.find_sagas(SagaQuery(statuses=[SagaStatus.COMPLETED])), LIST),
    "running or failed": (
        lambda storage: storage.find_sagas(SagaQuery(statuses=[SagaStatus.RUNNING, SagaStatus.FAILED])),
        LIST,
    ),
    "before a day": (lambda storage: storage.find_sagas(SagaQuery(created_before=since())), LIST),
    "a name since a day": (
        lambda storage: storage.find_sagas(SagaQuery(name="order-3", created_after=since())),
        LIST,
    ),
    "a context that occurs": (lambda storage: storage.find_sagas(SagaQuery(context={"n": 77})), LIST),
    "silent": (lambda storage: storage.find_sagas(SagaQuery(silent_for=DAY)), SAMPLE),
    "not in doubt": (lambda storage: storage.find_sagas(SagaQuery(in_doubt=False, name="order-3")), SAMPLE),
    "an id's first digit": (lambda storage: storage.find_sagas(SagaQuery(id_prefix="c")), 2 * LIST),
    "count of a name": (lambda storage: storage.count_sagas(SagaQuery(name="order-3")), LIST),
    "count in doubt": (lambda storage: storage.count_sagas(SagaQuery(in_doubt=True)), SAMPLE),
    "groups of what is held in silence": (
        lambda storage: storage.group_sagas(SagaQuery(conditions=[SagaCondition.HELD], silent_for=DAY)),
        SAMPLE,
    ),
    "groups of what failed in doubt": (
        lambda storage: storage.group_sagas(SagaQuery(statuses=[SagaStatus.FAILED], in_doubt=True)),
        SAMPLE,
    ),
    "groups of a name": (lambda storage: storage.group_sagas(SagaQuery(name="order-3")), SAMPLE),
    "a saga": (lambda storage: storage.get_saga(SOME_SAGA), 10),
    "its history": (lambda storage: storage.get_step_history(SOME_SAGA), 20),
    "its steps in doubt": (lambda storage: storage.get_in_doubt_steps(SOME_SAGA), 60),
    "stale by their rows": (lambda storage: storage.find_stale_sagas(stale_after=DAY), LIST),
    "exhausted by their rows": (lambda storage: storage.find_exhausted_sagas(), LIST),
}


@pytest.fixture(scope="module")
def full(databases: Databases, template: Database) -> Iterator[Database]:
    with databases.clone(template) as database:
        with psycopg.connect(database.url(), autocommit=True) as connection:
            connection.execute(SAGAS_SQL)
            connection.execute(LOGS_SQL)
            connection.execute(INTERVENTIONS_SQL)
            connection.execute("VACUUM ANALYZE")
        yield database


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("name", VIEWS)
async def test_views_read_little(full: Database, name: str, mode: str) -> None:
    """No view scans a table from one end to the other, or touches more pages than what it looks at takes.

    Nor does it by plans that the server keeps for statements that come often, made for no values in particular.
    """
    view, most_pages = VIEWS[name]
    with psycopg.connect(full.url(), cursor_factory=psycopg.ClientCursor) as connection:
        connection.execute("SELECT set_config('plan_cache_mode', %s, FALSE)", [mode])
        connection.commit()
        for statement, parameters in await statements_of(view, full.url("psycopg")):
            spelling = statement.spelled(None)
            if statement is READ_ONLY:
                connection.execute(spelling.named.encode())
                continue
            plan = explained(connection, spelling, parameters)
            connection.rollback()
            # The ledger of archives has a row for thousands of sagas, and is added up as a whole.
            assert not re.search("Seq Scan on saga_(executions|logs)", plan), plan
            of_all = next(line for line in plan.splitlines() if "Buffers:" in line)
            pages = sum(int(found) for found in re.findall(r"(?:hit|read)=(\d+)", of_all))
            assert pages <= most_pages, plan


def explained(connection: psycopg.Connection, spelling: Spelling, parameters: Parameters) -> str:
    """Return the plan of a statement that is prepared, as the drivers do it."""
    connection.execute(f"PREPARE kept AS {spelling.numbered}".encode())
    values = [parameters[name] for name in spelling.names]
    given = f"({', '.join(['%s'] * len(values))})" if values else ""
    lines = connection.execute(f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF) EXECUTE kept {given}".encode(), values)
    plan = "\n".join(line for (line,) in lines)
    connection.execute("DEALLOCATE kept")
    return plan


async def test_figures_have_an_end_to_count_to(database: Database, make_engine: Callable[[str], AsyncEngine]) -> None:
    """On the day on which nothing finishes, and all else fails, there are figures, and they say what they are."""
    with psycopg.connect(database.url(), autocommit=True) as connection:
        connection.execute(
            """
            INSERT INTO saga_executions (id, name, status, context, created_at)
            SELECT gen_random_uuid(), 'order', status, '{}', now() - make_interval(mins => 20, secs => n / 100)
            FROM generate_series(1, %s) AS n, (VALUES ('RUNNING'), ('FAILED')) AS of (status)
            """,
            [MOST_COUNTED + 50],
        )
    figures = await SqlAlchemySagaStorage(make_engine("asyncpg")).get_figures()
    assert sum(figures.unfinished.values()) == figures.failed_24h == MOST_COUNTED
    assert {"finished", "unfinished", "in_doubt_steps", "failed_24h"} == set(figures.estimated)
    assert figures.finished is None
    assert figures.oldest_unfinished > timedelta(minutes=20)
