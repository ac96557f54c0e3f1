"""What blocks, in threads of its own: neither who is cancelled nor a program that ends waits for them."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias, TypeVar

_T = TypeVar("_T")

Begun: TypeAlias = asyncio.Future[None]
"""What a thread does that returns nothing."""


def in_thread(what: str, work: Callable[[], _T]) -> "asyncio.Future[_T]":
    """Begin something in a thread, and return the future of what it returns."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def told(settle: Callable[[], None]) -> None:
        if not done.done():
            settle()

    def thread() -> None:
        try:
            result = work()
        except BaseException as exc:  # noqa: BLE001 - it is the one's who waits
            error = exc
            settle: Callable[[], None] = lambda: done.set_exception(error)  # noqa: E731 - one of two
        else:
            settle = lambda: done.set_result(result)  # noqa: E731 - as above
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            loop.call_soon_threadsafe(told, settle)

    threading.Thread(target=thread, name=f"saga-store: {what}", daemon=True).start()
    return done
