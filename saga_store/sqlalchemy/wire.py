"""What goes over the wire, so that nobody's settings can change it.

An application may register codecs, loaders, dumpers, row and cursor factories on a driver's connections or for the
whole process; roles and databases have a DateStyle, a time zone, a client encoding. None of it may turn a stored write
into an error. So statements are executed by each driver's own means, past whatever was registered with it, and:

- results are ``uuid``, ``bigint`` and ``boolean``, which the drivers read in binary; all else comes as ``bytea``, and
  is read here: text as UTF-8 (``convert_to``), moments as PostgreSQL's own eight bytes (``timestamptz_send``);
- parameters are of the drivers' most basic kinds, arrays but those of texts being one text each (see write_sql.py).
"""

from collections.abc import Awaitable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Protocol, TypeAlias

from saga_store.sqlalchemy.statement import Spelling

Parameters: TypeAlias = Mapping[str, object]
Rows: TypeAlias = Sequence[Sequence[Any]]

DRIVERS = ("asyncpg", "psycopg")


class Fetch(Protocol):
    """Executes a statement on a driver's own connection."""

    def __call__(
        self,
        driver: Any,  # noqa: ANN401 - asyncpg has no types
        spelling: Spelling,
        parameters: Parameters,
        /,
        *,
        prepare: bool = False,
    ) -> Awaitable[Rows]:
        """Return the rows; ``prepare`` has it prepared at once, by a driver that otherwise wouldn't."""


# From where PostgreSQL counts the microseconds.
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_INFINITIES = {2**63 - 1: "infinity", -(2**63): "-infinity"}


class UnreadAnswerError(Exception):
    """The statement was executed, and then its answer couldn't be read."""


@cache
def fetching(driver: str) -> Fetch:
    """Return what executes statements with this driver, which is loaded by now."""
    return {"asyncpg": _make_asyncpg, "psycopg": _make_psycopg}[driver]()


def _make_asyncpg() -> Fetch:
    from asyncpg import Record  # type: ignore[import-untyped] # noqa: PLC0415 - only whoever uses it has it

    async def fetch(
        driver: Any,  # noqa: ANN401 - no types
        spelling: Spelling,
        parameters: Parameters,
        *,
        prepare: bool = False,  # noqa: ARG001 - asyncpg prepares whatever it executes
    ) -> Rows:
        values = [parameters[name] for name in spelling.names]
        # What `fetch` calls; there is no public way past registered codecs.
        rows: Rows = await driver._execute(  # noqa: SLF001 - as above
            spelling.numbered, values, 0, None, ignore_custom_codec=True, record_class=Record
        )
        return rows

    return fetch


def _make_psycopg() -> Fetch:
    from psycopg import AsyncCursor  # noqa: PLC0415 - only whoever uses it has it
    from psycopg.adapt import AdaptersMap  # noqa: PLC0415 - likewise
    from psycopg.postgres import register_default_adapters, types  # noqa: PLC0415 - likewise
    from psycopg.rows import tuple_row  # noqa: PLC0415 - likewise

    pristine = AdaptersMap(types=types)
    register_default_adapters(pristine)

    class Cursor(AsyncCursor[Any]):
        """As psycopg makes it, whatever was registered with the connection or the module."""

        @property
        def adapters(self) -> AdaptersMap:
            return pristine

    async def fetch(driver: Any, spelling: Spelling, parameters: Parameters, *, prepare: bool = False) -> Rows:  # noqa: ANN401 - as above
        async with Cursor(driver, row_factory=tuple_row) as cursor:
            await cursor.execute(spelling.named, parameters, prepare=prepare or None, binary=True)
            try:
                return await cursor.fetchall()
            except Exception as exc:
                raise UnreadAnswerError(str(exc)) from exc

    return fetch


def read_text(sent: bytes) -> str:
    """Read what ``convert_to(..., 'UTF8')`` sent.

    Raises:
        ValueError: It isn't UTF-8, as happens in a database whose encoding is SQL_ASCII.
    """
    return sent.decode()


def read_moment(sent: bytes) -> datetime:
    """Read what ``timestamptz_send`` sent.

    Raises:
        ValueError: It is infinite, or of a year that Python doesn't know.
    """
    microseconds = int.from_bytes(sent, signed=True)
    if microseconds in _INFINITIES:
        raise ValueError(f"a time is {_INFINITIES[microseconds]}")
    try:
        return _EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        raise ValueError("a time is of a year beyond Python's, which go from 1 to 9999") from None


def lasting(sent: bytes) -> datetime:
    """Read a time that by SQL may have been made one that never comes, or is beyond what Python knows."""
    try:
        return read_moment(sent)
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)
