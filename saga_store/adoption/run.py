"""Carry a plan out: one adopter at a time, each step in its own transaction or batches, and again if a lock is held."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from saga_store import schema as migrations
from saga_store.adoption.errors import AdoptionError
from saga_store.adoption.forms import EXECUTIONS
from saga_store.adoption.plan import FORGET, REWRITE_BELOW, Found, Goal, Plan, make_plan
from saga_store.adoption.revision import REVISION
from saga_store.adoption.shape import Shape, read
from saga_store.adoption.steps import Step
from saga_store.schema.connections import Bind, connected
from saga_store.schema.errors import MigrationError, MigrationLockError
from saga_store.schema.patience import Patience, is_refused_lock
from saga_store.schema.pooler import refuse_shared_sessions
from saga_store.schema.scripts import recorded_revision
from saga_store.schema.session import migration, target_schema
from saga_store.schema.sessions import holders_of_tables
from saga_store.schema.settings import LOCK_WAIT, Settings
from saga_store.sqlalchemy.failures import reason, sqlstate

_log = logging.getLogger(__name__)

Report = Callable[[Step], None]

# Everybody queues behind whoever waits for a table, so that must not take long. Both tables' waits together stay
# below deadlock_timeout's second: in a deadlock it is always the adoption that gives up, and never another's write.
_EXCLUSIVE_WAIT = "400ms"
_LEASES = text("SELECT count(*) FROM saga_executions WHERE lease_expires_at > statement_timestamp()")


def plan(
    bind: Bind, goal: Goal = "adopt", *, schema: str | None = None, rewrite_below: int = REWRITE_BELOW
) -> Plan:
    """Look at the tables, and say what ``adopt``, ``undo`` or ``finish`` would do; changes and locks nothing.

    Args:
        bind: The database: a URL, an engine, or a connection that isn't in a transaction.
        goal: What would be done.
        schema: Where the tables are; None for the first schema of the session's search_path that exists.
        rewrite_below: With fewer rows in both tables together, they would be rewritten in one transaction.

    Raises:
        MigrationError: The database can't be reached.
    """

    def look(connection: Connection) -> Plan:
        with target_schema(connection, Settings(schema)):
            return _plan(connection, goal, rewrite_below)

    return connected(bind, look)


def adopt(
    bind: Bind,
    *,
    schema: str | None = None,
    rewrite_below: int = REWRITE_BELOW,
    lock_wait: timedelta = LOCK_WAIT,
    report: Report | None = None,
) -> list[Step]:
    """Make python-cqrs's tables into saga-store's, and upgrade them to this release; return the steps that were taken.

    Every row keeps its values; python-cqrs's processes may go on, and go on working, until ``finish``. If it fails or
    is killed, what was done stays, old processes go on working, and running it again does the rest. Adopted tables
    are left as they are.

    Args:
        bind: The database: a URL, an engine, or a connection that isn't in a transaction.
        schema: Where the tables are; None for the first schema of the session's search_path that exists.
        rewrite_below: With fewer rows in both tables together, they are rewritten in one transaction, during which
            nobody else can read or write them. With more, rows are converted beside the writers, in batches.
        lock_wait: How long to wait for another migration to end, and in each step for the tables.
        report: Called with each step before it is taken.

    Raises:
        AdoptionError: The tables differ from all that python-cqrs 4 and 5 make; nothing was done.
        MigrationLockError: A lock wasn't to be had in time; the message names who holds it.
        MigrationError: The database can't be reached, or a step failed.
    """
    return _carry_out(bind, "adopt", schema, rewrite_below, lock_wait, report)


def undo(
    bind: Bind,
    *,
    schema: str | None = None,
    rewrite_below: int = REWRITE_BELOW,
    lock_wait: timedelta = LOCK_WAIT,
    report: Report | None = None,
) -> list[Step]:
    """Give python-cqrs its tables back, with all that was written since; return the steps that were taken.

    From any point of an adoption, and after it until ``finish``. Leases and what later revisions added are lost.
    Arguments, guarantees and errors are those of ``adopt``; while sagas are leased, it raises AdoptionError.
    """
    return _carry_out(bind, "undo", schema, rewrite_below, lock_wait, report)


def finish(
    bind: Bind, *, schema: str | None = None, lock_wait: timedelta = LOCK_WAIT, report: Report | None = None
) -> list[Step]:
    """Drop python-cqrs's types and the casts from them; return the steps that were taken.

    From then on python-cqrs's own storage doesn't work on the tables, and there is no way back. Arguments and errors
    are those of ``adopt``.
    """
    return _carry_out(bind, "finish", schema, REWRITE_BELOW, lock_wait, report)


def _carry_out(
    bind: Bind, goal: Goal, schema: str | None, rewrite_below: int, lock_wait: timedelta, report: Report | None
) -> list[Step]:
    settings = Settings(schema, lock_wait=lock_wait)
    taken: list[Step] = []

    def work(connection: Connection) -> None:
        refuse_shared_sessions(connection)
        with target_schema(connection, settings) as name, migration(connection, settings, name):
            adopter = _Adopter(connection, name, lock_wait)
            while found := _accepted(_plan(connection, goal, rewrite_below)).steps:
                if found[0] in taken:
                    raise MigrationError(f"{found[0].name}: it was done, and yet is still to be done")
                for step in found:
                    if report:
                        report(step)
                    adopter.take(step)
                    taken.append(step)
                    if step.name == FORGET:
                        break  # only now the tables can be compared with those that are known

    connected(bind, work)
    return taken


def _accepted(plan: Plan) -> Plan:
    if plan.refusals:
        raise AdoptionError(f"can't {plan.goal} the tables in schema {plan.schema}; nothing was done:", plan.refusals)
    return plan


def _plan(connection: Connection, goal: Goal, rewrite_below: int) -> Plan:
    revision = recorded_revision(connection)
    with connection.begin():
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        shape = read(connection)
        found = Found(shape, revision, _leases(connection, shape), tuple(each.revision for each in migrations.history()))
    return make_plan(goal, found, rewrite_below=rewrite_below)


def _leases(connection: Connection, shape: Shape) -> int:
    executions = shape.tables.get(EXECUTIONS)
    if executions is None or "lease_expires_at" not in executions.columns:
        return 0
    return connection.scalar(_LEASES) or 0


class _Adopter:
    """Takes steps on one connection, which holds the migration lock."""

    def __init__(self, connection: Connection, schema: str, lock_wait: timedelta) -> None:
        self._connection = connection
        self._schema = schema
        self._lock_wait = lock_wait

    def take(self, step: Step) -> None:
        patience = Patience(self._connection, self._lock_wait)
        while True:
            try:
                self._try(step, patience)
            except DBAPIError as exc:
                if patience.pause_after(exc):
                    continue
                if is_refused_lock(exc):
                    raise MigrationLockError(
                        f"{step.name}: couldn't get its locks within {patience.wait.total_seconds():g} s. Sessions that "
                        f"are in the way:\n{holders_of_tables(self._connection)}\n"
                        "What was done so far stays, and harms nobody: run it again later, or with a longer --lock-wait."
                    ) from exc
                raise MigrationError(
                    f"{step.name} failed with SQLSTATE {sqlstate(exc)}: {reason(exc)}\n"
                    "What was done so far stays, and harms nobody: remove the cause, and run it again."
                ) from exc
            return

    def _try(self, step: Step, patience: Patience) -> None:
        match step.kind:
            case "transaction":
                self._transaction(step)
            case "fill":
                self._fill(step, patience)
            case "index":
                self._index(step)
            case "stamp":
                migrations.stamp(self._connection, REVISION, lock_wait=self._lock_wait)
            case "upgrade":
                migrations.upgrade(self._connection, lock_wait=self._lock_wait)
            case "downgrade":
                migrations.downgrade(self._connection, REVISION, lock_wait=self._lock_wait)

    def _transaction(self, step: Step) -> None:
        with self._connection.begin():
            self._execute("SET LOCAL statement_timeout = 0")
            # First a lock that keeps nobody waiting: autovacuum ends for its sake, but only after a second.
            for table in step.tables:
                self._execute("SET LOCAL lock_timeout = '5s'")
                self._execute(f"LOCK TABLE {table} IN SHARE UPDATE EXCLUSIVE MODE")
            for table in step.tables:
                self._execute(f"SET LOCAL lock_timeout = '{_EXCLUSIVE_WAIT}'")
                self._execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            for statement in step.statements:
                self._execute(statement)

    def _fill(self, step: Step, patience: Patience) -> None:
        first, following, left = (text(statement) for statement in step.statements)
        after, rows = None, 0
        while True:
            with self._connection.begin():
                batch = self._connection.execute(following, {"after": after}) if after else self._connection.execute(first)
                found = batch.first()
                unfilled = found is None and self._connection.scalar(left)
            if found is not None:
                after, rows = found.last, rows + found.rows
                patience.renew()
            elif not unfilled:
                return
            elif not patience.pause():
                raise MigrationLockError(...)
            else:
                after = None

    def _index(self, step: Step) -> None:
        """Build it; what a build that was interrupted left behind is dropped first."""
        self._connection.execution_options(isolation_level="AUTOCOMMIT")
        name = step.name.split()[-1]
        self._execute("SET lock_timeout = 0"); self._execute("SET statement_timeout = 0")
        self._execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
        self._execute(step.statements[0])
        self._connection.commit()
        self._connection.execution_options(isolation_level=self._connection.default_isolation_level)

    def _execute(self, statement: str) -> None:
        self._connection.exec_driver_sql(statement)
