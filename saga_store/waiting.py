"""Those who wait for sagas to end: one question at a time for all of them, and nothing held in between."""

import asyncio
import copy
from collections.abc import Awaitable, Callable, Collection, Hashable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import TypeAlias
from uuid import UUID

Ask: TypeAlias = Callable[[Sequence[UUID]], Awaitable[Collection[UUID]]]
"""Tells which of these sagas are there and unfinished."""


@dataclass(frozen=True, slots=True)
class Look:
    """Where somebody looks for a saga, decided in their task and context.

    Attributes:
        ask: Asks there.
        key: Equal for those who may look together.
        make_context: Returns the context in which it is asked for all of them.
    """

    ask: Ask
    key: Hashable = None
    make_context: Callable[[], Context] = Context


class Waiting:
    """All who wait, by where they look. Nothing has to be started or closed.

    Args:
        pause: How many seconds pass between two looks.
    """

    def __init__(self, pause: float) -> None:
        self._pause = pause
        self._crowds: dict[Hashable, _Crowd] = {}

    async def wait(self, saga_id: UUID, look: Look, seconds: float) -> None:
        """Wait until a look doesn't find the saga unfinished any more, for so many seconds at most.

        Raises what the look raised, if that failed.
        """
        loop = asyncio.get_running_loop()
        key = (loop, look.key)
        crowd = self._crowds.get(key)
        if crowd is None:
            crowd = self._crowds[key] = _Crowd(loop, look, self._pause)
        told = crowd.add(saga_id)
        try:
            await asyncio.wait([told], timeout=seconds)
        finally:
            if crowd.remove(saga_id, told):
                del self._crowds[key]
        if told.done() and not told.cancelled() and (failure := told.result()):
            raise failure


class _Crowd:
    """Those who look together: a timer, and a task for each look."""

    def __init__(self, loop: asyncio.AbstractEventLoop, look: Look, pause: float) -> None:
        self._loop = loop
        self._ask = look.ask
        self._context = look.make_context()
        self._pause = pause
        self._told: dict[UUID, set[asyncio.Future[Exception | None]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._timer = self._wind()

    def add(self, saga_id: UUID) -> "asyncio.Future[Exception | None]":
        told: asyncio.Future[Exception | None] = self._loop.create_future()
        self._told.setdefault(saga_id, set()).add(told)
        return told

    def remove(self, saga_id: UUID, told: "asyncio.Future[Exception | None]") -> bool:
        """Whether that was the last one, and nobody looks any more."""
        self._told[saga_id].remove(told)
        if not self._told[saga_id]:
            del self._told[saga_id]
        if not self._told:
            self._timer.cancel()
        return not self._told

    def _wind(self) -> asyncio.TimerHandle:
        return self._loop.call_later(self._pause, self._begin, context=self._context)

    def _begin(self) -> None:
        # Not by the loop's own factory, which may not know of contexts.
        self._task = asyncio.Task(self._look(), loop=self._loop, context=self._context)

    async def _look(self) -> None:
        try:
            await self._tell()
        finally:  # also when it is cancelled, or the driver raises that
            if self._told and not self._loop.is_closed():
                self._timer = self._wind()

    async def _tell(self) -> None:
        asked = list(self._told)
        over: Collection[UUID] = asked
        failure: Exception | None = None
        try:
            over = set(asked).difference(await self._ask(asked))
        except Exception as exc:  # noqa: BLE001 - whatever it is, each of them is told
            failure = exc
        for saga_id in over:
            for told in self._told.get(saga_id, ()):
                if not told.done():
                    told.set_result(_own(failure))


def _own(failure: Exception | None) -> Exception | None:
    """Return an error for one caller alone: raising adds a traceback and a context to it."""
    if failure is None:
        return None
    own = copy.copy(failure)
    own.__cause__ = failure.__cause__
    return own
