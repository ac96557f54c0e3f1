"""A statement, in the spellings of the drivers and with its tables in a schema; no I/O."""

import re
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.dialects.postgresql import asyncpg, psycopg

# Some stand in quotes, as texts to be cast to regclass.
_TABLES = re.compile(
    r"('?)\b(saga_executions|saga_logs|saga_archives|saga_shard|saga_store_version"
    r"|saga_store_make_stubs|saga_store_forget_stubs)\b"
)
_NAMED = re.compile(r"%\((\w+)\)s")
# More schemas than this are forgotten and spelled anew: each takes a few kilobytes.
_MOST_SCHEMAS = 1000


@dataclass(frozen=True, slots=True)
class Spelling:
    """What travels.

    Attributes:
        numbered: For asyncpg, with ``$1``; ``names`` says which parameter that is.
        named: For psycopg, with ``%(name)b``: in binary, so that no setting has a say in it.
        names: The parameters.
    """

    numbered: str
    named: str
    names: tuple[str, ...]


class Statement:
    """SQL with ``:names`` for parameters, whose tables are found along the search path unless a schema is named."""

    def __init__(self, sql: str) -> None:
        parsed = text(sql)
        numbered = parsed.compile(dialect=asyncpg.dialect())  # type: ignore[no-untyped-call] # SQLAlchemy leaves it so
        named = parsed.compile(dialect=psycopg.dialect())  # type: ignore[no-untyped-call] # likewise
        self._plain = Spelling(str(numbered), _NAMED.sub(r"%(\1)b", str(named)), tuple(numbered.positiontup or ()))
        self._spelled: dict[str, Spelling] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return self._plain.names

    def spelled(self, schema: str | None) -> Spelling:
        """Return what travels if the tables are in this schema; None: along the connection's search path."""
        if schema is None:
            return self._plain
        spelling = self._spelled.get(schema)
        if spelling is None:
            if len(self._spelled) >= _MOST_SCHEMAS:
                self._spelled.clear()
            spelling = self._spelled[schema] = self._in(schema)
        return spelling

    def _in(self, schema: str) -> Spelling:
        prefix = '"' + schema.replace('"', '""') + '".'

        def qualified(sql: str, prefix: str) -> str:
            in_text = prefix.replace("'", "''")
            return _TABLES.sub(lambda table: table[1] + (in_text if table[1] else prefix) + table[2], sql)

        # psycopg takes a percent sign for the beginning of a parameter, wherever it stands.
        numbered, named = (
            qualified(self._plain.numbered, prefix),
            qualified(self._plain.named, prefix.replace("%", "%%")),
        )
        return Spelling(numbered, named, self._plain.names)
