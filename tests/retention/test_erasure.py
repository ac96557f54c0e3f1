"""docs/retention.md: a person is erased from an archive by the steps that stand there, and nobody else is."""

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import psycopg
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store.retention import Target, archive, find_archived, restore, verify
from saga_store.retention.files import Found
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.retention.world import ALL, make_finished

DOCS = Path(__file__).parent.parent.parent / "docs" / "retention.md"
A_SAGA, AN_ARCHIVE = "9f4dfb4e-2f6a-4a53-8b53-0d7c1ad0c0de", "0b7c0c5e-6e0f-4d4e-9f0c-0f6f6a6f7a11"


def statements(begin: str, **ids: UUID) -> list[str]:
    """Return the statements of the page that begin so, with these ids in place of its own."""
    blocks = re.findall(r"```sql\n(.*?)```", DOCS.read_text(), re.DOTALL)
    found = [one for block in blocks for one in block.split(";") if one.split()[:2] == begin.split()]
    assert found
    return [one.replace(A_SAGA, str(ids.get("saga"))).replace(AN_ARCHIVE, str(ids.get("archive"))) for one in found]


async def test_a_person_is_erased(
    make_engine: Callable[..., AsyncEngine], admin: psycopg.Connection, target: Target
) -> None:
    """No archive tells of them any more, the others' records are there, and verify has nothing to complain of."""
    storage = SqlAlchemySagaStorage(make_engine("psycopg"))
    ids = await make_finished(storage, 10)
    await archive(storage, target, ALL, sagas_per_archive=5, compression="gzip", parquet=True)
    person = ids[3]
    old = await find_archived(storage, person)
    other = await find_archived(storage, ids[4])
    assert old is not None
    assert other is not None
    [ledger] = statements("DELETE FROM", archive=old.archive_id)
    admin.execute(ledger.encode())
    assert (await verify(target, storage)).problems == []  # it did nothing: there are stubs of this archive

    assert (await restore(storage, archive=old.file, keep_for=timedelta(0))).restored == 5
    for change in [*statements("UPDATE saga_executions", saga=person), *statements("UPDATE saga_logs", saga=person)]:
        admin.execute(change.encode())
    assert (await archive(storage, target, ALL, parquet=True)).removed == 5
    admin.execute(ledger.encode())
    stem = old.file.removeprefix(f"{target.name}/").removesuffix(".jsonl.gz")
    gone = [path for path in await target.files() if path.startswith(stem)]
    assert len(gone) == 4
    for path in gone:
        await target.remove(path)

    assert (await verify(target, storage)).problems == []
    erased = await find_archived(storage, person)
    assert erased is not None
    assert "erased" in erased.record.context
    assert "order" not in erased.record.context
    assert [entry.details for entry in erased.record.entries] == [None] * len(old.record.entries)
    assert _known(await find_archived(storage, ids[4])) == _known(other)


def _known(found: Found | None) -> object:
    assert found is not None
    return found.record
