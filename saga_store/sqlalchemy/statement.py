"""A statement, in the spellings of SQLAlchemy and of the drivers; no I/O."""

from sqlalchemy import text
from sqlalchemy.dialects.postgresql import asyncpg, psycopg


class Statement:
    """SQL with ``:names`` for parameters, spelled for SQLAlchemy (``text``) and for each driver.

    Attributes:
        text: For SQLAlchemy.
        numbered: For asyncpg, with ``$1``; ``names`` says which parameter that is.
        named: For psycopg, with ``%(name)s``.
    """

    def __init__(self, sql: str) -> None:
        self.text = text(sql)
        numbered = self.text.compile(dialect=asyncpg.dialect())  # type: ignore[no-untyped-call] # SQLAlchemy leaves it so
        self.numbered = str(numbered)
        self.names = tuple(numbered.positiontup or ())
        self.named = str(self.text.compile(dialect=psycopg.dialect()))  # type: ignore[no-untyped-call] # likewise
