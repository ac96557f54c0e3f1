"""Whether a connection has died while it waited in the pool, found out without asking the server.

A server that ends a connection says so, and closes it: then the socket has something to read, which nobody has asked
for. So has one of which the server changed a setting, say; to replace that connection does no harm.
"""

import select
from collections.abc import Callable
from typing import Any


class Liveness:
    """Watches one connection of a driver's, between its statements."""

    def __init__(self, driver: Any) -> None:  # noqa: ANN401 - asyncpg has no types
        pgconn = getattr(driver, "pgconn", None)
        self._is_closed: Callable[[], bool] = driver.is_closed if pgconn is None else lambda: bool(driver.closed)
        self._is_readable: Callable[[], object] = lambda: True
        if self._is_closed():
            return  # it has no socket any more
        if pgconn is None:
            socket = driver._transport.get_extra_info("socket")  # noqa: SLF001 - there is no public way to it
            self._is_readable = _poll(socket.fileno()) if socket else lambda: False
        else:
            self._is_readable = _poll(pgconn.socket)

    def is_quiet(self) -> bool:
        """Whether the server has neither said anything nor hung up; it takes less than a microsecond."""
        # asyncpg reads by itself whenever the event loop gets to it, and then nothing is left in the socket.
        return not (self._is_closed() or self._is_readable())


def _poll(descriptor: int) -> Callable[[], object]:
    if not hasattr(select, "poll"):  # Windows
        return lambda: select.select([descriptor], [], [], 0)[0]
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return lambda: poll.poll(0)
