"""Refuses to migrate through a pooler that gives each transaction another session of the server."""

from sqlalchemy import Connection


def refuse_shared_sessions(connection: Connection) -> None:
    """Raise MigrationError if there is such a pooler in between."""
