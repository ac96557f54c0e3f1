"""A hundred misuses, each answered by an error that names what was given, and what to do instead."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import StaticPool

from saga_store import (
    Checkpoint,
    LogStep,
    MemoryDatabase,
    MemorySagaStorage,
    MemorySession,
    SagaStatus,
    SagaStepStatus,
    SagaStoreError,
    schema,
)
from saga_store.cli import main
from saga_store.cqrs import CqrsSagaStorage
from saga_store.inspection import SagaQuery
from saga_store.recovery import RecoveryWorker
from saga_store.retention import RetentionPolicy
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage

ID, OTHER = UUID(int=1), UUID(int=2)
HOUR, NEVER = timedelta(hours=1), timedelta(0)
PAST, NAIVE = datetime(2000, 1, 1, tzinfo=UTC), datetime(2030, 1, 1)  # noqa: DTZ001 - a misuse
URL = "postgresql+asyncpg://shop:geheim@127.0.0.1:1/shop"
RUNNING, STARTED, FAILED = SagaStatus.RUNNING, SagaStepStatus.STARTED, SagaStepStatus.FAILED
STEP = LogStep("pay", "act", STARTED)
memory: Any = MemorySagaStorage()
storage: Any = SqlAlchemySagaStorage
worker: Any = RecoveryWorker
policy: Any = RetentionPolicy


def engine(url: str = URL, **options: Any) -> AsyncEngine:  # noqa: ANN401 - whatever create_async_engine takes
    return create_async_engine(url, **options)


def joined() -> Any:  # noqa: ANN401 - it is called as it shouldn't be
    return MemorySagaStorage(MemorySession(MemoryDatabase()))


def itself() -> dict[str, Any]:
    context: dict[str, Any] = {}
    context["me"] = context
    return context


async def handler(run: Any) -> None:  # noqa: ANN401 - never called
    del run


async def not_awaited() -> None: ...


async def without_await(give: Callable[[Any], Any]) -> None:
    coroutine = not_awaited()
    try:
        await give(coroutine)
    finally:
        coroutine.close()


async def in_run(saga_id: UUID = ID, **options: object) -> None:
    """Use a run that wasn't entered."""
    await memory.run(ID, **options).update_status(saga_id, RUNNING)


async def commit_into(into: object) -> None:
    await memory.get_or_create_saga(ID, "order", {})
    async with memory.run(ID) as run:
        await run.update_status(ID, RUNNING)
        try:
            await run.commit(into=into)
        finally:
            await run.rollback()


async def run_twice() -> None:
    one = RecoveryWorker(memory, {"order": handler})
    one.stop()
    await one.run()
    await one.run()


def in_two_loops() -> None:
    one = SqlAlchemySagaStorage(engine(), retry_for=NEVER)

    async def use() -> None:
        await one.create_saga(ID, "order", {})

    first = asyncio.new_event_loop()
    with suppress(Exception):
        first.run_until_complete(use())
    try:
        asyncio.run(use())
    finally:
        first.close()


async def settle_nothing() -> None:
    await memory.get_or_create_saga(ID, "order", {})
    await memory.settle_step(ID, 77, FAILED, by="alice", reason="r")


class Misuse(NamedTuple):
    """What is done; what of it the message names; and what it says to do instead."""

    call: Callable[[], Any]
    named: str
    remedy: str


MISUSES = {
    # ids
    "an id as text": Misuse(lambda: memory.get_saga("a7"), "'a7' (str)", "uuid.UUID()"),
    "an id as a number": Misuse(lambda: memory.get_saga(7), "7 (int)", "uuid.UUID()"),
    "no id": Misuse(lambda: memory.get_step_history(None), "None", "uuid.UUID()"),
    "an id that wasn't awaited": Misuse(
        lambda: without_await(memory.get_saga), "the coroutine not_awaited()", "await it"
    ),
    # names and texts
    "an empty name": Misuse(lambda: memory.create_saga(ID, "", {}), "name", "1 to 255 characters"),
    "no name": Misuse(lambda: memory.create_saga(ID, None, {}), "None", "give it some characters"),
    "a name as bytes": Misuse(lambda: memory.create_saga(ID, b"order", {}), "b'order' (bytes)", "decode it"),
    "a long name": Misuse(lambda: memory.create_saga(ID, "x" * 256, {}), "256", "at most 255"),
    "a name with NUL": Misuse(lambda: memory.create_saga(ID, "a\0", {}), "at index 1", "remove it"),
    "a name with a surrogate": Misuse(lambda: memory.create_saga(ID, "a\ud800", {}), "at index 1", "replace it"),
    "name and context swapped": Misuse(lambda: memory.create_saga(ID, {}, "order"), "{} (dict)", "a str"),
    "details as a dict": Misuse(
        lambda: memory.log_step(ID, "pay", "act", FAILED, {"code": 7}), "{'code': 7}", "json.dumps()"
    ),
    "details as an exception": Misuse(
        lambda: memory.log_step(ID, "pay", "act", FAILED, ValueError("no")), "ValueError('no')", "str()"
    ),
    "no step's name": Misuse(lambda: memory.log_step(ID, None, "act", STARTED), "step_name", "a str"),
    # contexts
    "no context": Misuse(lambda: memory.create_saga(ID, "order", None), "None", "{}"),
    "a context as JSON": Misuse(lambda: memory.create_saga(ID, "order", "{}"), "'{}' (str)", "json.loads()"),
    "a context as a list": Misuse(lambda: memory.create_saga(ID, "order", [1]), "[1] (list)", "under a key"),
    "a context that wasn't awaited": Misuse(
        lambda: without_await(lambda it: memory.create_saga(ID, "order", it)), "not_awaited()", "await it"
    ),
    "NaN": Misuse(lambda: memory.create_saga(ID, "order", {"a": float("nan")}), "context['a'] is nan", "None or a"),
    "infinity": Misuse(lambda: memory.create_saga(ID, "order", {"a": float("inf")}), "context['a'] is inf", "a string"),
    "a huge number": Misuse(
        lambda: memory.create_saga(ID, "order", {"a": 10**5000}), "more than 4300 digits", "hexadecimal"
    ),
    "a tuple": Misuse(lambda: memory.create_saga(ID, "order", {"a": (1,)}), "context['a'] is (1,)", "use a list"),
    "a set": Misuse(lambda: memory.create_saga(ID, "order", {"a": {1}}), "context['a'] is {1}", "sorted()"),
    "a UUID in it": Misuse(lambda: memory.create_saga(ID, "order", {"a": ID}), "(UUID)", "str() of it"),
    "a time in it": Misuse(lambda: memory.create_saga(ID, "order", {"a": PAST}), "(datetime)", ".isoformat()"),
    "a key that is a number": Misuse(lambda: memory.create_saga(ID, "order", {7: 1}), "the key 7 (int)", "str() of it"),
    "a context in itself": Misuse(lambda: memory.create_saga(ID, "order", itself()), "['me']", "flatten it"),
    "a context that is too big": Misuse(
        lambda: MemorySagaStorage(max_context_bytes=10).create_saga(ID, "order", {"a": "x" * 99}),
        "107 bytes",
        "a greater max_context_bytes",
    ),
    "a bound that is text": Misuse(lambda: storage(engine(), max_context_bytes="1 MB"), "'1 MB'", "int()"),
    "a bound of nothing": Misuse(lambda: MemorySagaStorage(max_context_bytes=0), "not 0", "between 2 and"),
    # statuses, versions and steps
    "a status that is none": Misuse(lambda: memory.update_status(ID, "DONE"), "'DONE'", "use SagaStatus"),
    "a status in lower case": Misuse(lambda: memory.update_status(ID, "running"), "'running'", "RUNNING"),
    "a step's status for a saga": Misuse(lambda: memory.update_status(ID, STARTED), "SagaStepStatus", "use SagaStatus"),
    "a saga's status for a step": Misuse(
        lambda: memory.log_step(ID, "pay", "act", RUNNING), "SagaStatus", "use SagaStepStatus"
    ),
    "no status": Misuse(lambda: memory.update_status(ID, None), "None", "use SagaStatus"),
    "an action that is none": Misuse(lambda: memory.log_step(ID, "pay", "undo", STARTED), "'undo'", "'compensate'"),
    "a version as text": Misuse(lambda: memory.update_status(ID, RUNNING, expected_version="1"), "'1'", "int()"),
    "a version that is a bool": Misuse(
        lambda: memory.update_status(ID, RUNNING, expected_version=True), "True (bool)", "an int"
    ),
    "a dict for a checkpoint": Misuse(lambda: memory.save({"name": "order"}), "{'name': 'order'}", "a Checkpoint"),
    "an empty checkpoint": Misuse(lambda: memory.save(Checkpoint(ID)), "writes nothing", "give it a name, a status"),
    "a new saga's version": Misuse(
        lambda: memory.save(Checkpoint(ID, name="order", expected_version=1)), "expected_version", "leave it out"
    ),
    "one step": Misuse(lambda: memory.save(Checkpoint(ID, steps=STEP)), "LogStep(", "make it a list"),  # type: ignore[arg-type] # a misuse
    "steps that are tuples": Misuse(
        lambda: memory.save(Checkpoint(ID, steps=[("pay", "act")])),  # type: ignore[list-item] # likewise
        "('pay', 'act')",
        "make LogStep(...) of it",
    ),
    "steps that are generated": Misuse(
        lambda: memory.save(Checkpoint(ID, steps=(step for step in [STEP]))),  # type: ignore[arg-type] # likewise
        "generator",
        "make it a list",
    ),
    "attempts below zero": Misuse(lambda: memory.save(Checkpoint(ID, recovery_attempts=-1)), "-1", "between 0 and"),
    # durations and numbers
    "seconds for a duration": Misuse(
        lambda: memory.find_stale_sagas(stale_after=60), "60 (int)", "timedelta(seconds=60)"
    ),
    "a duration below zero": Misuse(
        lambda: memory.find_stale_sagas(stale_after=-HOUR), "timedelta(seconds=-3600)", "isn't negative"
    ),
    "a limit as text": Misuse(lambda: memory.find_stale_sagas(stale_after=HOUR, limit="9"), "'9' (str)", "int()"),
    "a limit below zero": Misuse(lambda: memory.find_stale_sagas(stale_after=HOUR, limit=-1), "-1", "between 0 and"),
    "batches of nothing": Misuse(lambda: memory.iter_step_history(ID, batch_size=0), "not 0", "between 1 and"),
    "seconds to wait": Misuse(lambda: memory.wait_for_saga(ID, 5), "5 (int)", "timedelta(seconds=5)"),
    "waiting in a transaction": Misuse(lambda: joined().wait_for_saga(ID, HOUR), "your transaction", "to the engine"),
    # runs and leases
    "a lease without an owner": Misuse(lambda: memory.run(ID, lease=HOUR), "lease", "give both or none"),
    "an owner without a lease": Misuse(lambda: memory.run(ID, owner="w"), "owner", "give both or none"),
    "a lease in seconds": Misuse(lambda: memory.run(ID, owner="w", lease=30), "lease must be", "timedelta(seconds=30)"),
    "an empty owner": Misuse(
        lambda: memory.claim_sagas(owner="", lease=HOUR, limit=1, stale_after=HOUR), "owner", "1 to 255 characters"
    ),
    "a leased run that isn't entered": Misuse(
        lambda: in_run(owner="w", lease=HOUR), "has to hold its lease", "async with storage.run(...)"
    ),
    "another saga in a run": Misuse(lambda: in_run(OTHER), str(OTHER), "begin a run for that one"),
    "a heartbeat without a lease": Misuse(lambda: memory.run(ID).heartbeat(), "lease", "an owner and a lease"),
    "renewing in a transaction": Misuse(
        lambda: joined().run(ID, owner="w", lease=HOUR, renew=True), "renew", "commits its own calls"
    ),
    "committing into text": Misuse(lambda: commit_into("session"), "'session' (str)", "a MemorySession"),
    "committing into a storage": Misuse(lambda: commit_into(memory), "(MemorySagaStorage)", "a MemorySession"),
    "committing elsewhere": Misuse(
        lambda: commit_into(MemorySession(MemoryDatabase())), "another MemoryDatabase", "on the run's database"
    ),
    # persons
    "nobody gives up": Misuse(lambda: memory.give_up_saga(ID, by="", reason="late"), "by", "1 to 255 characters"),
    "no reason": Misuse(lambda: memory.give_up_saga(ID, by="alice", reason=""), "reason", "must not be empty"),
    "a naive time": Misuse(
        lambda: memory.hold_saga(ID, by="alice", reason="case", until=NAIVE), "datetime.datetime(2030", "datetime.UTC"
    ),
    "a date for a time": Misuse(
        lambda: memory.hold_saga(ID, by="alice", reason="case", until=date(2030, 1, 1)), "date(2030", "with a time zone"
    ),
    "settling as begun": Misuse(
        lambda: memory.settle_step(ID, 1, STARTED, by="alice", reason="r"), "STARTED", "COMPLETED, FAILED or"
    ),
    "settling what isn't in doubt": Misuse(settle_nothing, "any more or at all: 77", "get_in_doubt_steps lists"),
    "an entry as text": Misuse(
        lambda: memory.settle_step(ID, "1", FAILED, by="alice", reason="r"), "'1' (str)", "int()"
    ),
    # views
    "a naive time to look from": Misuse(
        lambda: memory.find_sagas(SagaQuery(created_after=NAIVE)), "created_after", "datetime.UTC"
    ),
    "a naive time of interventions": Misuse(lambda: memory.find_interventions(since=NAIVE), "since", "datetime.UTC"),
    "one status to look for": Misuse(
        lambda: memory.find_sagas(SagaQuery(statuses="RUNNING")),  # type: ignore[arg-type] # a misuse
        "'RUNNING'",
        "put it in a list",
    ),
    "a condition that is none": Misuse(
        lambda: memory.find_sagas(SagaQuery(conditions=("stuck",))),  # type: ignore[arg-type] # likewise
        "'stuck'",
        "exhausted, abandoned, stale",
    ),
    "a dict for a query": Misuse(lambda: memory.find_sagas({"name": "order"}), "{'name': 'order'}", "a SagaQuery"),
    "a page of nobody's": Misuse(lambda: memory.find_sagas(after="page 2"), "'page 2'", "what a page gave"),
    "pages of nothing": Misuse(lambda: memory.find_sagas(limit=0), "not 0", "between 1 and"),
    # policies
    "days of a policy": Misuse(lambda: policy(completed=30), "30 (int)", "timedelta("),
    "a policy below zero": Misuse(lambda: policy(failed=-HOUR), "timedelta(seconds=-3600)", "isn't negative"),
    "names of a policy": Misuse(lambda: policy(names=["order"]), "['order']", "map names of sagas to timedeltas"),
    "days of a name": Misuse(lambda: policy(names={"order": 30}), "names['order']", "timedelta("),
    # binds
    "an engine for memory": Misuse(lambda: MemorySagaStorage(engine()), "AsyncEngine", "a SqlAlchemySagaStorage"),  # type: ignore[arg-type] # a misuse
    "a storage for a database": Misuse(lambda: MemorySession(memory), "MemorySagaStorage", "make one"),
    "a URL": Misuse(lambda: storage(URL), "not str", "create_async_engine()"),
    "SQLAlchemy's URL": Misuse(lambda: storage(sa.make_url(URL)), "not URL", "create_async_engine()"),
    "no bind": Misuse(lambda: storage(None), "not NoneType", "create_async_engine()"),
    "settings": Misuse(lambda: storage({"host": "db"}), "not dict", "create_async_engine()"),
    "a sync engine": Misuse(
        lambda: storage(sa.create_engine("postgresql+psycopg://db")), "not Engine", "create_async_engine()"
    ),
    "a sync session": Misuse(lambda: storage(Session()), "not Session", "use AsyncSession"),
    "a sync sessionmaker": Misuse(lambda: storage(sessionmaker()), "not sessionmaker", "use async_sessionmaker"),
    "a class of sessions": Misuse(lambda: storage(AsyncSession), "not type", "make an object"),
    "a scoped session": Misuse(
        lambda: storage(async_scoped_session(async_sessionmaker(engine()), scopefunc=int)), "async_scoped_s", "call it"
    ),
    "what begins a transaction": Misuse(lambda: storage(engine().begin()), "ContextManager", "with `async with`"),
    "a sessionmaker on nothing": Misuse(
        lambda: storage(async_sessionmaker()).get_saga(ID), "leads nowhere", "async_sessionmaker(engine)"
    ),
    "a connection that isn't open": Misuse(
        lambda: storage(engine().connect()).get_saga(ID), "isn't open", "async with engine.connect()"
    ),
    "one connection for all": Misuse(
        lambda: storage(engine(poolclass=StaticPool)), "StaticPool", "AsyncAdaptedQueuePool"
    ),
    "a server that isn't there": Misuse(
        lambda: storage(engine(), retry_for=NEVER).get_saga(ID), "127.0.0.1", "whether the server is up"
    ),
    "a group that is text": Misuse(lambda: storage(engine(), group_by="tenant"), "'tenant'", "such as tenant.get"),
    "a key that can't be one": Misuse(
        lambda: storage(engine(), group_by=list).create_saga(ID, "order", {}), "'list'", "such as a str"
    ),
    "an empty schema": Misuse(lambda: storage(engine(), schema=""), "not 0", "1 to 63 bytes"),
    "a long schema": Misuse(lambda: storage(engine(), schema="x" * 64), "not 64", "1 to 63 bytes"),
    "seconds to retry": Misuse(lambda: storage(engine(), retry_for=5), "5 (int)", "timedelta(seconds=5)"),
    "a telemetry by name": Misuse(lambda: storage(engine(), telemetry="otel"), "'otel'", "such as OpenTelemetry()"),
    "two event loops": Misuse(in_two_loops, "another event loop", "an engine and a storage for each"),
    # workers
    "a worker on an engine": Misuse(
        lambda: worker(engine(), {"order": handler}), "AsyncEngine", "SqlAlchemySagaStorage of an engine"
    ),
    "a worker in a transaction": Misuse(
        lambda: worker(joined(), {"order": handler}), "storage", "bind it to an engine"
    ),
    "a list of handlers": Misuse(lambda: worker(memory, [handler]), "(list)", "{name: handler}"),
    "no handlers": Misuse(lambda: worker(memory, {}), "must not be empty", "{name: handler}"),
    "a handler that isn't async": Misuse(lambda: worker(memory, {"order": print}), "'order'", "`async def`"),
    "a lease of nothing": Misuse(lambda: worker(memory, {"order": handler}, lease=NEVER), "lease", "some minutes"),
    "polls in seconds": Misuse(
        lambda: worker(memory, {"order": handler}, poll_every=5), "5 (int)", "timedelta(seconds=5)"
    ),
    "nobody works": Misuse(lambda: worker(memory, {"order": handler}, concurrency=0), "not 0", "between 1 and"),
    "a worker that is run twice": Misuse(run_twice, "has run before", "make another RecoveryWorker"),
    "attempts as text": Misuse(lambda: worker(memory, {"order": handler}, max_attempts="5"), "'5'", "int()"),
    # shards, python-cqrs, the schema
    "one shard": Misuse(lambda: ShardedSagaStorage(memory), "MemorySagaStorage", "list all shards"),
    "no shards": Misuse(lambda: ShardedSagaStorage([]), "not 0", "1 to 1,000 storages"),
    "engines for shards": Misuse(lambda: ShardedSagaStorage([engine()]), "AsyncEngine", "make one of it"),  # type: ignore[list-item] # a misuse
    "a shard in a transaction": Misuse(lambda: ShardedSagaStorage([joined()]), "number 0", "run.commit(into=...)"),
    "python-cqrs on an engine": Misuse(
        lambda: CqrsSagaStorage(engine()),  # type: ignore[arg-type] # a misuse
        "AsyncEngine",
        "SqlAlchemySagaStorage(engine)",
    ),
    "an owner for python-cqrs": Misuse(lambda: CqrsSagaStorage(memory, owner="w"), "owner", "give both"),
    "another database": Misuse(lambda: schema.current("mysql://db"), "doesn't begin with", "postgresql://"),
    "an async engine to migrate": Misuse(lambda: schema.upgrade(engine()), "AsyncEngine", "connection.run_sync("),  # type: ignore[arg-type] # a misuse
    "a revision that is none": Misuse(lambda: schema.sql("base", "0009"), "'0009'", "choose among base"),
}


async def _outcome(call: Callable[[], Any]) -> None:
    result = call()
    if isinstance(result, AsyncIterator):
        async for _ in result:
            pass
    elif inspect.isawaitable(result):
        await result


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_misuse_is_named_with_its_remedy(misuse: str) -> None:
    """And no password is in the message."""
    call, named, remedy = MISUSES[misuse]
    with pytest.raises((ValueError, TypeError, SagaStoreError, schema.MigrationError)) as told:
        call() if call is in_two_loops else asyncio.run(_outcome(call))
    message = str(told.value)
    assert named in message
    assert remedy in message
    assert "geheim" not in message


COMMANDS = {
    "a verb that is none": ("upgrad", "'upgrad'", "choose from 'upgrade'"),
    "no database": ("check", "no database given", "set DATABASE_URL"),
    "another kind of database": ("check --url oracle://db", "doesn't begin with", "postgresql://"),
    "a server that isn't there": (
        "check --url postgresql://shop:geheim@127.0.0.1:1/x",
        "127.0.0.1",
        "DATABASE_URL right",
    ),
    "a URL without its option": ("check postgresql://shop:geheim@db/x", "a URL stands where", "behind --url"),
    "a limit in words": ("saga list --limit many", "'many'", "see --help"),
    "a duration in words": ("saga list --silent-for soon", "'soon'", "write it like 90s"),
    "a status that is none": ("saga list --status DONE", "'DONE'", "PENDING, RUNNING"),
    "an intervention without a reason": (f"saga give-up {ID}", "--reason", "required"),
    "grants for nobody": ("grants", "--role", "required"),
    "an empty schema": ("check --url postgresql://127.0.0.1:1/x --schema=", "--schema", "must not be empty"),
}


@pytest.mark.parametrize("misuse", COMMANDS)
def test_a_misuse_of_the_command_is_named_with_its_remedy(
    misuse: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    line, named, remedy = COMMANDS[misuse]
    try:
        code: object = main(line.split())
    except SystemExit as exc:
        code = exc.code
    said = capsys.readouterr().err
    assert code in {1, 2}
    assert named in said
    assert remedy in said
    assert "geheim" not in said


def test_there_are_a_hundred() -> None:
    assert len(MISUSES) + len(COMMANDS) > 100
