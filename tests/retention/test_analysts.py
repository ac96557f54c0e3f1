"""What analysts do with archives, without this package: DuckDB over lines and over Parquet, and line-based tools."""

import gzip
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow.parquet
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store.retention import archive
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.retention.world import ALL, make_finished, records

LINES = """
SELECT count(*), count(DISTINCT id), max(context::JSON->>'note')
FROM read_json('{files}', format = 'newline_delimited', maximum_object_size = 1000000000, columns = {{
    id: 'UUID', name: 'VARCHAR', status: 'VARCHAR', updated_at: 'TIMESTAMPTZ', context: 'VARCHAR',
    history: 'STRUCT(id BIGINT, step_name VARCHAR, status VARCHAR, details VARCHAR)[]'}})
WHERE status = 'FAILED' AND (updated_at AT TIME ZONE 'UTC')::DATE = DATE '{day}'
"""
PARQUET = """
SELECT count(DISTINCT s.id), max(s.context::JSON->>'note'), max(e.details)
FROM '{folder}/**/*.sagas.parquet' s JOIN '{folder}/**/*.entries.parquet' e ON e.saga_id = s.id
WHERE s.status = 'FAILED' AND (s.updated_at AT TIME ZONE 'UTC')::DATE = DATE '{day}'
"""


@pytest.fixture(params=["gzip", "zstd"])
async def folder(request: pytest.FixtureRequest, make_engine: Callable[..., AsyncEngine], tmp_path: Path) -> Path:
    """Archive thirty sagas, ten of which have failed, in archives of eight."""
    storage = SqlAlchemySagaStorage(make_engine("asyncpg"))
    ids = await make_finished(storage, 30)
    assert len(await records(storage, ids)) == 30
    await archive(storage, str(tmp_path), ALL, sagas_per_archive=8, compression=request.param, parquet=True)
    return tmp_path


def test_duckdb_finds_the_failed_ones_of_a_day(folder: Path) -> None:
    """In the lines themselves, contexts parsed once more; and in Parquet, with the entries joined."""
    today = datetime.now(UTC).date().isoformat()
    files = next(folder.rglob("*.jsonl.*"))
    database = duckdb.connect()

    assert database.execute(LINES.format(files=f"{folder}/**/*{''.join(files.suffixes)}", day=today)).fetchone() == (
        10,
        10,
        "é€ \U0001f600",
    )
    assert database.execute(LINES.format(files=files, day="2020-01-01")).fetchone() == (0, 0, None)
    found = database.execute(PARQUET.format(folder=folder, day=today)).fetchone()
    assert found is not None
    # Of these, two in ten have no entry at all.
    assert found == (8, "é€ \U0001f600", 'card "declined"\nfor good')


def test_parquet_has_what_the_archive_has(folder: Path) -> None:
    """Every saga and every entry, with times in UTC to the microsecond."""
    for path in folder.rglob("*.manifest.json"):
        manifest = json.loads(path.read_text())
        stem = str(path).removesuffix(".manifest.json")
        sagas = pyarrow.parquet.read_table(f"{stem}.sagas.parquet")
        entries = pyarrow.parquet.read_table(f"{stem}.entries.parquet")

        assert sagas["id"].to_pylist() == [line[0] for line in manifest["lines"]]
        assert len(entries) == manifest["entries"]
        assert str(sagas.schema.field("updated_at").type) == "timestamp[us, tz=UTC]"
        assert isinstance(json.loads(sagas["context"][0].as_py()), dict)


def test_a_line_can_be_trusted_by_its_hash(folder: Path) -> None:
    """With gzip, sha256sum and a JSON parser, as the specification says."""
    for path in folder.rglob("*.manifest.json"):
        manifest = json.loads(path.read_text())
        content = (path.parent / manifest["object"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == manifest["sha256"]
        if manifest["object"].endswith(".gz"):
            lines = gzip.decompress(content).splitlines()
            assert [hashlib.sha256(line).hexdigest() for line in lines] == [line[4] for line in manifest["lines"]]
