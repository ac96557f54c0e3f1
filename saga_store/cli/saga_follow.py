"""saga show --follow: a saga until it is finished, each change of it once, also past a restart of the server."""

import argparse
import asyncio
from collections import deque
from dataclasses import replace
from typing import Any

from saga_store import telling
from saga_store.cli.blocks import Block, cell, line
from saga_store.cli.console import warn
from saga_store.cli.exits import Exit
from saga_store.cli.output import Output
from saga_store.cli.saga_filters import judged, zone_of
from saga_store.cli.saga_story import attempts_of, look, story, telling_of
from saga_store.cli.sagas_shown import CONDITION_KINDS, change, moment, plain
from saga_store.errors import SagaNotFoundError, StorageUnavailableError
from saga_store.inspection import HISTORY_SEEN, RecentHistory, SagaCondition, SagaPage, SagaSummary
from saga_store.sqlalchemy.failures import PERMISSION_DENIED
from saga_store.storage import SagaStorage

_SHORTEST_PAUSE = 0.1


async def follow(storage: SagaStorage, given: argparse.Namespace, output: Output) -> Exit:
    """Show a saga, then each change of it, until it is finished; then how it ended."""
    how = telling_of(given)
    saga, history, now, archived, missing = await look(storage, given)
    output.lacks(storage, missing)
    if output.in_lines:
        output.found([], {}, [{"saga": plain(saga)}, *({"entry": plain(entry)} for entry in history.entries)])
    else:
        output.found(story(saga, history, now, how, archived), {})
    follower = _Follower(storage, given, output, saga, history)
    while saga.condition is not SagaCondition.FINISHED:
        await asyncio.sleep(max(given.every.total_seconds(), _SHORTEST_PAUSE))
        saga = await follower.look()
    return output.code(Exit.DONE)


class _Follower:
    """Looks at a saga again and again, and prints what has changed."""

    def __init__(
        self,
        storage: SagaStorage,
        given: argparse.Namespace,
        output: Output,
        saga: SagaSummary,
        history: RecentHistory,
    ) -> None:
        self._storage = storage
        self._given = given
        self._output = output
        self._saga = saga
        self._query = replace(judged(given), id_prefix=saga.id.hex)
        self._entries = deque(history.entries, maxlen=HISTORY_SEEN)
        self._is_away = False

    async def look(self) -> SagaSummary:
        """Look once; if the server is away, say so the first time, and leave it at that."""
        try:
            # In this order: all that led to what the row says is in the history that is read after it.
            page = await self._storage.find_sagas(self._query, limit=1)
            history = await self._storage.get_recent_history(self._saga.id, after=self._last_id())
        except StorageUnavailableError as exc:
            if exc.sqlstate == PERMISSION_DENIED:
                raise
            if not self._is_away:
                warn(f"the database doesn't answer, so this goes on as soon as it does: {exc.reason}")
            self._is_away = True
            return self._saga
        if self._is_away:
            warn("the database answers again")
            self._is_away = False
        if not page.sagas:
            raise SagaNotFoundError(self._saga.id)
        before, [self._saga] = self._saga, page.sagas
        self._print(before, page, history)
        return self._saga

    def _last_id(self) -> int:
        return self._entries[-1].id if self._entries else 0

    def _print(self, before: SagaSummary, page: SagaPage, history: RecentHistory) -> None:
        zone, saga = zone_of(self._given), self._saga
        facts: list[dict[str, Any]] = [{"entry": plain(entry)} for entry in history.entries]
        blocks: list[Block] = []
        if history.left_out:
            blocks.append(line(cell(f"{history.left_out} entries left out", "dim")))
        blocks += [change(entry, zone) for entry in history.entries]
        self._entries += history.entries
        if said := _changes(before, saga):
            facts.append({"saga": plain(saga)})
            kind = CONDITION_KINDS[saga.condition]
            blocks.append(line(cell(moment(page.at, zone), "dim"), cell(said, kind)))
        if saga.condition is SagaCondition.FINISHED and not self._output.in_lines:
            attempts = attempts_of(saga, RecentHistory(list(self._entries)), page.at)
            blocks += [line(), line(cell(telling.verdict(saga, attempts, page.at, zone=zone), "strong"))]
        if blocks:
            self._output.found(blocks, {}, facts)


def _changes(before: SagaSummary, saga: SagaSummary) -> str | None:
    """Return in words what of a saga has changed; what only time has changed, such as the silence, isn't told."""
    said = []
    for what, one, other in (
        ("status", before.status.value, saga.status.value),
        ("condition", before.condition.value, saga.condition.value),
        ("lease", before.lease_owner or "nobody's", saga.lease_owner or "nobody's"),
        ("recovery attempts", str(before.recovery_attempts), str(saga.recovery_attempts)),
    ):
        if one != other:
            said.append(f"{what} {one} \N{RIGHTWARDS ARROW} {other}")
    return ", ".join(said) or None
