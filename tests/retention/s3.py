"""An S3 over HTTP that fails, dawdles, hangs up or lies when it is told to: moto's server, behind faults of ours."""

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

_Answer = Iterable[bytes]


@dataclass
class S3:
    """A server, and what goes wrong with its next requests.

    Attributes:
        url: Its endpoint.
        refuses: Requests of these methods are answered by 403.
        is_busy: So many requests are answered by 503, before they work again.
        hangs_up: Requests of these methods lose their connection: without an answer, and having done nothing.
        hangs_up_after: The same, having done it.
        waits: Requests wait for it, if there is one.
    """

    url: str = ""
    refuses: set[str] = field(default_factory=set)
    is_busy: int = 0
    hangs_up: set[str] = field(default_factory=set)
    hangs_up_after: set[str] = field(default_factory=set)
    waits: threading.Event | None = None
    requests: list[str] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """What fsspec has to know to come here, and to give up soon."""
        config = {"retries": {"max_attempts": 2}, "connect_timeout": 2, "read_timeout": 2}
        return {"endpoint_url": self.url, "key": "somebody", "secret": "s3cr3t-of-the-bucket", "config_kwargs": config}

    def files(self) -> s3fs.S3FileSystem:
        return s3fs.S3FileSystem(skip_instance_cache=True, **self.options)

    def handle(self, app: Callable[..., _Answer], environ: dict[str, Any], start: Any) -> _Answer:  # noqa: ANN401 - WSGI's
        method = environ["REQUEST_METHOD"]
        self.requests.append(f"{method} {environ['PATH_INFO']}")
        if self.waits:
            self.waits.wait(30)
        if self.is_busy:
            self.is_busy -= 1
            return _error(method, start, "503 Service Unavailable", "SlowDown")
        if method in self.refuses:
            return _error(method, start, "403 Forbidden", "AccessDenied")
        if method in self.hangs_up:
            return _hang_up(environ)
        answer = app(environ, start)
        return _hang_up(environ) if method in self.hangs_up_after else answer


@contextmanager
def s3(bucket: str = "backup") -> Iterator[S3]:
    """Run one on a loopback port, with an empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    # Of s3fs's own, on top of botocore's: they would take a minute.
    retries, s3fs.S3FileSystem.retries = s3fs.S3FileSystem.retries, 1
    server_of_all = DomainDispatcherApplication(create_backend_app)
    state = S3()

    def app(environ: dict[str, Any], start: Any) -> _Answer:  # noqa: ANN401 - WSGI's
        return state.handle(server_of_all, environ, start)

    server = make_server("127.0.0.1", 0, app, threaded=True)
    server.daemon_threads = True  # type: ignore[attr-defined] # of its threaded kind
    state.url = f"http://127.0.0.1:{server.port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        state.files().mkdir(bucket)
        yield state
    finally:
        s3fs.S3FileSystem.retries = retries
        server.shutdown()
        server.server_close()
        thread.join(10)


def _error(method: str, start: Any, status: str, code: str) -> _Answer:  # noqa: ANN401 - WSGI's
    start(status, [("Content-Type", "application/xml")])
    return [] if method == "HEAD" else [f"<Error><Code>{code}</Code><Message>{status}</Message></Error>".encode()]


def _hang_up(environ: dict[str, Any]) -> _Answer:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError("as told")
