"""The verb that shows sagas in a browser: on this machine only unless it is told otherwise, for it knows no login."""

import argparse
import asyncio
import ipaddress
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from saga_store.cli.console import Console, warn
from saga_store.cli.exits import Exit
from saga_store.cli.migrate import given_url
from saga_store.cli.shards import ALL_AT_ONCE, Shards, add_shards, places_of
from saga_store.cli.storages import Opened, opened_storage, reason_of
from saga_store.cli.verbs import Verbs
from saga_store.errors import InvalidSagaDataError, SchemaError, StorageUnavailableError
from saga_store.schema.urls import Address
from saga_store.sharding import ShardedSagaStorage
from saga_store.storage import SagaStorage

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_BIND = "127.0.0.1:8765"
_BACKLOG = 128
# A page that waits is worse than one that says that the database is away.
_RETRY_FOR = timedelta(seconds=1)


def register(verbs: Verbs) -> None:
    parser = verbs.add("web", _web, summary="Show sagas in a browser; it only reads.", database=True)
    parser.add_argument(
        "--bind",
        metavar="HOST:PORT",
        type=_bind,
        default=_BIND,
        help=f"where to listen; port 0 is any that is free (default: {_BIND})",
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a host by which it may be called, besides that of --bind; may be repeated",
    )
    parser.add_argument(
        "--root-path", metavar="PATH", default="", help="below which path a proxy shows it, such as /ops"
    )
    parser.add_argument(
        "--redact", metavar="FIELD", action="append", default=[], help="a field of contexts to hide; may be repeated"
    )
    parser.add_argument("--trace-url", metavar="URL", help="where a saga is traced, with {saga_id} or {name} in it")
    archives = parser.add_mutually_exclusive_group()
    archives.add_argument(
        "--archive",
        metavar="URI",
        action="append",
        default=[],
        help="a target from which records of archived sagas are shown, and from no others; may be repeated",
    )
    archives.add_argument(
        "--no-archives", action="store_true", help="read no archives (default: where the ledger says)"
    )
    parser.add_argument("--metrics", action="store_true", help="show figures for Prometheus at /metrics, too")
    add_shards(parser, ALL_AT_ONCE)


def _web(given: argparse.Namespace, console: Console) -> int:
    try:
        import uvicorn  # noqa: F401, PLC0415 - of an extra that the other verbs do without

        import saga_store.web  # noqa: F401, PLC0415 - likewise
    except ImportError as exc:
        return console.fail(
            ImportError("saga-store web needs uvicorn: pip install saga-store[web]") if exc.name == "uvicorn" else exc,
            Exit.FAILED,
        )
    try:
        if asyncio.run(_serve(given, console)):
            raise KeyboardInterrupt
    except InvalidSagaDataError as exc:
        return console.fail(exc, Exit.USAGE)
    except (OSError, ImportError) as exc:
        return console.fail(exc, Exit.FAILED)
    return Exit.DONE


async def _serve(given: argparse.Namespace, console: Console) -> bool:
    """Serve until a signal ends it, and return whether that was an interrupt."""
    import uvicorn  # noqa: PLC0415 - see _web

    host, port = given.bind
    async with opened_storage(given, pools=True, retry_for=_RETRY_FOR, records=False) as opened:
        if isinstance(opened.storage, ShardedSagaStorage):
            await _look_at_shards(opened, opened.storage)
        app = _app(given, opened.storage)
        with _listen(host, port) as listener:
            config = uvicorn.Config(
                app,
                root_path=given.root_path,
                access_log=False,
                log_config=None,
                log_level="warning",
                proxy_headers=False,
                server_header=False,
            )
            _say_where(listener, given, console)
            await uvicorn.Server(config).serve(sockets=[listener])
        try:
            # uvicorn raises the signal that ended it once more, and asyncio makes a cancellation of that; the engine is
            # to be closed nevertheless.
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            return task is not None and task.uncancel() == 0
    return False


async def _look_at_shards(opened: Opened, storage: ShardedSagaStorage) -> None:
    """Say which are down, unless that is all of them, or they aren't what they should be."""
    try:
        missing = await storage.reach()
    except (StorageUnavailableError, SchemaError) as exc:
        raise await opened.explained(exc, writes=False) from exc
    for error in missing.values():
        warn(f"{reason_of(error)}; the pages are without it until it is back")


def _app(given: argparse.Namespace, storage: SagaStorage) -> "ASGIApp":
    from saga_store.web import create_app  # noqa: PLC0415 - see _web
    from saga_store.web.hosts import LOOPBACK  # noqa: PLC0415 - likewise

    return create_app(
        storage,
        trace_url=given.trace_url,
        redact=given.redact or None,
        title=_title(given),
        allowed_hosts=[*LOOPBACK, *([] if _is_any(given.bind[0]) else [given.bind[0]]), *given.allow_host],
        metrics=given.metrics,
        command_options=places_of(given),
        archives=given.archive or not given.no_archives,
    )


def _title(given: argparse.Namespace) -> str:
    shards: Shards | None = given.shards
    if shards is not None and any(shard.url for shard in shards.places):
        return f"{len(shards.places)} shards"
    said = Address.read(given_url(given)).said
    title = " @ ".join(filter(None, (said.get("dbname"), said.get("host"))))
    return title if shards is None else f"{title}, {len(shards.places)} shards"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise OSError(f"can't listen at {host}:{port}: {reason}; --bind says where else") from exc


def _say_where(listener: socket.socket, given: argparse.Namespace, console: Console) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}{given.root_path.rstrip('/')}/"
    if not _is_loopback(host):
        warn("whoever reaches this address sees all sagas: it asks nobody who they are")
    if _is_any(host) and not given.allow_host:
        warn("it answers to localhost only; --allow-host names the hosts by which others call it")
    console.result(f"{url}  (read only; Ctrl-C ends it)", url=url)


def _bind(value: str) -> tuple[str, int]:
    host, colon, port = value.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise argparse.ArgumentTypeError(f"{value!r} is no HOST:PORT; write it like {_BIND} or [::1]:8765")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_any(host: str) -> bool:
    return _address(host).is_unspecified


def _is_loopback(host: str) -> bool:
    return _address(host).is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the address; of a name one that is neither of those that are asked for."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else "192.0.2.1")
