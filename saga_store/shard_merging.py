"""What several shards answer, made one answer; no I/O."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeAlias
from uuid import UUID

from saga_store.errors import InvalidSagaDataError
from saga_store.inspection import (
    MOST_COUNTED,
    Cursor,
    Intervention,
    InterventionPage,
    SagaCondition,
    SagaCount,
    SagaFigures,
    SagaPage,
    SagaSummary,
    read_cursor,
    read_entry_cursor,
)

_Key: TypeAlias = tuple[float, str, UUID]


def _key(cursor: Cursor) -> _Key:
    """Return what orders sagas by creation, also those of a year that Python doesn't have.

    Python writes all digits of a fraction, and PostgreSQL none that says nothing.
    """
    text = cursor.created_at
    if text.endswith("infinity"):
        return -math.inf if text.startswith("-") else math.inf, "", cursor.id
    year, _, rest = text.removesuffix(" BC").partition("-")
    if "." in rest:
        rest = rest.rstrip("0").rstrip(".")
    return -int(year) if text.endswith(" BC") else int(year), rest, cursor.id


def _cursor(saga: SagaSummary) -> Cursor:
    return Cursor(saga.created_at.astimezone(UTC).replace(tzinfo=None).isoformat(), saga.id)


def merge_pages(pages: Sequence[SagaPage], limit: int, missing: tuple[int, ...]) -> SagaPage:
    """Return the first page of all shards, of the first page of each."""
    found = sorted(((_cursor(saga), saga) for page in pages for saga in page.sagas), key=_by_key, reverse=True)
    # Below the end of a page that another one of its shard follows, that shard may have more.
    ends = [cursor for page in pages if (cursor := read_cursor(page.after))]
    end = max(ends, key=_key, default=None)
    if end is not None:
        found = [one for one in found if _key(one[0]) >= _key(end)]
    taken = found[:limit]
    after = end if len(taken) < limit or (end is None and len(found) == limit) else taken[-1][0]
    return SagaPage(
        [saga for _, saga in taken],
        at=min(page.at for page in pages),
        after=None if after is None else str(after),
        unreadable=tuple(saga_id for page in pages for saga_id in page.unreadable),
        finished_since=max((page.finished_since for page in pages if page.finished_since), default=None),
        is_partial=any(page.is_partial for page in pages),
        missing=missing,
    )


def _by_key(one: tuple[Cursor, SagaSummary]) -> _Key:
    return _key(one[0])


def merge_counts(counts: Sequence[SagaCount], missing: tuple[int, ...]) -> SagaCount:
    total = sum(counts)
    is_partial = any(count.is_partial for count in counts) or total > MOST_COUNTED or bool(missing)
    return SagaCount(min(total, MOST_COUNTED), is_partial=is_partial, missing=missing)


def merge_figures(shards: Mapping[int, SagaFigures], missing: tuple[int, ...]) -> SagaFigures:
    figures = list(shards.values())
    unfinished: Counter[tuple[str, SagaCondition]] = Counter()
    table_bytes: Counter[tuple[str, str]] = Counter()
    dead_tuples: Counter[str] = Counter()
    for one in figures:
        unfinished.update(one.unfinished)
        table_bytes.update(one.table_bytes)
        dead_tuples.update(one.dead_tuples)
    finished = [one.finished for one in figures if one.finished is not None]
    return SagaFigures(
        unfinished=dict(unfinished),
        oldest_unfinished=max(one.oldest_unfinished for one in figures),
        in_doubt_steps=sum(one.in_doubt_steps for one in figures),
        failed_24h=sum(one.failed_24h for one in figures),
        finished=sum(finished) if len(finished) == len(figures) else None,
        log_entries=sum(one.log_entries for one in figures),
        table_bytes=dict(table_bytes),
        dead_tuples=dict(dead_tuples),
        estimated=tuple(dict.fromkeys(name for one in figures for name in one.estimated)),
        # Of shares the least, and of vacuums the first: the shard that is worst off.
        hot_share={table: _least([one.hot_share.get(table) for one in figures]) for table in _tables(figures)},
        last_vacuum={table: _first([one.last_vacuum.get(table) for one in figures]) for table in _tables(figures)},
        archived_sagas=sum(one.archived_sagas for one in figures),
        archived_bytes=sum(one.archived_bytes for one in figures),
        archives_failed_24h=sum(one.archives_failed_24h for one in figures),
        last_archived_at=max((one.last_archived_at for one in figures if one.last_archived_at), default=None),
        oldest_open_archive=max(one.oldest_open_archive for one in figures),
        missing=missing,
        shards=dict(shards),
    )


def _tables(figures: Sequence[SagaFigures]) -> list[str]:
    return list(dict.fromkeys(table for one in figures for table in (*one.hot_share, *one.last_vacuum)))


def _least(shares: Sequence[float | None]) -> float | None:
    return min((share for share in shares if share is not None), default=None)


def _first(moments: Sequence[datetime | None]) -> datetime | None:
    known = [moment for moment in moments if moment is not None]
    return min(known) if known and len(known) == len(moments) else None


def read_positions(after: object, count: int) -> list[int | None]:
    """Return where a page of interventions ended in each shard, for each has entries of its own."""
    if after is None:
        return [None] * count
    texts = after.split(".") if isinstance(after, str) else []
    if len(texts) != count:
        raise InvalidSagaDataError("after", f"must be what a page gave as its `after`, not {after!r:.60}")
    return [read_entry_cursor(text or None) for text in texts]


def merge_interventions(
    pages: Mapping[int, InterventionPage], positions: Sequence[int | None], limit: int, missing: tuple[int, ...]
) -> InterventionPage:
    """Return the first page of all shards, of the first page of each after those positions.

    Within a shard the order is that of the ids, between shards that of the times.
    """
    rest = {index: list(reversed(page.interventions)) for index, page in pages.items()}
    reached = list(positions)
    taken: list[Intervention] = []
    # A shard whose page is used up, and that has another one, may have newer ones than the others have left.
    while len(taken) < limit and all(rest[index] or page.after is None for index, page in pages.items()):
        heads = [index for index, left in rest.items() if left]
        if not heads:
            break
        index = max(heads, key=lambda index: rest[index][-1].created_at)
        taken.append(rest[index].pop())
        reached[index] = taken[-1].entry_id
    unreadable: list[int] = []
    for index, page in pages.items():
        last = reached[index]
        if rest[index]:
            unreadable += [entry_id for entry_id in page.unreadable if last is not None and entry_id > last]
        else:
            unreadable += page.unreadable
            reached[index] = 0 if page.after is None else int(page.after)
    goes_on = any(rest.values()) or any(page.after is not None for page in pages.values())
    after = ".".join("" if position is None else str(position) for position in reached)
    return InterventionPage(taken, after if goes_on else None, tuple(unreadable), missing)
