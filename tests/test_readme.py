"""The README: a door that stays one, and what it and the reference pages say of the code, held against that.

Its code blocks are run by tests/docs/test_blocks.py, as those of all documents are.
"""

import inspect
import re
import tomllib
from collections.abc import Iterable

import pytest

import saga_store
import saga_store.adoption
import saga_store.retention
from saga_store import SagaStoreError, schema
from saga_store.cli.exits import Exit
from saga_store.sqlalchemy import Base
from saga_store.telemetry.prometheus import SagaCollector
from tests.pages import DOCUMENTS, ROOT, blocks_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LONGEST = 250


def rows_of(page: str) -> list[str]:
    """Return the first cells of its tables' rows."""
    return re.findall(r"^\| `?([^|`]+?)`? \|", DOCUMENTS[page], re.MULTILINE)


class TestReadme:
    def test_it_is_a_door(self) -> None:
        assert len(DOCUMENTS["README.md"].splitlines()) <= LONGEST

    def test_its_two_commands(self) -> None:
        [commands] = [block.text for block in blocks_of("README.md") if block.section == "Try it"]
        assert commands.split() == ["make", "demo", "make", "test"]


class TestErrors:
    def test_every_error_has_a_row(self) -> None:
        modules = (saga_store, saga_store.adoption, saga_store.retention, schema)
        errors = {name for module in modules for name, kind in vars(module).items() if _is_error(kind)}
        rows = [row for row in rows_of("docs/reference/errors.md") if row.endswith("Error") and row != "Error"]
        assert len(rows) == len(set(rows))
        assert set(rows) == errors - {"SagaStoreError"}


class TestExitCodes:
    def test_every_one_has_a_row(self) -> None:
        rows = [int(row) for row in rows_of("docs/reference/exit-codes.md") if row.isdigit()]
        assert rows == [code.value for code in Exit]


class TestSchema:
    def test_every_table_is_named(self) -> None:
        tables = {*Base.metadata.tables, "saga_store_version"}
        assert tables <= set(rows_of("docs/reference/schema.md"))


class TestMetrics:
    def test_every_figure_has_a_row(self) -> None:
        """What a collector may export stands in the table, and nothing else does."""
        source = inspect.getsource(inspect.getmodule(SagaCollector) or SagaCollector)
        exported = {f"saga_store_{name}" for name in re.findall(r'"saga_store_(\w+)"', source)}
        named = set(re.findall(r"`(saga_store_\w+)", "\n".join(_table("docs/reference/metrics.md", "| Metric | |"))))
        assert {name.removesuffix("_total") for name in named} == {name.removesuffix("_total") for name in exported}


class TestVersions:
    def test_they_are_those_of_the_package(self) -> None:
        """The table of versions says what pyproject.toml asks for."""
        stated = dict(re.findall(r"^\| ([\w-]+) \| (.*) \|$", DOCUMENTS["docs/reference/versions.md"], re.MULTILINE))
        pythons = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
        assert stated.pop("Python") == ", ".join(pythons)
        assert stated.pop("PostgreSQL") == "14 and later"
        needed = _least_versions([*PROJECT["dependencies"], *_extras("asyncpg", "psycopg", "cqrs", "ops", "otel")])
        assert {name.lower(): said.split()[0] for name, said in stated.items()} == needed


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_target_of_make_that_is_named_exists(page: str) -> None:
    for target in re.findall(r"`make ([\w-]+)`", DOCUMENTS[page]):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def _table(page: str, head: str) -> Iterable[str]:
    return DOCUMENTS[page].partition(head)[2].partition("\n\n")[0].splitlines()


def _is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, SagaStoreError)


def _extras(*names: str) -> list[str]:
    return [requirement for name in names for requirement in PROJECT["optional-dependencies"][name]]


def _least_versions(requirements: Iterable[str]) -> dict[str, str]:
    found = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match}
