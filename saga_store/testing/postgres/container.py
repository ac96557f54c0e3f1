"""PostgreSQL in a container, by testcontainers."""

import contextlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from saga_store.testing.postgres.server import PostgresServer, PostgresUnavailableError, external

OFFICIAL_IMAGE = "postgres:17-alpine"
FOLDER = "/throw-away"
# The data lies in memory and is thrown away: nothing in it has to survive a power cut.
SETTINGS = ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=200"]
SECONDS_TO_ANSWER = 15.0
DEFAULT_SOCKET = "npipe" if sys.platform == "win32" else "unix:///var/run/docker.sock"
OTHERWISE = "set SAGA_STORE_TEST_PG=embedded, which needs no Docker"


@contextlib.contextmanager
def docker(image: str | None = None) -> Iterator[PostgresServer]:
    """Start a container of ``image``, wait until its server answers, and remove it at the end.

    Raises:
        PostgresUnavailableError: at once without a daemon; otherwise no image, or a container that doesn't start.
    """
    try:  # heavy, and no part of the library's own dependencies
        from docker.errors import DockerException  # type: ignore[import-untyped]  # noqa: PLC0415
        from testcontainers.community.postgres import PostgresContainer  # noqa: PLC0415
        from testcontainers.core.config import testcontainers_config  # noqa: PLC0415
        from testcontainers.core.wait_strategies import LogMessageWaitStrategy  # noqa: PLC0415
    except ImportError as exc:
        raise PostgresUnavailableError(
            "testcontainers isn't installed", f"Run: pip install 'saga-store[testing]', or {OTHERWISE}."
        ) from exc

    image = image or os.environ.get("SAGA_STORE_TEST_PG_IMAGE") or OFFICIAL_IMAGE
    with contextlib.closing(_client()) as client:
        _require_image(client, image)
        if not client.images.list(testcontainers_config.ryuk_image):
            # testcontainers wouldn't start without its reaper's image. What a killed run leaves, the next one removes.
            testcontainers_config.ryuk_disabled = True
            _remove_orphans(client)
    if "TC_MAX_TRIES" not in os.environ:  # whose default is to wait for two minutes
        testcontainers_config.max_tries, testcontainers_config.sleep_time = 150, 0.2
    # A folder of our own: the image's has moved in PostgreSQL 18, and a mount at its old place is refused since.
    container = (
        PostgresContainer(image, username="saga", password=secrets.token_hex(16), dbname="saga", driver=None)
        .with_tmpfs_mount(FOLDER)
        .with_env("PGDATA", f"{FOLDER}/data")
        .with_command(["postgres", *(word for setting in SETTINGS for word in ("-c", setting))])
        # It also notices a container that has died, which testcontainers' own wait for psql doesn't.
        .waiting_for(LogMessageWaitStrategy("ready to accept connections"))
        .with_kwargs(labels={"saga-store.host": socket.gethostname(), "saga-store.pid": str(os.getpid())})
    )
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(container)
            server = stack.enter_context(answering(container.get_connection_url(), SECONDS_TO_ANSWER))
        except (DockerException, OSError, RuntimeError) as exc:
            raise PostgresUnavailableError(
                f"the container of {image} didn't start: {str(exc).strip()}",
                f"See what `docker run --rm -e POSTGRES_PASSWORD=x {image}` says, or {OTHERWISE}.",
            ) from exc
        yield replace(server, how=f"a container of {image}")


@contextlib.contextmanager
def answering(url: str, seconds: float) -> Iterator[PostgresServer]:
    """Yield the server at ``url``, waiting for it: "ready" is what one says, too, that only makes the database."""
    give_up = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        server = None
        while server is None:
            try:
                server = stack.enter_context(external(url))
            except PostgresUnavailableError:
                if time.monotonic() >= give_up:
                    raise
                time.sleep(0.1)
        yield server


def _client() -> Any:  # noqa: ANN401 - docker has no types
    from docker.errors import DockerException  # noqa: PLC0415
    from testcontainers.core.docker_client import DockerClient, get_docker_host  # noqa: PLC0415

    where = get_docker_host() or DEFAULT_SOCKET
    try:
        if where.startswith("unix://"):
            # docker's own failed attempt would leave a socket open, which fails tests that have warnings as errors.
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(where.removeprefix("unix://"))
        return DockerClient().client
    except (DockerException, OSError) as exc:
        raise PostgresUnavailableError(
            f"no Docker daemon answers at {where}",
            f"Start Docker, or point DOCKER_HOST at a daemon that runs, or {OTHERWISE}. ({exc})",
        ) from exc


def _require_image(client: Any, image: str) -> None:  # noqa: ANN401 - docker has no types
    from docker.errors import DockerException, ImageNotFound  # noqa: PLC0415

    try:
        client.images.get(image)
    except ImageNotFound:
        try:
            client.images.pull(image)
        except (DockerException, OSError) as exc:
            raise PostgresUnavailableError(
                f"the image {image} isn't here and can't be pulled",
                f"Run `docker pull {image}` where a registry can be reached, or name an image that is here in "
                f"SAGA_STORE_TEST_PG_IMAGE, or {OTHERWISE}. ({exc})",
            ) from exc


def _remove_orphans(client: Any) -> None:  # noqa: ANN401 - docker has no types
    host = f"saga-store.host={socket.gethostname()}"
    for container in client.containers.list(all=True, filters={"label": ["org.testcontainers=true", host]}):
        try:
            os.kill(int(container.labels["saga-store.pid"]), 0)
        except ProcessLookupError:
            container.remove(force=True, v=True)
