"""Take one step at a time, each in a transaction of its own or in batches, and again if somebody holds a lock."""

from datetime import timedelta

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from saga_store import schema as migrations
from saga_store.adoption.revision import Index, quietly
from saga_store.adoption.steps import Step
from saga_store.migrations import online
from saga_store.schema.session import Patience, holders_of_tables, is_refused_lock
from saga_store.schema.settings import MigrationError, MigrationLockError, Progress, Report
from saga_store.sqlalchemy.failures import reason, sqlstate

# Everybody queues behind whoever waits for a table, so that must not take long. Both tables' waits together stay
# below deadlock_timeout's second: in a deadlock it is always the adoption that gives up, and never another's write.
_EXCLUSIVE_WAIT = "400ms"
# Behind whoever waits for this lock, nobody queues but vacuum and other changes to the table. Autovacuum ends for its
# sake, but not before deadlock_timeout has passed.
_QUIET_WAIT = "5s"

_AGAIN = "What was done so far stays, and keeps nobody from working: run it again"


class Worker:
    """Takes steps on one connection, which holds the migration lock."""

    def __init__(self, connection: Connection, lock_wait: timedelta, report: Report) -> None:
        self._connection = connection
        self._lock_wait = lock_wait
        self._report = report

    def take(self, step: Step) -> None:
        """Take a step, or raise MigrationError: it wasn't taken, or, if it goes in batches, not to its end."""
        patience = Patience(self._connection, self._lock_wait)
        self._report(Progress(step.name))
        while True:
            try:
                self._try(step, patience)
            except DBAPIError as exc:
                if patience.pause_after(exc):
                    continue
                if is_refused_lock(exc):
                    raise self._locked_out(step, patience) from exc
                raise MigrationError(
                    f"{step.name} failed with SQLSTATE {sqlstate(exc)}: {reason(exc)}\n{_AGAIN} when that is mended."
                ) from exc
            break
        self._report(Progress(step.name).ended())

    def _locked_out(self, step: Step, patience: Patience) -> MigrationLockError:
        return MigrationLockError(
            f"{step.name}: couldn't get its locks within {patience.wait.total_seconds():g} s. Sessions that are in the "
            f"way:\n{holders_of_tables(self._connection)}\n{_AGAIN} later, or with a longer --lock-wait."
        )

    def _try(self, step: Step, patience: Patience) -> None:
        if step.index:
            self._index(step.index, patience)
        match step.kind:
            case "transaction":
                self._transaction(step)
            case "fill":
                self._fill(step, patience)
            case "stamp":
                migrations.stamp(self._connection, step.revision, lock_wait=self._lock_wait)
            case "upgrade":
                migrations.upgrade(self._connection, step.revision, lock_wait=self._lock_wait, report=self._report)
            case "downgrade":
                migrations.downgrade(self._connection, step.revision, lock_wait=self._lock_wait)

    def _transaction(self, step: Step) -> None:
        with self._connection.begin():
            self._execute("SET LOCAL statement_timeout = 0")
            self._execute(f"SET LOCAL lock_timeout = '{_QUIET_WAIT}'")
            for table in step.tables:
                self._execute(f"LOCK TABLE {table} IN SHARE UPDATE EXCLUSIVE MODE")
            if step.tables:
                self._execute(f"SET LOCAL lock_timeout = '{_EXCLUSIVE_WAIT}'")
            for table in step.tables:
                self._execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            for statement in step.statements:
                self._execute(statement)

    def _execute(self, statement: str) -> None:
        self._connection.exec_driver_sql(statement)

    def _fill(self, step: Step, patience: Patience) -> None:
        first, following, left = (text(statement) for statement in step.statements)
        progress, after = Progress(step.name), None
        while True:
            with self._connection.begin():
                query = first if after is None else following.bindparams(after=after)
                batch = self._connection.execute(query).first()
                done = batch is None and not self._connection.scalar(left)
            if batch is not None:
                after = batch.last
                progress = progress.advanced(batch.rows)
                self._report(progress)
                patience.renew()
            elif done:
                return
            elif after is not None:
                after = None  # another pass, for what was locked
            elif not patience.pause():
                raise self._locked_out(step, patience)

    def _index(self, index: Index, patience: Patience) -> None:
        with quietly():
            context = MigrationContext.configure(self._connection, opts={"patience": patience})
        with Operations.context(context):
            online.create_index(index.name, index.table, index.definition, unique=index.unique)
