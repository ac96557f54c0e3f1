"""Figures for Prometheus: a snapshot that the application's event loop refreshes, since collectors can't await.

No saga's id is ever a label, and of names there are at most ``max_names``, so what is exported doesn't grow with the
sagas.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

from saga_store.errors import InvalidSagaDataError, SagaStoreError
from saga_store.inspection import MAX_ATTEMPTS, STALE_AFTER, SagaCondition, SagaFigures
from saga_store.interface import IInspectionStorage
from saga_store.retention_model import Retention
from saga_store.validation import valid_count, valid_period

try:
    from prometheus_client import CollectorRegistry, Metric, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
    from prometheus_client.parser import text_string_to_metric_families
    from prometheus_client.registry import Collector
except ImportError as _exc:
    raise ImportError("saga_store.telemetry.prometheus needs prometheus-client: pip install saga-store[ops]") from _exc

__all__ = ["CONTENT_TYPE", "EVERY", "MAX_NAMES", "OTHERS", "SagaCollector", "exposition", "samples"]

_logger = logging.getLogger("saga_store")

EVERY = timedelta(seconds=30)
MAX_NAMES = 100
OTHERS = "(others)"
"""The name under which sagas are counted whose own name is one too many."""
# Of these ``SagaFigures.estimated`` may say that they aren't exact.
_ESTIMATED = ("failed_24h", "in_doubt_steps", "retention_lag", "unfinished")


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """Figures, and when they were asked for: by the monotonic clock, and as a Unix time."""

    figures: SagaFigures
    asked_at: float
    timestamp: float


class SagaCollector(Collector):
    """The figures of a storage, as a collector of prometheus-client.

    Register it once (``REGISTRY.register(collector)``) and keep its snapshot fresh by a task in the event loop of the
    storage (``asyncio.create_task(collector.keep_fresh())``); it may be collected in any thread. Or let each scrape
    refresh it (``scrape``), which needs no task.

    Figures that are older than ``max_age`` aren't shown: ``saga_store_up`` is 0 then, as it is after a refresh that has
    failed, and ``saga_store_snapshot_timestamp_seconds`` says when the last snapshot was taken.

    Args:
        storage: Whose figures.
        every: How often to refresh.
        max_age: How old figures may be to be shown; None: as old as three times ``every``.
        max_names: Of how many names of sagas the unfinished ones are counted apart, those with the most of them; all
            others are counted under ``OTHERS``, and ``saga_store_names_left_out`` says how many names that are.
        stale_after: After how much silence a saga counts as stale.
        max_attempts: After how many recovery attempts one counts as exhausted.
        retention: The policy that sagas are let go by; None: ``saga_store_retention_lag_seconds`` isn't exported.

    Raises:
        InvalidSagaDataError: One of these can't be used.
    """

    def __init__(  # noqa: PLR0913 - settings, all with defaults
        self,
        storage: IInspectionStorage,
        *,
        every: timedelta = EVERY,
        max_age: timedelta | None = None,
        max_names: int = MAX_NAMES,
        stale_after: timedelta = STALE_AFTER,
        max_attempts: int = MAX_ATTEMPTS,
        retention: Retention | None = None,
    ) -> None:
        self._storage = storage
        self._every = valid_period("every", every).total_seconds()
        self._max_age = 3 * self._every if max_age is None else valid_period("max_age", max_age).total_seconds()
        if self._max_age < self._every:
            raise InvalidSagaDataError("max_age", f"must not be less than every, or there are gaps, not {max_age}")
        self._max_names = valid_count("max_names", max_names)
        self._stale_after = valid_period("stale_after", stale_after)
        self._max_attempts = valid_count("max_attempts", max_attempts)
        self._retention = retention
        self._snapshot: _Snapshot | None = None
        self._failed = False
        self._turn = asyncio.Lock()

    async def refresh(self) -> None:
        """Take a snapshot.

        Raises:
            SagaStoreError: As ``get_figures`` raises it. ``saga_store_up`` is 0 until the next success.
        """
        asked_at, timestamp = time.monotonic(), time.time()
        try:
            figures = await self._storage.get_figures(
                stale_after=self._stale_after, max_attempts=self._max_attempts, retention=self._retention
            )
        except Exception:
            self._failed = True
            raise
        self._snapshot, self._failed = _Snapshot(figures, asked_at, timestamp), False

    async def keep_fresh(self) -> NoReturn:
        """Refresh for ever, whatever happens; what goes wrong is logged once, until it goes well again."""
        while True:
            await self._try()
            await asyncio.sleep(self._every)

    async def scrape(self) -> str:
        """Return the text for a scrape, of figures that aren't older than ``every``, unless they aren't to be had.

        However many scrape at a time, the database is asked once. It never raises an error of the storage's:
        ``saga_store_up`` tells.
        """
        async with self._turn:
            if self._failed or self._snapshot is None or time.monotonic() - self._snapshot.asked_at >= self._every:
                await self._try()
        return self.text()

    def text(self) -> str:
        """Return what is known, in Prometheus's text format; ``CONTENT_TYPE`` is what it travels as."""
        return _as_text(self)

    def collect(self) -> Iterator[Metric]:
        """Return what is known, as prometheus-client asks for it."""
        snapshot, failed = self._snapshot, self._failed
        is_fresh = snapshot is not None and time.monotonic() - snapshot.asked_at <= self._max_age
        return _metrics(
            snapshot.figures if snapshot and is_fresh else None,
            is_up=is_fresh and not failed,
            timestamp=snapshot.timestamp if snapshot else None,
            max_names=self._max_names,
        )

    def describe(self) -> Iterator[Metric]:
        """Return what may be exported, without asking anybody."""
        nothing = SagaFigures({}, timedelta(), 0, 0, None, 0, {}, {}, retention_lag=timedelta())
        nothing = replace(nothing, shards={0: nothing})
        return _metrics(nothing, is_up=False, timestamp=None, max_names=self._max_names)

    async def _try(self) -> None:
        had_failed = self._failed
        try:
            await self.refresh()
        except Exception as exc:
            if not had_failed:
                _logger.warning(
                    "saga-store's figures can't be read: %s", exc, exc_info=not isinstance(exc, SagaStoreError)
                )
        else:
            if had_failed:
                _logger.info("saga-store's figures can be read again")


def exposition(figures: SagaFigures | None, *, max_names: int = MAX_NAMES) -> str:
    """Return figures that have just been read in Prometheus's text format; None: they couldn't be read.

    Raises:
        InvalidSagaDataError: ``max_names`` can't be used.
    """
    max_names = valid_count("max_names", max_names)

    class Once(Collector):
        def collect(self) -> Iterator[Metric]:
            timestamp = None if figures is None else time.time()
            return _metrics(figures, is_up=figures is not None, timestamp=timestamp, max_names=max_names)

    return _as_text(Once())


def samples(text: str) -> list[dict[str, Any]]:
    """Return what such a text says: name, labels and value of each sample."""
    return [
        {"name": sample.name, "labels": sample.labels, "value": sample.value}
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def _as_text(collector: Collector) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


def _metrics(figures: SagaFigures | None, *, is_up: bool, timestamp: float | None, max_names: int) -> Iterator[Metric]:
    yield _gauge("saga_store_up", "Whether the figures could be read at the last attempt, and are fresh.", is_up)
    yield _gauge(
        "saga_store_snapshot_timestamp_seconds",
        "When the figures were last read, as a Unix time.",
        timestamp,
    )
    if figures is not None:
        yield from _of_figures(figures, max_names)


def _of_figures(figures: SagaFigures, max_names: int) -> Iterator[Metric]:
    """Return the figures; whatever is added here is described by it.

    What is a table's, and what only rises, is told of each shard by itself: a sum would fall and rise again with a
    shard that is missing for a while, and ``rate`` would take that for a restart. So is the last archive, or a shard
    that isn't archived any more would be hidden by the others.
    """
    shards: list[tuple[tuple[str, ...], SagaFigures]] = [((), figures)]
    if figures.shards:
        shards = [((str(place),), one) for place, one in figures.shards.items()]
    of_shard = ("shard",) if figures.shards else ()
    unfinished, left_out = _bounded(figures.unfinished, max_names)
    yield _gauge(
        "saga_store_unfinished",
        "Sagas that are neither COMPLETED nor FAILED.",
        (((name, condition.value), count) for (name, condition), count in unfinished.items()),
        labels=("name", "condition"),
    )
    yield _gauge("saga_store_names_left_out", f'Names of sagas that are counted under name="{OTHERS}".', left_out)
    yield _gauge(
        "saga_store_oldest_unfinished_seconds",
        "How long ago the oldest unfinished saga was created; 0 if there is none.",
        figures.oldest_unfinished.total_seconds(),
    )
    yield _gauge(
        "saga_store_in_doubt_steps",
        "Steps that have STARTED, and of which nothing says how they ended, under no lease that lasts.",
        figures.in_doubt_steps,
    )
    yield _gauge("saga_store_failed_24h", "Sagas that are FAILED, created in the last 24 hours.", figures.failed_24h)
    yield _gauge(
        "saga_store_table_bytes",
        "Bytes on disk, by table and part.",
        (((*key, *place), size) for place, one in shards for key, size in one.table_bytes.items()),
        labels=("table", "part", *of_shard),
    )
    yield _gauge(
        "saga_store_dead_tuples",
        "Dead rows, as the server's statistics have it.",
        (((table, *place), count) for place, one in shards for table, count in one.dead_tuples.items()),
        labels=("table", *of_shard),
    )
    yield _counter(
        "saga_store_log_entries",
        "Entries ever written to histories, or a few more.",
        ((place, one.log_entries) for place, one in shards),
        labels=of_shard,
    )
    if figures.retention_lag is not None:
        yield _gauge(
            "saga_store_retention_lag_seconds",
            "For how long a saga has been due to be archived and let go; 0 if none is.",
            figures.retention_lag.total_seconds(),
        )
    yield _counter(
        "saga_store_archived",
        "Sagas that were archived and let go.",
        ((place, one.archived_sagas) for place, one in shards),
        labels=of_shard,
    )
    yield _gauge(
        "saga_store_archived_bytes", "Bytes of archives that were written, and haven't failed.", figures.archived_bytes
    )
    yield _gauge(
        "saga_store_archives_failed_24h",
        "Archives that were begun in the last 24 hours and have failed.",
        figures.archives_failed_24h,
    )
    yield _gauge(
        "saga_store_oldest_open_archive_seconds",
        "How long ago the oldest archive was begun that hasn't come to its end; 0 if all have.",
        figures.oldest_open_archive.total_seconds(),
    )
    yield _gauge(
        "saga_store_last_archive_timestamp_seconds",
        "When an archive was last read back and found right, as a Unix time.",
        ((place, one.last_archived_at.timestamp()) for place, one in shards if one.last_archived_at is not None),
        labels=of_shard,
    )
    yield _gauge(
        "saga_store_estimated",
        "Whether a figure is an estimate, since there is too much to count.",
        (((figure,), figure in figures.estimated) for figure in _ESTIMATED),
        labels=("figure",),
    )
    if figures.shards:
        up = dict.fromkeys(figures.shards, 1) | dict.fromkeys(figures.missing, 0)
        yield _gauge(
            "saga_store_shard_up",
            "Whether the shard could be asked; the figures are without those that couldn't.",
            (((str(place),), up[place]) for place in sorted(up)),
            labels=("shard",),
        )


def _counter(
    name: str, says: str, values: Iterable[tuple[Sequence[str], float]], labels: tuple[str, ...]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, says, labels=labels)
    for given, value in values:
        family.add_metric(given, value)
    return family


def _gauge(
    name: str,
    says: str,
    values: float | Iterable[tuple[Sequence[str], float]] | None,
    labels: tuple[str, ...] = (),
) -> GaugeMetricFamily:
    """Return a gauge: of one value, or of none if that isn't known, or of one for each combination of its labels."""
    family = GaugeMetricFamily(name, says, labels=labels)
    if values is None or isinstance(values, int | float):
        values = [] if values is None else [((), values)]
    for given, value in values:
        family.add_metric(given, value)
    return family


def _bounded(
    unfinished: Mapping[tuple[str, SagaCondition], int], most: int
) -> tuple[Mapping[tuple[str, SagaCondition], int], int]:
    """Return the counts with at most so many names, and ``OTHERS``; and how many names are counted there."""
    of_name: Counter[str] = Counter()
    for (name, _), count in unfinished.items():
        of_name[name] += count
    if len(of_name) <= most:
        return unfinished, 0
    kept = set(sorted(of_name, key=lambda name: (-of_name[name], name))[:most])
    bounded: Counter[tuple[str, SagaCondition]] = Counter()
    for (name, condition), count in unfinished.items():
        bounded[name if name in kept else OTHERS, condition] += count
    return bounded, len(of_name) - len(kept)
