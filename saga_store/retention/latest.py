"""Of several records of a saga, the latest: the one of the highest version, and of these the longest history.

A saga has several if it was restored, and archived again. Versions and histories only grow, so that the longest is the
newest. Those of equal length are equal, and of these the one that was written last is what the saga's stub is of.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from types import TracebackType
from typing import Self
from uuid import UUID

from saga_store.retention.errors import on_disk
from saga_store.retention.lines import written
from saga_store.retention_model import SagaMark


class Latest:
    """Which archive has the latest record of each saga; on disk, for there may be a hundred million of them."""

    def __init__(self) -> None:
        import sqlite3  # noqa: PLC0415 - some builds of Python lack it, and nothing else needs it

        # A file without a name, which goes with the connection.
        self._error = sqlite3.Error
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._database.execute(
            "CREATE TABLE latest (id BLOB PRIMARY KEY, version INT, entries INT, last_entry_id INT,"
            " written_at TEXT, archive INT)"
            " WITHOUT ROWID"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def add(self, archive: int, written_at: datetime, marks: Iterable[SagaMark]) -> None:
        """Remember an archive's sagas.

        Raises:
            ArchiveError: The disk is full.
        """
        with on_disk(self._error):
            self._add(archive, written_at, marks)

    def _add(self, archive: int, written_at: datetime, marks: Iterable[SagaMark]) -> None:
        moment = written(written_at)
        self._database.execute("BEGIN")
        self._database.executemany(
            "INSERT INTO latest VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET version = excluded.version,"
            " entries = excluded.entries, last_entry_id = excluded.last_entry_id, written_at = excluded.written_at,"
            " archive = excluded.archive"
            " WHERE (excluded.version, excluded.entries, excluded.last_entry_id, excluded.written_at)"
            " > (version, entries, last_entry_id, written_at)",
            ((mark.id.bytes, mark.version, mark.entries, mark.last_entry_id, moment, archive) for mark in marks),
        )
        self._database.execute("COMMIT")

    def has_latest(self, archive: int, ids: Sequence[UUID]) -> set[UUID]:
        """Return those of the sagas whose latest record this archive has."""
        places = ",".join("?" * len(ids))
        rows = self._database.execute(
            f"SELECT id FROM latest WHERE archive = ? AND id IN ({places})",  # noqa: S608 - of question marks
            [archive, *(saga_id.bytes for saga_id in ids)],
        )
        return {UUID(bytes=saga_id) for (saga_id,) in rows}
