"""What a test server is, how it fails to be one, and the kind that somebody else runs."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass


class PostgresUnavailableError(RuntimeError):
    """Such a server can't be had here: ``reason`` says why, ``remedy`` what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason}. {self.remedy}"


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A server that runs for as long as the ``with`` block that yielded it.

    ``url`` is a plain ``postgresql://user:password@host:port/database`` whose user may create databases, ``version``
    the server's own ("18.4"), ``how`` the words that say which server this is and why.
    """

    url: str
    version: str
    how: str


def show_choice(choice: str) -> str:
    """Return a choice as it may be shown: of a URL, and of what was meant as one, any part may be a password."""
    return choice if re.fullmatch(r"\w+", choice) else "..."


@contextlib.contextmanager
def external(url: str) -> Iterator[PostgresServer]:
    """Yield the server at ``url``, once it has answered and said that the user may create databases."""
    try:
        import psycopg  # noqa: PLC0415 - an embedded server needs no driver
    except ImportError as exc:
        raise PostgresUnavailableError("psycopg isn't installed", "Run: pip install 'saga-store[psycopg]'") from exc

    from saga_store.schema.settings import MigrationError  # noqa: PLC0415 - as above
    from saga_store.schema.urls import Address  # noqa: PLC0415 - as above

    plain = re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", url)
    try:
        address = Address.read(plain)
    except MigrationError as exc:
        raise PostgresUnavailableError(str(exc), "Correct the URL.") from None
    try:
        with psycopg.connect(plain, connect_timeout=10) as connection:
            where = f"{connection.info.host}:{connection.info.port}"
            version = connection.info.parameter_status("server_version") or "unknown"
            asked = connection.execute("SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user")
            may_create = asked.fetchone()
    except psycopg.Error as exc:
        raise PostgresUnavailableError(
            f"no PostgreSQL answers at the given URL: {address.hide(str(exc))}", "Start it, or correct the URL."
        ) from None  # the driver's own text may show the password
    if may_create != (True,):
        raise PostgresUnavailableError(
            f"the user given for {where} may not create databases, and each test gets one of its own",
            "Run `ALTER ROLE ... CREATEDB` there, or give the URL of a user who may.",
        )
    yield PostgresServer(plain, version.split()[0], f"the server at {where}, given by its URL")
