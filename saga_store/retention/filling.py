"""An archive's object filled from one snapshot of the database, in bounded memory."""

from collections.abc import Callable, Sequence
from uuid import UUID

from saga_store.errors import SagaUnreadableError
from saga_store.retention.files import ArchiveFile, Part
from saga_store.retention.threads import Begun, in_thread
from saga_store.retention_model import ExpiredPage, ExpiredSaga, Retention, RetentionSnapshot, SagaReading

_PAGE = 1000
# Of an object, before it is compressed: one of big sagas has fewer of them.
_MOST_BYTES = 256 * 2**20
# What is gathered before a thread writes it. A saga that takes more goes by itself, piece by piece.
_GATHERED = 2 * 2**20
_BYTES_PER_ENTRY = 200


class Filling:
    """Reads what a policy lets go, in the order of its walk, and writes it to an object.

    Args:
        snapshot: The moment that is read.
        policy: How long sagas are kept.
        file: The object.
        most: How many sagas it may have.
        is_interrupted: Told how many it has, between pages; whether to end it there.
        unreadable: Gets the sagas that can't be read; they are left out.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - where from, where to, and how far
        self,
        snapshot: RetentionSnapshot,
        policy: Retention,
        file: ArchiveFile,
        most: int,
        is_interrupted: Callable[[int], bool],
        unreadable: list[UUID],
    ) -> None:
        self._snapshot = snapshot
        self._policy = policy
        self._file = file
        self._most = most
        self._is_interrupted = is_interrupted
        self._bytes = 0
        self._gathered: list[Part] = []
        self._gathered_bytes = 0
        self._writing: Begun | None = None
        self._unreadable = unreadable

    async def fill(self, after: str | None) -> str | None:
        """Begin after that cursor, and return the one that it ended at; None at the end of the walk."""
        sagas = 0
        try:
            while True:
                page = await self._next_page(after, self._most - sagas)
                self._unreadable += page.unreadable
                await self._read(page.sagas)
                sagas += len(page.sagas)
                after = page.after
                if after is None or sagas >= self._most or self._bytes >= _MOST_BYTES or self._is_interrupted(sagas):
                    break
            await self._write()
            await self._written()
        finally:
            if self._writing is not None:
                self._writing.cancel()  # what becomes of it now is nobody's
        return after

    async def _next_page(self, after: str | None, most: int) -> ExpiredPage:
        """Return the next sagas that fit; one at least, however big."""
        page = await self._snapshot.find_expired(self._policy, after=after, limit=min(_PAGE, most))
        size = self._bytes
        for fits, saga in enumerate(page.sagas):
            size += _size(saga)
            if fits and size > _MOST_BYTES:
                return await self._snapshot.find_expired(self._policy, after=after, limit=fits)
        return page

    async def _read(self, sagas: Sequence[ExpiredSaga]) -> None:
        sizes = {saga.mark.id: _size(saga) for saga in sagas}
        async for reading in self._snapshot.read(sagas):
            size = sizes.pop(reading.head.mark.id)
            self._bytes += size
            if size > _GATHERED:
                await self._stream(reading)
            else:
                await self._gather(reading, size)
        self._unreadable += sizes  # those that didn't come

    async def _gather(self, reading: SagaReading, size: int) -> None:
        try:
            context = [piece async for piece in reading.context()]
            entries = [page async for page in reading.entries()]
        except SagaUnreadableError:
            self._unreadable.append(reading.head.mark.id)
            return
        self._gathered += [reading.head, *context, *entries, None]
        self._gathered_bytes += size
        if self._gathered_bytes >= _GATHERED:
            await self._write()

    async def _stream(self, reading: SagaReading) -> None:
        """Write a big one as it is read; if it can't be read to its end, it hasn't been there."""
        await self._write()
        await self._written()
        position = await in_thread("archive", self._file.begin_frame)
        try:
            await self._put([reading.head])
            async for piece in reading.context():
                await self._put([piece])
            async for entries in reading.entries():
                await self._put([entries])
            await self._put([None])
        except SagaUnreadableError:
            self._unreadable.append(reading.head.mark.id)
            self._file.take_back(position)
        else:
            await in_thread("archive", self._file.begin_frame)

    async def _put(self, parts: list[Part]) -> None:
        await in_thread("archive", lambda: self._file.write(parts))

    async def _write(self) -> None:
        """Have a thread write what is gathered, while more is read; it writes one thing at a time."""
        await self._written()
        parts, self._gathered, self._gathered_bytes = self._gathered, [], 0
        if parts:
            self._writing = in_thread("archive", lambda: self._file.write(parts))

    async def _written(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing


def _size(saga: ExpiredSaga) -> int:
    return saga.bytes + _BYTES_PER_ENTRY * saga.mark.entries
