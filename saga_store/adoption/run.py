"""Look, plan, and carry a plan out: one adopter at a time."""

from datetime import timedelta

from sqlalchemy import Connection, text

from saga_store import schema as migrations
from saga_store.adoption.errors import AdoptionError
from saga_store.adoption.forms import EXECUTIONS
from saga_store.adoption.plan import FORGET, REWRITE_BELOW, Found, Goal, Plan, make_plan
from saga_store.adoption.shape import Shape, read
from saga_store.adoption.steps import Step
from saga_store.adoption.worker import Worker
from saga_store.schema.connections import Bind, connected
from saga_store.schema.pooler import refuse_shared_sessions
from saga_store.schema.scripts import recorded_revision
from saga_store.schema.session import enter_schema, migration, require_schema, target_schema, warn_of_elsewhere
from saga_store.schema.settings import LOCK_WAIT, LogReport, MigrationError, Report, Settings

_LEASES = text("SELECT count(*) FROM saga_executions WHERE lease_expires_at > statement_timestamp()")
_STUBS = text("SELECT EXISTS (SELECT FROM saga_executions WHERE archived_at IS NOT NULL)")


def plan(bind: Bind, goal: Goal = "adopt", *, schema: str | None = None, rewrite_below: int = REWRITE_BELOW) -> Plan:
    """Look at the tables, and say what ``adopt``, ``undo`` or ``finish`` would do; changes and locks nothing.

    Args:
        bind: The database: a URL, an engine, or a connection that isn't in a transaction.
        goal: What would be done.
        schema: Where the tables are; None for the first schema of the session's search_path that exists.
        rewrite_below: With fewer rows in both tables together, they would be rewritten in one transaction.

    Raises:
        MigrationError: The database can't be reached.
    """
    return connected(bind, lambda connection: _plan(connection, goal, rewrite_below, schema))


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
        report: Called with the progress of each step, at its beginning, at its end, and at each batch of rows; without
            it, long work is logged now and then.

    Raises:
        AdoptionError: The tables differ from all that python-cqrs 4 and 5 make; nothing was done.
        MigrationLockError: A lock wasn't to be had in time; the message names who holds it.
        MigrationError: The database can't be reached, or a step failed.
    """
    return _carry_out(bind, "adopt", Settings(schema, lock_wait=lock_wait), rewrite_below, report)


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
    return _carry_out(bind, "undo", Settings(schema, lock_wait=lock_wait), rewrite_below, report)


def finish(
    bind: Bind, *, schema: str | None = None, lock_wait: timedelta = LOCK_WAIT, report: Report | None = None
) -> list[Step]:
    """Drop python-cqrs's types and the casts from them; return the steps that were taken.

    From then on python-cqrs's own storage doesn't work on the tables, and there is no way back. Arguments and errors
    are those of ``adopt``.
    """
    return _carry_out(bind, "finish", Settings(schema, lock_wait=lock_wait), REWRITE_BELOW, report)


def _carry_out(bind: Bind, goal: Goal, settings: Settings, rewrite_below: int, report: Report | None) -> list[Step]:
    taken: list[Step] = []

    def work(connection: Connection) -> None:
        refuse_shared_sessions(connection)
        with target_schema(connection, settings) as name, migration(connection, settings, name):
            worker = Worker(connection, settings.lock_wait, report or LogReport())
            while found := _accepted(_plan(connection, goal, rewrite_below, name)).steps:
                if found[0] in taken:
                    raise MigrationError(f"{found[0].name}: it was done, and yet is still to be done")
                for step in found:
                    worker.take(step)
                    taken.append(step)
                    if step.name == FORGET:
                        break  # only now can the tables be compared with those that are known

    connected(bind, work)
    return taken


def _accepted(plan: Plan) -> Plan:
    if plan.refusals:
        raise AdoptionError(f"can't {plan.goal} the tables in schema {plan.schema}; nothing was done:", plan.refusals)
    return plan


def _plan(connection: Connection, goal: Goal, rewrite_below: int, schema: str | None) -> Plan:
    """Look, in one transaction that changes nothing, and that may go through any pooler."""
    history = tuple(each.revision for each in migrations.history())
    with connection.begin():
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        if schema is not None:
            require_schema(connection, schema)
        enter_schema(connection, schema)
        shape, revision = read(connection), recorded_revision(connection)
        stubs = goal == "undo" and _has_stubs(connection, shape)
        found = Found(shape, revision, _leases(connection, shape), stubs, history)
        if not shape.tables:
            warn_of_elsewhere(connection, str(shape.schema))
    return make_plan(goal, found, rewrite_below=rewrite_below)


def _leases(connection: Connection, shape: Shape) -> int:
    executions = shape.tables.get(EXECUTIONS)
    if executions is None or "lease_expires_at" not in executions.all("column"):
        return 0
    return connection.scalar(_LEASES) or 0


def _has_stubs(connection: Connection, shape: Shape) -> bool:
    executions = shape.tables.get(EXECUTIONS)
    if executions is None or "archived_at" not in executions.all("column"):
        return False
    return bool(connection.scalar(_STUBS))
