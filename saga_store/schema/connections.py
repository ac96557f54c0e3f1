"""A connection to migrate on: from a URL, an engine or a connection, with either driver."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Dialect, Engine, create_engine, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool

from saga_store.schema import pooler
from saga_store.schema.drivers import connect_arguments
from saga_store.schema.settings import MigrationError
from saga_store.schema.urls import Address

Bind = str | URL | Engine | Connection
T = TypeVar("T")

RUN_SYNC = "await connection.run_sync(lambda sync: schema.upgrade(sync))"


def connected(bind: Bind, work: Callable[[Connection], T]) -> T:
    """Return what ``work`` makes of a connection that isn't in a transaction.

    Raises:
        MigrationError: There is no such connection to be had, or the one given is in a transaction.
    """
    if isinstance(bind, AsyncConnection | AsyncEngine):
        raise MigrationError(f"an {type(bind).__name__} can't be used by itself: pass its connection on, {RUN_SYNC}")
    if isinstance(bind, Connection | Engine) and bind.dialect.name != "postgresql":
        raise MigrationError(
            f"saga-store needs PostgreSQL, and this is {bind.dialect.name}: pass another {type(bind).__name__}"
        )
    if isinstance(bind, Connection):
        if bind.in_transaction():
            raise MigrationError(
                "the connection is in a transaction already, so the migration would be committed by someone else or "
                "never: commit it or pass a fresh connection"
            )
        return work(bind)
    if isinstance(bind, Engine):
        return _on_engine(bind, _address_of(bind), work)
    address = Address.read(bind)
    url, how = f"postgresql+{address.driver}://", {"connect_args": connect_arguments(address), "poolclass": NullPool}
    if address.driver == "psycopg":
        return _on_engine(create_engine(url, **how), address, work)
    if _loop_is_running():
        raise MigrationError(
            "asyncpg can't be used here, inside a running event loop: use a postgresql+psycopg:// URL, or pass a "
            f"connection: {RUN_SYNC}"
        )
    return asyncio.run(_on_async_engine(create_async_engine(url, **how), address, work))


def engine_at(address: Address, *, pools: bool = False) -> AsyncEngine:
    """Return an engine that hasn't connected yet; where it can't, its errors tell nothing secret of the address.

    Raises:
        MigrationError: The driver has no word for something that the address says.
    """
    engine = create_async_engine(
        f"postgresql+{address.driver}://",
        connect_args=connect_arguments(address),
        poolclass=AsyncAdaptedQueuePool if pools else NullPool,
    )

    def connect(dialect: Dialect, _: object, positional: Sequence[Any], named: Mapping[str, Any]) -> object:
        try:
            return dialect.connect(*positional, **named)
        except Exception as exc:
            _hide(exc, address)
            raise

    event.listen(engine.sync_engine, "do_connect", connect)
    return engine


@asynccontextmanager
async def opened(given: str, *, pools: bool = False) -> AsyncIterator[AsyncEngine]:
    """Yield an engine on a URL that has been connected once, so that what goes wrong is told as by ``connected``.

    It ``pools`` connections for those who send many statements.
    """
    address = Address.read(given)
    engine = engine_at(address, pools=pools)
    try:
        with _explained(address):
            await (await engine.connect()).close()
        yield engine
    finally:
        await engine.dispose()


async def connected_async(engine: AsyncEngine, work: Callable[[Connection], T]) -> T:
    """Do what ``connected`` does, on an application's own async engine."""
    return await _on_async_engine(engine, _address_of(engine.sync_engine), work)


def _on_engine(engine: Engine, address: Address | MigrationError, work: Callable[[Connection], T]) -> T:
    with _explained(address):
        connection = engine.connect()
    with connection:
        return work(connection)


async def _on_async_engine(
    engine: AsyncEngine, address: Address | MigrationError, work: Callable[[Connection], T]
) -> T:
    with _explained(address):
        connection = await engine.connect()
    try:
        return await connection.run_sync(work)
    finally:
        await connection.close()


def _address_of(engine: Engine) -> Address | MigrationError:
    """Return the address of somebody else's engine, or why its URL may well say something else than they think."""
    try:
        return Address.read(engine.url)
    except MigrationError as exc:
        return exc


@contextmanager
def _explained(address: Address | MigrationError) -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        if pooled := pooler.explained(exc):
            raise pooled from exc
        if isinstance(exc, TypeError) and "bytes-like" in str(exc):
            # psycopg, where nothing says how the server's bytes are to be read.
            raise MigrationError(
                "the database is SQL_ASCII, and SQLAlchemy can't use what psycopg makes of that: "
                "create_engine(..., client_encoding='utf8')"
            ) from exc
        if isinstance(address, MigrationError):
            # What SQLAlchemy took for a host may be the end of a password.
            raise MigrationError(f"can't connect with this engine, and {address}") from None
        reason = address.hide(str(getattr(exc, "orig", None) or exc)).rstrip(".?!")
        error = MigrationError(f"can't connect to {address}: {reason}. Is the server up, and DATABASE_URL right?")
        # A cause would be printed as it is.
        raise error from (exc if address.hide(str(exc)) == " ".join(str(exc).split()) else None)


def _hide(exc: BaseException | None, address: Address) -> None:
    """Take out of an error, and of what caused it, what is secret in an address."""
    while exc is not None:
        exc.args = tuple(
            "\n".join(map(address.hide, said.split("\n"))) if isinstance(said, str) else said for said in exc.args
        )
        exc = exc.__cause__ or exc.__context__


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
