"""What is archived, put where the checker looks: a stub's row and history are those of its archive's record."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import psycopg
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from saga_store.retention import ArchiveError, Target, find_archived, verify
from saga_store.retention_model import SagaRecord
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.crash.archiver import archives_of
from tests.crash.tables import LogRow, Stored

STUBS = "SELECT id::text FROM saga_executions WHERE archived_at IS NOT NULL"
EVER = "SELECT count(*) FROM saga_archives WHERE state = 'REMOVED'"


@dataclass(frozen=True, slots=True)
class Archived:
    """What was found of archives.

    Attributes:
        stored: The tables, with what is archived in its place.
        archives: How many were removed from the tables.
        stubs: How many sagas are archived at the end.
        lost: Those that are in neither place, and why; and archives that aren't what was written.
    """

    stored: Stored
    archives: int
    stubs: int
    lost: Sequence[tuple[str, str]]


async def read_archived(urls: Sequence[str], folder: Path, stored: Stored) -> Archived:
    """Look for each stub's record, and for what archives hold that isn't right; in each database."""
    found = Archived(stored, 0, 0, [])
    for number, url in enumerate(urls):
        one = await _read_archived(url, Path(archives_of(str(folder), number)), found.stored)
        found = Archived(one.stored, found.archives + one.archives, found.stubs + one.stubs, [*found.lost, *one.lost])
    return found


async def _read_archived(url: str, folder: Path, stored: Stored) -> Archived:
    with psycopg.connect(url, autocommit=True) as admin:
        stubs = [saga for (saga,) in admin.execute(STUBS.encode()).fetchall()]
        [archives] = admin.execute(EVER.encode()).fetchone() or [0]
    engine = create_async_engine(make_url(url).set(drivername="postgresql+psycopg"))
    storage = SqlAlchemySagaStorage(engine)
    target = Target(str(folder))
    logs, sagas = dict(stored.logs), dict(stored.sagas)
    lost: list[tuple[str, str]] = []
    try:
        if archives:
            lost += [("of any", problem) for problem in (await verify(target, storage)).problems]
        for saga in stubs:
            try:
                found = await find_archived(storage, UUID(saga), archive=target)
            except ArchiveError as exc:
                lost.append((saga, str(exc)))
                continue
            if found is None:
                lost.append((saga, "it is a stub, and no archive has it"))
                continue
            # What is in the table of it as well is there twice, and the checker finds the tokens.
            logs[saga] = [*_logs(found.record), *logs.get(saga, ())]
            sagas[saga] = _row(found.record)
    finally:
        await engine.dispose()
    return Archived(Stored(stored.states, logs, sagas), archives, len(stubs), lost)


def _row(record: SagaRecord) -> tuple[int, str, str | None]:
    return record.version, record.status.value, json.loads(record.context).get("token")


def _logs(record: SagaRecord) -> list[LogRow]:
    found = []
    for entry in record.entries:
        token, index, _ = (entry.details or "").split(" ", 2)
        found.append(LogRow(token, int(index), None))
    return found
