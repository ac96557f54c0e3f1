"""A saga that was archived, as a view shows it: its record, read from the archive within limits, or why it isn't."""

import asyncio
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

from saga_store.errors import InvalidSagaDataError, SagaUnreadableError
from saga_store.inspection import (
    CONTEXT_SHOWN,
    HISTORY_SEEN,
    ContextPeek,
    RecentHistory,
    SagaSummary,
    cut,
    digest,
)
from saga_store.interface import IRetentionStorage
from saga_store.retention.errors import ArchiveError, TargetError
from saga_store.retention.files import Found
from saga_store.retention.manifest import manifest_path
from saga_store.retention.reading import Place, located, manifest_of, pick_here
from saga_store.retention.target import Call, Target
from saga_store.retention.threads import in_thread
from saga_store.retention_model import SagaArchive
from saga_store.validation import decode_context

Places: TypeAlias = bool | Place | Iterable[Place]
"""Where archives may be read: True: wherever the ledger says; targets or their URIs: only in these; False: nowhere."""

# Of a page. Whoever parses more keeps the interpreter's lock for so long that others notice.
_SECONDS, _MOST_BYTES = 10.0, 8 * 2**20
# Reading at a time, those that nobody waits for any more counted, too: a target that hangs takes no more threads.
_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class ArchivedSaga:
    """What there is to show of a saga that was let go.

    Attributes:
        saga: Its summary; with its record as if it were here, without only what its stub tells.
        archive: The URI of its archive, if the ledger knows of one.
        found: Its record, and where that was read; None if it wasn't.
        problem: Why it wasn't, in a clause; None if it was.
    """

    saga: SagaSummary
    archive: str | None
    found: Found | None
    problem: str | None = None

    @property
    def history(self) -> RecentHistory:
        """The end of its history, as ``get_recent_history`` gives it."""
        entries = self.found.record.entries if self.found else ()
        return RecentHistory([cut(entry) for entry in entries[-HISTORY_SEEN:]], max(len(entries) - HISTORY_SEEN, 0))

    def peek(self, most: int = CONTEXT_SHOWN) -> ContextPeek | None:
        """Return its context, as ``peek_context`` does; None without a record.

        Raises:
            SagaUnreadableError: It is none.
        """
        if self.found is None:
            return None
        text = self.found.record.context
        size = len(text.encode())
        return ContextPeek(size, self.context() if size <= most else None)

    def context(self) -> dict[str, Any] | None:
        """Return its context, however big it is; None without a record.

        Raises:
            SagaUnreadableError: It is none.
        """
        try:
            return decode_context(self.found.record.context) if self.found else None
        except (ValueError, RecursionError) as exc:
            raise SagaUnreadableError(self.saga.id, f"its context: {exc}") from exc


class ArchiveReader:
    """Reads single sagas out of archives for views: in threads, a few at a time, for so long and no bigger ones.

    Args:
        storage: Whose ledger says where a saga is.
        places: Where archives may be read.
        seconds: How long one may take; None: as long as it likes.
        most_bytes: How long a saga's line may be, and how big a manifest.

    Raises:
        InvalidSagaDataError: These are no places.
    """

    def __init__(
        self,
        storage: object,
        places: Places = True,  # noqa: FBT002 - one of what it may be
        *,
        seconds: float | None = _SECONDS,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self._storage = storage
        self._places = _checked(places)
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._slots = threading.BoundedSemaphore(_AT_ONCE)

    async def read(self, saga: SagaSummary, now: datetime) -> ArchivedSaga:
        """Return what there is to show; whatever is wrong with its archive is the ``problem``.

        Args:
            saga: A saga with ``archived_at``.
            now: When that was so, by the database's clock.
        """
        if not isinstance(self._storage, IRetentionStorage):
            return ArchivedSaga(saga, None, None, "this storage has no ledger of archives")
        stub = await self._storage.find_stub(saga.id)
        row = stub.archive if stub else None
        if stub is None:
            problem = "it was restored or forgotten just now; look again"
        elif row is None:
            problem = "the ledger doesn't know of its archive"
        elif row.uri is None:
            problem = f"it was removed without an archive, by {row.by}"
        elif self._places == ():
            problem = "archives aren't read here"
        else:
            try:
                found = await self._read(row, row.uri, saga.id)
            except ArchiveError as exc:
                problem = str(exc)
            else:
                return ArchivedSaga(_with_history(saga, found, now), row.uri, found)
        return ArchivedSaga(saga, row.uri if row else None, None, problem)

    async def _read(self, row: SagaArchive, uri: str, saga_id: UUID) -> Found:
        if not self._slots.acquire(blocking=False):
            raise TargetError(uri, f"isn't read now, for {_AT_ONCE} others are; look again")
        call = Call()

        def read() -> Found:
            try:
                return self._read_here(row, uri, saga_id, call)
            finally:
                self._slots.release()

        try:
            async with asyncio.timeout(self._seconds):
                return await in_thread("show a saga", read)
        except TimeoutError:
            raise TargetError(uri, f"couldn't be read within {self._seconds:g} s") from None
        finally:
            call.is_abandoned = True

    def _read_here(self, row: SagaArchive, uri: str, saga_id: UUID, call: Call) -> Found:
        target, path = self._located(uri)

        def read() -> Found:
            name = manifest_path(path)
            manifest = manifest_of(target.read_here(name, call, most=self._most_bytes), target, name, row)
            call.gets_on()
            return pick_here(target, manifest, saga_id, call, most_bytes=self._most_bytes)

        return target.translated(f"reading {path}", read)

    def _located(self, uri: str) -> tuple[Target, str]:
        if self._places is None:
            return located(uri)
        for place in self._places:
            target = Target.of(place)
            path = target.path(uri)
            if path is not None:
                return target, path
        raise TargetError(uri, "isn't where archives are read here")


def _with_history(saga: SagaSummary, found: Found, now: datetime) -> SagaSummary:
    seen = digest(found.record.entries)
    return replace(
        saga,
        in_doubt=seen.in_doubt > 0,
        silent_for=max(now - seen.silent_since(saga.created_at, saga.updated_at), timedelta()),
        last_entry=seen.last,
        last_error=seen.error,
    )


def _checked(places: object) -> tuple[Place, ...] | None:
    """Return the places; None if it is anywhere."""
    if isinstance(places, bool):
        return None if places else ()
    given = [places] if isinstance(places, str | Target) else list(places) if isinstance(places, Iterable) else [None]
    if not all(isinstance(place, str | Target) for place in given):
        raise InvalidSagaDataError("archives", "must be True, False, or targets or their URIs")
    return tuple(given)
