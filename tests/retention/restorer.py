"""``python -m tests.retention.restorer URL FOLDER [SAGA]``: restores, and prints the megabytes that it took at most."""

import asyncio
import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from sqlalchemy.ext.asyncio import create_async_engine

from saga_store.retention import RestoreReport, restore
from saga_store.sqlalchemy import SqlAlchemySagaStorage


async def restored(url: str, folder: str, saga_id: str | None = None) -> RestoreReport:
    engine = create_async_engine(url)
    report = await restore(
        SqlAlchemySagaStorage(engine),
        None if saga_id is None else UUID(saga_id),
        archive=folder,
        keep_for=timedelta(0),
    )
    await engine.dispose()
    return report


def main(*arguments: str) -> None:
    report = asyncio.run(restored(*arguments))
    # Not ru_maxrss, which begins with that of the process that started this one.
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    print(json.dumps(asdict(report) | {"peak_mb": peak / 1024}))  # noqa: T201 - for whoever started it


if __name__ == "__main__":
    main(*sys.argv[1:])
