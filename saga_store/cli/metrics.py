"""The verb that prints figures for Prometheus, for node_exporter's textfile collector or whatever else reads them.

That they couldn't be read has to be seen by who reads the output, and nobody else may be looking: then the output says
that saga-store isn't up, instead of old figures, and the exit code is 1.
"""

import argparse
import asyncio
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from alembic.util import CommandError
from sqlalchemy.exc import SQLAlchemyError

from saga_store.cli.console import Console, UnprintableError, warn
from saga_store.cli.exits import Exit
from saga_store.cli.retention_policy import add_policy, asks_for_policy, policy_of
from saga_store.cli.shards import ALL_AT_ONCE, add_shards
from saga_store.cli.storages import missing_of, opened_storage, reason_of
from saga_store.cli.verbs import Verbs, duration
from saga_store.errors import InvalidSagaDataError, SagaStoreError, SchemaError, StorageUnavailableError
from saga_store.inspection import MAX_ATTEMPTS, STALE_AFTER, SagaFigures

_MAX_NAMES = 100


def register(verbs: Verbs) -> None:
    parser = verbs.add("metrics", _metrics, summary="Print figures for Prometheus.", database=True)
    parser.add_argument("--output", metavar="FILE", help="replace this file as a whole, as node_exporter needs it")
    parser.add_argument(
        "--max-names",
        type=int,
        default=_MAX_NAMES,
        help=f"of how many names of sagas to count the unfinished ones apart (default: {_MAX_NAMES})",
    )
    parser.add_argument("--stale-after", type=duration, default=STALE_AFTER, help="silent for this long is stale")
    parser.add_argument("--max-attempts", type=int, default=MAX_ATTEMPTS, help="this many exhaust a saga")
    add_shards(parser, ALL_AT_ONCE)
    due = parser.add_argument_group("how far archiving lags behind, by the policy of saga-store archive")
    add_policy(due)


def _metrics(given: argparse.Namespace, console: Console) -> int:
    try:
        from saga_store.telemetry import prometheus  # noqa: PLC0415 - of an extra that the other verbs do without
    except ImportError as exc:
        return console.fail(exc, Exit.FAILED)
    if given.json and given.output is not None:
        return console.fail(ValueError("--output is for Prometheus: leave --json or --output out"), Exit.USAGE)
    try:
        figures = asyncio.run(_figures(given))
        text = prometheus.exposition(figures, max_names=given.max_names)
    except InvalidSagaDataError as exc:
        return console.fail(exc, Exit.USAGE)
    except (SagaStoreError, CommandError, SQLAlchemyError):
        if not given.json:
            with suppress(UnprintableError):  # there is a worse error to tell
                _print(given, console, prometheus.exposition(None))
        raise
    if given.json:
        console.product("", metrics=prometheus.samples(text), missing=list(figures.missing))
    else:
        _print(given, console, text)
    return Exit.PARTLY if figures.missing else Exit.DONE


async def _figures(given: argparse.Namespace) -> SagaFigures:
    policy = policy_of(given) if asks_for_policy(given) else None
    async with opened_storage(given, records=False) as opened:
        try:
            figures = await opened.storage.get_figures(
                stale_after=given.stale_after, max_attempts=given.max_attempts, retention=policy
            )
        except (StorageUnavailableError, SchemaError) as exc:
            raise await opened.explained(exc, writes=False) from exc
        for error in missing_of(opened.storage).values():
            warn(f"{reason_of(error)}; the figures are without it")
        return figures


def _print(given: argparse.Namespace, console: Console, text: str) -> None:
    if given.output is None:
        console.exactly(text)
        return
    try:
        _replace(Path(given.output), text)
    except OSError as exc:
        raise UnprintableError(f"{given.output}: {exc.strerror}") from exc


def _replace(file: Path, text: str) -> None:
    """Put the text in the place of a file, so that whoever reads it finds the old one or the new one, whole."""
    if file.exists() and not file.is_file():
        raise UnprintableError(f"{file} is no file; without --output the figures go to stdout")
    descriptor, written = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as new:  # noqa: PTH123 - of a descriptor
            new.write(text)
        Path(written).chmod(0o644)  # node_exporter is another user
        os.replace(written, file)  # noqa: PTH105 - as it is called everywhere
    except BaseException:
        Path(written).unlink(missing_ok=True)
        raise
