"""What Citus asks of statements and revisions, by its rules, held on their texts.

It refuses (0A000) functions that aren't immutable in a CASE or COALESCE of what writes, an ALTER TABLE of several
parts, and the renaming of constraints.
"""

import re
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise, product
from pathlib import Path
from pkgutil import iter_modules

import psycopg
import pytest

import saga_store.sqlalchemy
from saga_store import schema
from saga_store.inspection import INTERVENTION
from saga_store.sqlalchemy import inspection_sql
from saga_store.sqlalchemy.statement import Statement
from tests.test_repository import SAVES
from tests.test_sql import FOLDER

_KINDS = tuple(inspection_sql._KINDS)  # noqa: SLF001 - all that a view may ask for
_ASKED = frozenset(
    {*inspection_sql._ROW_CONDITIONS, *inspection_sql._HISTORY_CONDITIONS, "window", "after_id"}  # noqa: SLF001 - likewise
)


def statements() -> Iterator[tuple[str, str]]:
    """Give the text of each statement there is: what builders make, what modules hold, and what is written down."""
    for module in iter_modules(saga_store.sqlalchemy.__path__, f"{saga_store.sqlalchemy.__name__}."):
        for name, value in vars(import_module(module.name)).items():
            if isinstance(value, Statement):
                yield f"{module.name}.{name}", value.spelled(None).numbered
    for name, statement in SAVES.items():
        yield name, statement.spelled(None).numbered
    for asked, samples in product((frozenset[str](), _ASKED), (False, True)):
        for build in (inspection_sql.find, inspection_sql.count):
            yield f"{build.__name__} {len(asked)}", build(asked, _KINDS, samples=samples).spelled(None).numbered
    yield "interventions", inspection_sql.interventions(asks_who=True, goes_on=True).spelled(None).numbered
    for path in FOLDER.glob("*.sql"):
        yield path.name, path.read_text()


_TOKEN = re.compile(
    r"""--[^\n]* | /\*.*?\*/               # a comment
    | \$(\w*)\$.*?\$\1\$                   # a text in dollars
    | [eE]'(?:[^'\\]|''|\\.)*' | '(?:[^']|'')*'
    | "(?:[^"]|"")*"
    | %\(\w+\)b | [:$]\w+                  # a parameter
    | [A-Za-z_]\w* | \d+(?:\.\d+)? | \s+ | ::|.""",
    re.VERBOSE | re.DOTALL,
)


def tokens(sql: str) -> list[str]:
    """Return words in lower case, and signs; texts as '', and no comments."""
    found = (match[0] for match in _TOKEN.finditer(sql))
    plain = (token for token in found if token.strip() and not token.startswith(("--", "/*")))
    return ["''" if token.endswith(("'", "$")) else token.lower() for token in plain]


def conditionals(sql: str) -> Iterator[list[str]]:
    """Give what stands between CASE and END, and in the brackets of COALESCE, with what is nested in it."""
    words = tokens(sql)
    begun: list[tuple[str, int]] = []
    for position, word in enumerate(words):
        if word in {"case", "("}:
            begun.append((word, position))
        elif word in {"end", ")"}:
            opening, first = begun.pop()
            assert (opening, word) in {("case", "end"), ("(", ")")}, "a bracket and a CASE cross each other"
            if opening == "case" or words[first - 1] == "coalesce":
                yield words[first + 1 : position]
    assert not begun


CLOCKS = {
    *("now", "statement_timestamp", "transaction_timestamp", "clock_timestamp", "timeofday"),
    *("current_timestamp", "current_date", "current_time", "localtime", "localtimestamp"),
    *("interval", "make_interval", "age"),
}
STATEMENTS = dict(statements())
WRITING = {name: sql for name, sql in STATEMENTS.items() if {"insert", "update", "delete"} & set(tokens(sql))}
# A cast to one of these is immutable; one to json or to an array isn't.
PURE_TYPES = {"text", "integer", "bigint", "boolean", "uuid", "double"}
# Words that a bracket may follow.
_NO_FUNCTIONS = {
    *("coalesce", "greatest", "least", "cast", "in", "any", "exists"),
    *("and", "or", "not", "when", "then", "else"),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_no_clock_stands_in_a_case_or_coalesce(name: str) -> None:
    """It is a column of a FROM item, also in what only reads."""
    for words in conditionals(STATEMENTS[name]):
        assert not CLOCKS & set(words), " ".join(words)


@pytest.mark.parametrize("name", WRITING)
def test_nor_does_a_cast_that_is_not_immutable(name: str) -> None:
    """As one of text to json is: reading json is stable only."""
    for words in conditionals(WRITING[name]):
        for before, word, after in zip(words, words[1:], words[2:], strict=False):
            assert word != "as" or before == "null" or (after in PURE_TYPES and "[" not in words), " ".join(words)


def test_nor_does_a_function_that_is_not_immutable(admin: psycopg.Connection) -> None:
    """By the catalog: whatever is called in a CASE or COALESCE of what writes."""
    called = {
        word
        for sql in WRITING.values()
        for words in conditionals(sql)
        for word, following in pairwise(words)
        if following == "(" and word.isidentifier()
    } - _NO_FUNCTIONS
    query = "SELECT proname, every(provolatile = 'i') FROM pg_proc WHERE proname = ANY (%s) GROUP BY proname"
    assert dict(admin.execute(query, [list(called)]).fetchall()) == dict.fromkeys(called, True)
    assert called


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("SELECT CASE WHEN a THEN now() ELSE b END", True),
        ("SELECT CASE WHEN a THEN 'END' ELSE (CASE b WHEN 1 THEN 2 END) + now() END", True),
        ("SELECT coalesce (a, (SELECT Statement_Timestamp()))", True),
        ("SELECT COALESCE(a, b + make_interval(secs => 1)), now()", True),
        ("SELECT COALESCE(a, b), now(), CASE WHEN c THEN 'now()' END -- CASE now()", False),
        ("SELECT greatest(now(), CASE WHEN a THEN b END) /* CASE now() END */", False),
    ],
)
def test_the_test_tells_them_apart(sql: str, found: bool) -> None:  # noqa: FBT001 - a column of the table above
    assert any(CLOCKS & set(words) for words in conditionals(sql)) is found


# What Citus passes on to shards, one in each ALTER TABLE.
ALTERATIONS = {
    *("ADD COLUMN", "DROP COLUMN", "ADD CONSTRAINT", "DROP CONSTRAINT", "VALIDATE CONSTRAINT"),
    *("SET (", "RESET (", "ALTER COLUMN"),
}
REVISIONS = ["base", *(revision.revision for revision in schema.history())]
# Those of released revisions run only where an application's naming convention has changed a name, which none does
# in a schema that is distributed: it is made by `saga-store upgrade`.
RENAMING = {"saga_store_0004"}


def alterations(script: str) -> Iterator[list[str]]:
    """Give the parts of each ALTER TABLE, also of those in the body of a DO and in texts that it executes."""
    for found in re.finditer(r"\bALTER TABLE ([^;]+);", script):
        depth, parts = 0, [""]
        for sign in found[1]:
            depth += {"(": 1, ")": -1}.get(sign, 0)
            if sign == "," and not depth:
                parts.append("")
            else:
                parts[-1] += sign
        yield [part.strip() for part in parts]


@pytest.mark.parametrize(("start", "end"), [*pairwise(REVISIONS), *((up, down) for down, up in pairwise(REVISIONS))])
def test_a_revision_alters_one_thing_at_a_time(start: str, end: str) -> None:
    """And only what can be altered in a schema that is distributed."""
    script = schema.sql(start, end)
    allowed = {*ALTERATIONS, *({"RENAME CONSTRAINT"} if end in RENAMING else ())}
    for parts in alterations(script):
        [alteration] = parts
        kind = re.search(r"\b[A-Z]+ (?:[A-Z]+|\()", alteration)
        assert kind, alteration
        assert kind[0] in allowed
    assert not re.search(r"\b(CREATE|ALTER|ENABLE|DISABLE) TRIGGER\b", script)


def test_the_test_finds_several_parts() -> None:
    script = "ALTER TABLE a DROP CONSTRAINT IF EXISTS b, ADD CONSTRAINT b CHECK (c IN (1, 2)) NOT VALID;"
    assert [len(parts) for parts in alterations(script)] == [2]


def test_written_down_are_statements_of_all_verbs() -> None:
    """So that nothing above holds because there was nothing to look at."""
    read = {word for sql in STATEMENTS.values() for word in tokens(sql)}
    assert {"insert", "update", "select", "case", "coalesce", "statement_timestamp"} <= read
    assert len(list(Path(FOLDER).glob("*.sql"))) <= len(STATEMENTS)
    assert INTERVENTION in STATEMENTS["interventions"]
