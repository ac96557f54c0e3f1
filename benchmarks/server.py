"""The server of the benchmark: durable, with a database for each row, and counters of its own."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, LiteralString, Self

import psycopg
from psycopg.sql import SQL, Composable, Composed, Identifier, Literal

from saga_store.testing.postgres import embedded

# What must not be off here: it is what is measured.
DURABLE = ("fsync", "full_page_writes", "synchronous_commit")
SHOWN: tuple[LiteralString, ...] = (*DURABLE, "wal_sync_method", "shared_buffers", "autovacuum", "checkpoint_timeout")
# Vacuum and checkpoints would hit whoever has the turn just then: each row is vacuumed after its own instead.
SETTINGS = {"autovacuum": "off", "checkpoint_timeout": "30min", "max_wal_size": "8GB", "log_line_prefix": "%d "}
# Every statement goes into the log, where it is counted.
LOGGING = {"log_statement": "all", "log_parameter_max_length": "0"}
PATIENCE = 30.0


class BenchmarkError(RuntimeError):
    """The benchmark can't measure what it says, or didn't."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What the server counted in one database; BEGIN and COMMIT are statements, too."""

    statements: int = 0
    transactions: int = 0
    wal_bytes: int = 0
    updates: int = 0
    hot_updates: int = 0

    def __sub__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))

    @property
    def hot(self) -> float | None:
        """The share of HOT among the updates of saga_executions."""
        return self.hot_updates / self.updates if self.updates else None


class Server:
    """A running server.

    Attributes:
        version: Its own, such as "18.4".
        settings: Those that bear on the figures.
    """

    def __init__(self, url: str, version: str, log: Path, admin: psycopg.Connection) -> None:
        self.version = version
        self._url = url
        self._log = log
        self._admin = admin
        self._set(SETTINGS)
        self.settings = {name: self._show(name) for name in SHOWN}
        for name in DURABLE:
            if self.settings[name] != "on":
                raise BenchmarkError(f"{name} is {self.settings[name]}, and commits that aren't durable prove nothing")

    def _set(self, settings: dict[str, str]) -> None:
        for name, value in settings.items():
            self._run("ALTER SYSTEM SET {} = {}", Identifier(name), Literal(value))
        self._run("SELECT pg_reload_conf()")
        # It only tells the server to; a session notices when that is done.
        deadline = time.monotonic() + PATIENCE
        while any(self._show(name) != value for name, value in settings.items()):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the server doesn't take its settings: {settings}")
            time.sleep(0.01)

    def _show(self, name: str) -> str:
        return str(self._one(SQL("SHOW {}").format(Identifier(name))))

    def begin_counting(self) -> None:
        """Write no full-page images from now on: how many there are depends on when the last checkpoint was."""
        self._set({"full_page_writes": "off"})

    def checkpoint(self) -> None:
        self._run("CHECKPOINT")

    def create(self, name: str, *, template: str = "template0") -> str:
        """Create a database and return its URL."""
        self._run("CREATE DATABASE {} TEMPLATE {}", Identifier(name), Identifier(template))
        return self.url_of(name)

    def url_of(self, name: str) -> str:
        return f"{self._url.rpartition('/')[0]}/{name}"

    def count(self, name: str, work: Callable[[], None]) -> Counters:
        """Return what the server counts in a database while the work opens connections, uses and closes them.

        Looking adds a little, which is the same each time: take the difference of two counts.
        """
        for setting, value in LOGGING.items():
            self._run("ALTER DATABASE {} SET {} = {}", Identifier(name), Identifier(setting), Literal(value))
        log_before, before = self._log.stat().st_size, self._look(name)
        work()
        after = self._look(name)
        for setting in LOGGING:
            self._run("ALTER DATABASE {} RESET {}", Identifier(name), Identifier(setting))
        return replace(after - before, statements=self._statements_logged(name, log_before))

    def _look(self, name: str) -> Counters:
        # A backend reports what it did when it ends.
        deadline = time.monotonic() + PATIENCE
        clients = SQL("SELECT count(*) FROM pg_stat_activity WHERE datname = {} AND backend_type = 'client backend'")
        while self._one(clients.format(name)):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"somebody is still connected to {name}")
            time.sleep(0.01)
        commits = SQL("SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = {}")
        transactions = self._one(commits.format(name))
        wal_bytes = int(self._one(SQL("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")))
        with psycopg.connect(self.url_of(name), autocommit=True) as connection:
            updates = connection.execute(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'saga_executions'"
            ).fetchone()
        return Counters(0, transactions, wal_bytes, *(updates or (0, 0)))

    def _statements_logged(self, name: str, since: int) -> int:
        begins = (f"{name} LOG:  statement: ".encode(), f"{name} LOG:  execute ".encode())
        with self._log.open("rb") as log:
            log.seek(since)
            return sum(line.startswith(begins) for line in log)

    def _run(self, statement: LiteralString, *words: Composable) -> None:
        self._admin.execute(SQL(statement).format(*words))

    def _one(self, query: SQL | Composed) -> Any:  # noqa: ANN401 - a value of any type
        row = self._admin.execute(query).fetchone()
        return row[0] if row else None


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Run a server with its data below this folder, on the disk that is to be measured; it is removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="server-", dir=folder) as data:
        Path(data).chmod(0o711)  # when root runs this, another user runs the server
        with (
            embedded(data=Path(data), durable=True) as running,
            psycopg.connect(running.url, autocommit=True) as admin,
        ):
            yield Server(running.url, running.version, Path(data) / "log", admin)
