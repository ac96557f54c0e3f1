"""An archive's object: sagas written to a file of one's own, and read back from wherever it is kept."""

import gzip
import hashlib
import io
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeAlias, cast
from uuid import UUID

from saga_store.model import SagaLogEntry
from saga_store.retention import lines
from saga_store.retention.errors import ArchiveDamagedError, ArchiveError, on_disk
from saga_store.retention.manifest import Line, Manifest, compression_of
from saga_store.retention_model import SagaHead, SagaRecord

Part: TypeAlias = SagaHead | str | Sequence[SagaLogEntry] | None
"""Of a saga that is written: its head, pieces of its context, batches of its entries; None ends it."""

_IN_MEMORY = 16 * 2**20
_COPIED = 2**20
# Beyond it no tool would read a line, and this one wouldn't have the memory.
LONGEST_LINE = 2**31


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def default_compression() -> str:
    """Return ``zstd`` if zstandard is installed, or else ``gzip``."""
    try:
        import zstandard  # noqa: F401, PLC0415 - of an extra
    except ImportError:
        return "gzip"
    return "zstd"


class ArchiveFile:
    """An object that is being written here, in memory or beside it, before it travels.

    So neither does a slow target keep the database's snapshot open, nor does a saga that can't be read to its end
    spoil the others.
    """

    def __init__(self, compression: str) -> None:
        self._compression = compression
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by close()
        self._compressor = _new_compressor(compression)
        self._head: SagaHead | None = None
        self._hash = hashlib.sha256()
        self._entries = self._last_entry_id = 0
        self._in_history = False
        self.lines: list[Line] = []

    @on_disk()
    def write(self, parts: Sequence[Part]) -> None:
        for part in parts:
            match part:
                case SagaHead():
                    self._head, self._hash, self._in_history = part, hashlib.sha256(), False
                    self._entries = self._last_entry_id = 0
                    self._put(lines.encode_head(part))
                case str():
                    self._put(lines.encode_context(part))
                case None:
                    self._end()
                case _:
                    self._put_entries(part)

    @on_disk()
    def begin_frame(self) -> int:
        """Begin what can be taken back, and return from where."""
        self._file.write(self._compressor.flush())
        self._compressor = _new_compressor(self._compression)
        return self._file.tell()

    @on_disk()
    def take_back(self, position: int) -> None:
        """Drop what was written of a saga since ``begin_frame``."""
        self._compressor = _new_compressor(self._compression)
        self._file.seek(position)
        self._file.truncate()

    @on_disk()
    def finish(self) -> tuple[str, int]:
        """Return the SHA-256 and the size of the whole."""
        self._file.write(self._compressor.flush())
        size = self._file.tell()
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest(), size

    def pieces(self) -> Iterator[bytes]:
        self._file.seek(0)
        while piece := self._file.read(_COPIED):
            yield piece

    def close(self) -> None:
        self._file.close()

    def _put_entries(self, entries: Sequence[SagaLogEntry]) -> None:
        if not entries:
            return
        self._put((lines.BETWEEN if self._in_history else lines.TO_HISTORY) + lines.encode_entries(entries))
        self._in_history = True
        self._entries += len(entries)
        self._last_entry_id = entries[-1].id

    def _end(self) -> None:
        assert self._head is not None  # noqa: S101 - a head comes first
        mark = self._head.mark
        # The database has counted, too, in a statement of its own.
        if (self._entries, self._last_entry_id) != (mark.entries, mark.last_entry_id):
            raise ArchiveError(
                f"saga {mark.id} has {mark.entries} entries up to {mark.last_entry_id}, and {self._entries} up to "
                f"{self._last_entry_id} were read: nothing is removed"
            )
        if not self._in_history:
            self._put(lines.TO_HISTORY)
        self._put(lines.END[:-1])
        self.lines.append(Line(mark, self._hash.hexdigest()))
        self._file.write(self._compressor.compress(b"\n"))

    def _put(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(self._compressor.compress(data))


@dataclass(frozen=True, slots=True)
class Found:
    """A saga in an archive, and where."""

    record: SagaRecord
    archive_id: UUID
    file: str
    line: int


def read_object(file: BinaryIO | io.BufferedIOBase, manifest: Manifest, uri: str) -> Iterator[Found]:
    """Yield the sagas of an object; all of it is as the manifest says once the iteration has ended.

    Raises:
        ArchiveDamagedError: It isn't; says which line.
    """
    raw = _Hashing(file)
    with _decompressing(raw, manifest, uri) as stream:
        # Nothing here keeps a saga, or its line, while the next one is read.
        yield from iter(lambda: _next(stream, raw, manifest, uri), None)
    if raw.lines != len(manifest.lines):
        raise _too_short(raw, manifest, uri)
    raw.check(manifest, uri, lambda: None)


def read_one(  # noqa: PLR0913 - which of them, and within which limits
    file: BinaryIO | io.BufferedIOBase,
    manifest: Manifest,
    saga_id: UUID,
    uri: str,
    gets_on: Callable[[], None],
    *,
    most_bytes: int = LONGEST_LINE,
) -> Found:
    """Return one saga of an object, without parsing the others; all of the object is what was written.

    Args:
        file: The object.
        manifest: What it holds.
        saga_id: The saga.
        uri: How to call the object in errors.
        gets_on: Called between pieces; what it raises ends the reading.
        most_bytes: How long the saga's line may be; of the others no more than a piece is in memory.

    Raises:
        ArchiveDamagedError: It isn't; says which line.
        ArchiveError: The line is longer.
    """
    number = next((number for number, line in enumerate(manifest.lines, 1) if line.mark.id == saga_id), None)
    if number is None:
        raise ArchiveDamagedError(uri, None, f"has no saga {saga_id}")
    raw = _Hashing(file)
    with _decompressing(raw, manifest, uri) as stream:
        while raw.lines < number - 1 and (piece := stream.readline(_COPIED)):
            raw.lines += piece.endswith(b"\n")
            gets_on()
        line = stream.readline(most_bytes + 1)
    if len(line) > most_bytes:
        raise ArchiveError(
            f"its record has more than the {most_bytes:,} bytes that are read here ({uri}, line {number})"
        )
    if not line:
        raise _too_short(raw, manifest, uri)
    record = _read_line(line, number, manifest, uri)
    raw.check(manifest, uri, gets_on)
    return Found(record, manifest.id, uri, number)


@contextmanager
def _decompressing(raw: "_Hashing", manifest: Manifest, uri: str) -> Iterator[io.BufferedIOBase]:
    """Give what is read without its compression, and translate what goes wrong with that."""
    try:
        yield _decompressed(raw, compression_of(manifest.path))
    except ArchiveError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, _zstd_error()) as exc:
        if isinstance(exc, OSError) and not isinstance(exc, gzip.BadGzipFile):
            raise  # the target's
        raise ArchiveDamagedError(uri, raw.lines + 1, f"can't be decompressed: {exc}") from exc


def _too_short(raw: "_Hashing", manifest: Manifest, uri: str) -> ArchiveDamagedError:
    return ArchiveDamagedError(uri, raw.lines + 1, f"is missing: the object ends before it, of {len(manifest.lines)}")


def _next(stream: io.BufferedIOBase, raw: "_Hashing", manifest: Manifest, uri: str) -> Found | None:
    line = stream.readline(LONGEST_LINE)
    if not line:
        return None
    raw.lines += 1
    return Found(_read_line(line, raw.lines, manifest, uri), manifest.id, uri, raw.lines)


def _read_line(line: bytes, number: int, manifest: Manifest, uri: str) -> SagaRecord:
    if not line.endswith(b"\n"):
        raise ArchiveDamagedError(uri, number, "is cut off")
    if number > len(manifest.lines):
        raise ArchiveDamagedError(uri, number, "is one too many for its manifest")
    expected = manifest.lines[number - 1]
    if hashlib.sha256(memoryview(line)[:-1]).hexdigest() != expected.sha256:
        raise ArchiveDamagedError(uri, number, "isn't what was written: its SHA-256 differs from the manifest's")
    try:
        record = lines.decode(line)
    except ValueError as exc:
        raise ArchiveDamagedError(uri, number, str(exc)) from exc
    if record.mark != expected.mark:
        raise ArchiveDamagedError(uri, number, f"is {record.mark}, and the manifest has {expected.mark}")
    return record


class _Hashing(io.RawIOBase):
    """Reads from a file, and sums up what was read; ``lines`` counts those that have been read whole."""

    def __init__(self, file: BinaryIO | io.BufferedIOBase) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0
        self.lines = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - whatever has bytes to write to
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._digest.update(data)
        self._size += len(data)
        return len(data)

    def check(self, manifest: Manifest, uri: str, gets_on: Callable[[], None]) -> None:
        """Read what is left, and see that all of it is what the manifest says."""
        while self.read(_COPIED):
            gets_on()
        if (self._digest.hexdigest(), self._size) != (manifest.sha256, manifest.bytes):
            raise ArchiveDamagedError(uri, None, f"isn't what was written: its SHA-256 isn't {manifest.sha256}")


def _new_compressor(compression: str) -> _Compressor:
    if compression == "gzip":
        return zlib.compressobj(wbits=31)  # with gzip's header, and no time in it
    import zstandard  # noqa: PLC0415 - of an extra

    return cast("_Compressor", zstandard.ZstdCompressor().compressobj())


def _decompressed(raw: io.RawIOBase, compression: str | None) -> io.BufferedIOBase:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=io.BufferedReader(raw, _COPIED))
    try:
        import zstandard  # noqa: PLC0415 - of an extra
    except ImportError:
        raise ArchiveError("this archive is compressed by zstd: install the extra, saga-store[archive]") from None
    reader = zstandard.ZstdDecompressor().stream_reader(
        cast("BinaryIO", raw), read_size=_COPIED, read_across_frames=True
    )
    return io.BufferedReader(reader, _COPIED)


def _zstd_error() -> type[Exception]:
    try:
        import zstandard  # noqa: PLC0415 - of an extra
    except ImportError:
        return EOFError
    error: type[Exception] = zstandard.ZstdError
    return error
