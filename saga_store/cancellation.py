"""What has to be seen through although the caller is cancelled."""

import asyncio
from collections.abc import Coroutine
from typing import Any

# How long work that has run out of time gets to come to an end once it is cancelled.
_SECONDS_TO_END = 1.0


def is_being_cancelled() -> bool:
    """Whether somebody has cancelled the current task: a driver may raise CancelledError by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def see_through(work: Coroutine[Any, Any, object], seconds: float) -> None:
    """Do the work, however often the caller is cancelled meanwhile; after so many seconds the work itself is cancelled.

    If the caller was cancelled, that is raised when it is over. A shield around the work wouldn't do: anyio cancels
    again at every await.
    """
    task = asyncio.ensure_future(work)
    cancelled = await _wait(task, seconds)
    if not task.done():
        task.cancel()
        cancelled = await _wait(task, _SECONDS_TO_END) or cancelled
    failure = task.exception() if task.done() and not task.cancelled() else None
    if cancelled or failure:
        raise cancelled or failure  # type: ignore[misc] # one of them is


async def _wait(task: "asyncio.Future[object]", seconds: float) -> asyncio.CancelledError | None:
    cancelled = None
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not task.done() and (left := deadline - loop.time()) > 0:
        try:
            await asyncio.wait([task], timeout=left)
        except asyncio.CancelledError as exc:
            cancelled = exc
    return cancelled
