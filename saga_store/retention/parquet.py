"""An archive as two Parquet files beside it, for analysts; what counts is the archive."""

import io
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from saga_store.retention.errors import ArchiveError, on_disk
from saga_store.retention.files import Found
from saga_store.retention.manifest import Manifest, parquet_paths
from saga_store.retention.reading import read_archive
from saga_store.retention.target import Target
from saga_store.retention.threads import in_thread
from saga_store.retention_model import SagaRecord

_IN_MEMORY = 16 * 2**20
_COPIED = 2**20
# A row group is in memory as a whole.
_GROUP_ROWS = 50_000
_GROUP_BYTES = 32 * 2**20


async def write_parquet(target: Target, manifest: Manifest) -> None:
    """Write the files of an archive that is there: its sagas, and the entries of their histories.

    Raises:
        ArchiveError: pyarrow isn't installed.
        TargetError: They can't be written.
    """
    sagas, entries = _tables()
    try:
        async for batch in read_archive(target, manifest):
            await in_thread("parquet", lambda: _add(batch, sagas, entries))  # noqa: B023 - it is awaited here
        for table, path in zip((sagas, entries), parquet_paths(manifest.path), strict=True):
            await in_thread("parquet", table.finish)
            await target.write_pieces(path, table.pieces())
    finally:
        sagas.close()
        entries.close()


class _Table:
    def __init__(self, pa: Any, parquet: Any, fields: Sequence[tuple[str, str]]) -> None:  # noqa: ANN401 - untyped
        kinds = {
            "text": pa.string(),
            "long": pa.large_string(),
            "int": pa.int64(),
            "time": pa.timestamp("us", tz="UTC"),
        }
        self._pa = pa
        self._schema = pa.schema([(name, kinds[kind]) for name, kind in fields])
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by close()
        self._writer = parquet.ParquetWriter(self._file, self._schema, compression="zstd")
        self._rows: list[tuple[object, ...]] = []
        self._bytes = 0

    @on_disk()
    def add(self, row: tuple[object, ...], size: int) -> None:
        self._rows.append(row)
        self._bytes += size
        if len(self._rows) >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    @on_disk()
    def finish(self) -> None:
        self._flush()
        self._writer.close()

    def pieces(self) -> Iterator[bytes]:
        self._file.seek(io.SEEK_SET)
        while piece := self._file.read(_COPIED):
            yield piece

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        if self._rows:
            columns = [
                self._pa.array(values, field.type)
                for values, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
            ]
            self._writer.write_table(self._pa.Table.from_arrays(columns, schema=self._schema))
        self._rows, self._bytes = [], 0


def _tables() -> tuple[_Table, _Table]:
    try:
        import pyarrow as pa  # noqa: PLC0415 - of an extra
        from pyarrow import parquet  # noqa: PLC0415 - likewise
    except ImportError:
        raise ArchiveError(
            "Parquet needs pyarrow: install the extra, as in pip install 'saga-store[archive,parquet]'"
        ) from None
    sagas = [
        ("id", "text"),
        ("name", "text"),
        ("status", "text"),
        ("version", "int"),
        ("recovery_attempts", "int"),
        ("created_at", "time"),
        ("updated_at", "time"),
        ("context", "long"),
    ]
    entries = [
        ("saga_id", "text"),
        ("id", "int"),
        ("step_name", "text"),
        ("action", "text"),
        ("status", "text"),
        ("details", "long"),
        ("created_at", "time"),
    ]
    return _Table(pa, parquet, sagas), _Table(pa, parquet, entries)


def _add(batch: Sequence[Found], sagas: _Table, entries: _Table) -> None:
    for found in batch:
        record = found.record
        sagas.add(_saga(record), len(record.context))
        for entry in record.entries:
            row = (
                str(record.id),
                entry.id,
                entry.step_name,
                entry.action,
                entry.status.value,
                entry.details,
                entry.created_at,
            )
            entries.add(row, len(entry.details or ""))


def _saga(record: SagaRecord) -> tuple[object, ...]:
    return (
        str(record.id),
        record.name,
        record.status.value,
        record.version,
        record.recovery_attempts,
        record.created_at,
        record.updated_at,
        record.context,
    )
