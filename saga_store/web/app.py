"""The ASGI app: which page is asked, and what is said if it can't be shown."""

import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TypeAlias
from urllib.parse import quote
from uuid import UUID

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from saga_store.errors import (
    InvalidSagaDataError,
    SagaArchivedError,
    SagaNotFoundError,
    SagaStoreError,
    SagaUnreadableError,
    SchemaError,
    StorageUnavailableError,
)
from saga_store.interface import IInspectionStorage
from saga_store.retention.showing import ArchiveReader, Places
from saga_store.sharding import ShardedSagaStorage
from saga_store.telling import shards
from saga_store.web import pages
from saga_store.web.asked import Asked
from saga_store.web.contexts import Redact, Redaction
from saga_store.web.hosts import host_of, valid_hosts
from saga_store.web.links import Links, Traces, TraceUrl
from saga_store.web.rendering import STYLE, STYLE_HASH, inline_style, render

POLICY = "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "X-Robots-Tag": "noindex, nofollow",
}
_SOON = {"Retry-After": "5"}
_PERMISSION_DENIED, _QUERY_CANCELED = "42501", "57014"
_PAGES = {"/", "/sagas", "/interventions", "/style.css", "/metrics"}
_A_SAGA = re.compile(r"/sagas/[0-9A-Fa-f-]+")
_logger = logging.getLogger("saga_store")
_Page: TypeAlias = Callable[[Request, str], Awaitable[Response]]


def create_app(  # noqa: PLR0913 - settings, all with defaults
    storage: IInspectionStorage,
    *,
    trace_url: TraceUrl | None = None,
    redact: Redact | None = None,
    title: str | None = None,
    allowed_hosts: Iterable[str] | None = None,
    metrics: bool = False,
    command_options: Mapping[str, str] | None = None,
    archives: Places = True,
) -> ASGIApp:
    """Return an ASGI app whose pages show sagas: ``/``, ``/sagas``, ``/sagas/{id}`` and ``/interventions``.

    Mount it below any path of an application, whose authentication then applies to it; it has none. It answers GET and
    HEAD only, writes nothing, and needs no more than SELECT on the tables. Its pages have no script.

    Args:
        storage: Whose sagas. It has to commit by itself, as one on an engine or a sessionmaker does.
        trace_url: Where the host's tracing shows a saga: a URL with ``{saga_id}`` or ``{name}`` in it, or a callable
            that gets a ``SagaSummary`` and returns a URL or None.
        redact: What contexts hold that isn't to be seen: names of fields, hidden at any depth; or a callable that gets
            a context of its own and returns what may be seen. With it sagas can't be looked for by what is hidden, and
            with a callable not by contexts at all.
        title: What is looked at, such as ``shop @ db-1``; it stands on every page.
        allowed_hosts: Which hosts the header ``Host`` may name; None: any, which is the host application's business.
        metrics: Whether ``/metrics`` shows figures for Prometheus; this needs the extra ``ops``.
        command_options: What goes into each command that a page shows to be copied, such as ``{"--schema": "shop"}``.
        archives: Where the pages may read the records of archived sagas: True: wherever the ledger says, if the extra
            ``archive`` is installed; a target or a URI, or several: only below these, and by a target's credentials;
            False: nowhere.

    Raises:
        InvalidSagaDataError: One of these can't be used.
        ImportError: ``metrics`` without prometheus-client.
    """
    return _App(
        storage,
        Traces(trace_url),
        Redaction(redact),
        title or "",
        None if allowed_hosts is None else valid_hosts(allowed_hosts),
        _scraper(storage) if metrics else None,
        dict(command_options or {}),
        ArchiveReader(storage, archives),
    )


async def render_saga(
    storage: IInspectionStorage,
    saga_id: UUID,
    *,
    redact: Redact | None = None,
    archives: Places = True,
) -> str:
    """Return the page of a saga as one HTML file that stands alone, to be kept or attached to a ticket.

    ``redact`` and ``archives`` are as for ``create_app``.

    Raises:
        SagaNotFoundError: No saga has this id.
    """
    asked = Asked((("history", "all"), ("context", "show")))
    try:
        view = await pages.saga(
            storage, str(saga_id), asked, Redaction(redact), options={}, archives=ArchiveReader(storage, archives)
        )
    except pages.UnknownIdError:
        raise SagaNotFoundError(saga_id) from None
    values = {"view": view, "asked": asked, "links": None, "title": "", "trace": None, "at": view.at}
    return render("saga.html", values | {"style": inline_style(), "policy": f"style-src 'sha256-{STYLE_HASH}'"})


@dataclass(frozen=True, slots=True)
class _Refusal(Exception):  # noqa: N818 - it carries an answer
    """What is said in place of a page."""

    status: HTTPStatus
    said: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _App:
    storage: IInspectionStorage
    traces: Traces
    redaction: Redaction
    title: str
    allowed_hosts: frozenset[str] | None
    scrape: Callable[[], Awaitable[Response]] | None
    options: Mapping[str, str]
    archives: ArchiveReader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            response = await self._answer(Request(scope))
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            if scope["method"] == "HEAD":
                response.body = b""
            await response(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["type"] == "lifespan":
            await _live(receive, send)

    async def _answer(self, request: Request) -> Response:
        path = own_path(request.scope)
        if path != "/" and _is_folder(request.scope):
            path += "/"
        try:
            return await self._page_for(request, path)(request, path)
        except pages.AmbiguousIdError as exc:
            values = {"prefix": exc.prefix, "page": exc.page, "at": exc.page.at}
            return self._render(path, Asked(()), "ambiguous.html", values, HTTPStatus.MULTIPLE_CHOICES)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is told by a page, and no traceback
            refusal = exc if isinstance(exc, _Refusal) else _refusal(exc)
            values = {"status": refusal.status, "said": refusal.said, "at": None}
            response = self._render(path, Asked(()), "error.html", values, refusal.status)
            response.headers.update(refusal.headers)
            return response

    def _page_for(self, request: Request, path: str) -> _Page:
        if self.allowed_hosts is not None and host_of(request.headers.get("host")) not in self.allowed_hosts:
            raise _Refusal(
                HTTPStatus.BAD_REQUEST, "This host isn't served here; saga-store web --allow-host names more."
            )
        found: dict[str, _Page] = {
            "/": self._attention if _is_folder(request.scope) else _to_the_folder,
            "/sagas": self._sagas,
            "/interventions": self._interventions,
            "/style.css": _style,
        }
        if self.scrape is not None:
            found["/metrics"] = self._metrics
        name = path if path == "/" else path.rstrip("/")
        page = found.get(name) or (self._saga if _A_SAGA.fullmatch(name) else None)
        if page is None:
            raise _Refusal(HTTPStatus.NOT_FOUND, "There is no such page.")
        if request.method not in {"GET", "HEAD"}:
            said = "These pages only read; what changes a saga is done by the command saga-store."
            raise _Refusal(HTTPStatus.METHOD_NOT_ALLOWED, said, {"Allow": "GET, HEAD"})
        return page

    async def _attention(self, request: Request, path: str) -> Response:
        asked = Asked.of("attention", _query_string(request))
        view = await pages.attention(self.storage, asked)
        return self._render(path, asked, "attention.html", {"view": view, "at": view.at})

    async def _sagas(self, request: Request, path: str) -> Response:
        asked = Asked.of("sagas", _query_string(request))
        try:
            view = await pages.sagas(self.storage, asked, self.redaction)
        except StorageUnavailableError as exc:
            raise _of_shard(self.storage, asked.get("id") or "", exc) from exc
        if view.only is not None:
            return RedirectResponse(Links.of(path, asked.judging).saga(view.only), HTTPStatus.SEE_OTHER)
        return self._render(path, asked, "sagas.html", {"view": view, "at": view.page.at})

    async def _saga(self, request: Request, path: str) -> Response:
        asked = Asked.of("saga", _query_string(request))
        given = path.removeprefix("/sagas/").rstrip("/")
        try:
            view = await pages.saga(
                self.storage, given, asked, self.redaction, options=self.options, archives=self.archives
            )
        except StorageUnavailableError as exc:
            raise _of_shard(self.storage, given, exc) from exc
        values = {"view": view, "at": view.at, "trace": self._trace(view)}
        return self._render(path, asked, "saga.html", values)

    async def _interventions(self, request: Request, path: str) -> Response:
        asked = Asked.of("interventions", _query_string(request))
        view = await pages.interventions(self.storage, asked)
        return self._render(path, asked, "interventions.html", {"view": view, "at": None})

    async def _metrics(self, request: Request, _path: str) -> Response:
        Asked.of("metrics", _query_string(request))
        assert self.scrape is not None  # noqa: S101 - see _page_at
        return await self.scrape()

    def _trace(self, view: pages.SagaView) -> str | None:
        try:
            return self.traces(view.saga)
        except Exception:
            _logger.exception("trace_url= failed, so a saga's page has no link to its trace")
            return None

    def _render(
        self, path: str, asked: Asked, template: str, values: Mapping[str, object], status: HTTPStatus = HTTPStatus.OK
    ) -> Response:
        page = {"asked": asked, "links": Links.of(path, asked.judging), "title": self.title, "style": None}
        return Response(render(template, page | dict(values)), status, media_type="text/html")


def own_path(scope: Scope) -> str:
    """Return the path below what the app is mounted on, without a slash at its end, which some hosts put there.

    Where a server puts the ``root_path`` that it was told of before each path, and a proxy has kept it, it comes twice.
    """
    root = str(scope.get("root_path", "")).rstrip("/")
    path = _below(str(scope["path"]), root)
    return path if _is_page(path) else _below(path, root)


def _below(path: str, root: str) -> str:
    below = path.removeprefix(root) if path == root or path.startswith(f"{root}/") else path
    return below.rstrip("/") or "/"


def _is_page(path: str) -> bool:
    return path in _PAGES or _A_SAGA.fullmatch(path) is not None


def _address(scope: Scope) -> str:
    """Return the path as the browser gave it, as far as that is known."""
    raw: bytes | None = scope.get("raw_path")
    return quote(scope["path"]) if raw is None else raw.decode("latin-1")


def _is_folder(scope: Scope) -> bool:
    """Whether the browser's address ends by a slash, so that links lead on from there."""
    return _address(scope).endswith("/")


async def _to_the_folder(request: Request, _path: str) -> Response:
    """Send whoever left out the last slash to where links lead on from."""
    name, query = _address(request.scope).rsplit("/", 1)[-1], _query_string(request)
    return RedirectResponse(f"./{name}/{'?' if query else ''}{query}")


async def _style(_request: Request, _path: str) -> Response:
    return Response(STYLE, media_type="text/css", headers={"Cache-Control": "public, max-age=31536000, immutable"})


def _query_string(request: Request) -> str:
    # Bytes that are no UTF-8 are somebody's letters, too, and no reason to fail.
    query: bytes = request.scope.get("query_string", b"")
    return query.decode("latin-1")


def _scraper(storage: IInspectionStorage) -> Callable[[], Awaitable[Response]]:
    from saga_store.telemetry import prometheus  # noqa: PLC0415 - of another extra

    collector = prometheus.SagaCollector(storage)

    async def scrape() -> Response:
        return Response(await collector.scrape(), headers={"Content-Type": prometheus.CONTENT_TYPE})

    return scrape


def _of_shard(storage: IInspectionStorage, given: str, exc: StorageUnavailableError) -> Exception:
    """Return what is said if a saga's shard can't be asked; of a storage that has no shards it is as ever."""
    try:
        whole = UUID(given)
    except ValueError:
        return exc
    if not isinstance(storage, ShardedSagaStorage) or exc.sqlstate in {_PERMISSION_DENIED, _QUERY_CANCELED}:
        return exc
    _logger.warning("a page couldn't be shown: %s", exc)
    said = f"Shard {storage.shard_of(whole)}, where this saga is, can't be asked now; the log says why."
    return _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, said, _SOON)


def _refusal(exc: Exception) -> _Refusal:
    """Return what is said of an error: what whoever looks can do about it, and nothing of the system's insides."""
    code = getattr(exc, "sqlstate", None)
    match exc:
        case pages.UnknownIdError():
            refusal = _Refusal(HTTPStatus.NOT_FOUND, f"No saga has an id that begins by {exc.args[0]:.60}.")
        case pages.MissingShardsError():
            said = (
                f"No saga that can be seen has an id that begins by {exc.prefix:.60}; {shards(exc.missing)} can't be "
                "asked now."
            )
            refusal = _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, said, _SOON)
        case SagaArchivedError():
            refusal = _Refusal(HTTPStatus.NOT_FOUND, f"{exc}.")
        case SagaNotFoundError():
            refusal = _Refusal(HTTPStatus.NOT_FOUND, "This saga isn't there any more.")
        case InvalidSagaDataError():
            refusal = _Refusal(HTTPStatus.BAD_REQUEST, f"{exc}.")
        case StorageUnavailableError() if code == _PERMISSION_DENIED:
            refusal = _Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, exc.reason)
        case StorageUnavailableError() if code == _QUERY_CANCELED:
            refusal = _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, exc.reason)
        case SchemaError() | SagaUnreadableError():
            refusal = _Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, str(exc))
        case SagaStoreError():
            _logger.warning("a page couldn't be shown: %s", exc)
            said = f"The database can't be asked now{f' (SQLSTATE {code})' if code else ''}; the log says why."
            refusal = _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, said, _SOON)
        case _:
            _logger.error("a page couldn't be shown", exc_info=exc)
            refusal = _Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "This page couldn't be made; the log says why.")
    return refusal


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
