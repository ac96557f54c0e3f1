"""The documentation: every code block of the README is executed, and what documents refer to exists."""

import ast
import asyncio
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

import saga_store
from saga_store import Checkpoint, LogStep, SagaStatus, SagaStepStatus, SagaStoreError
from saga_store.sqlalchemy import Base, SqlAlchemySagaStorage
from tests.connections import engine_on, until_blocked
from tests.databases import Database

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

FENCED = re.compile(r"^```(.*)\n((?:(?!```).*\n)*)```$", re.MULTILINE)
EXAMPLE_URL = re.compile(r"postgresql(?:\+(\w+))?://user:password@localhost:5432/shop")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A code block: where it stands, its language, and its text."""

    section: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.section}, line {self.line}"

    @property
    def tests_something(self) -> bool:
        return self.language == "python" and "class Test" in self.text

    def on(self, database: Database) -> str:
        """Return the text with the test's database in place of the example's."""
        return EXAMPLE_URL.sub(lambda found: database.url(found[1]), self.text)

    @property
    def printed(self) -> list[str]:
        """What the comments say that the block prints: behind each ``print(...)``, or in the lines below it."""
        lines = iter(self.text.splitlines())
        said = []
        for line in lines:
            if "print(" in line and "  # " in line:
                said.append(line.partition("  # ")[2])
            elif "print(" in line:
                for below in lines:
                    if not below.strip().startswith("# "):
                        break
                    said.append(below.strip().removeprefix("# "))
        return said


def blocks_of(document: str) -> list[Block]:
    blocks = []
    for found in FENCED.finditer(document):
        before = document[: found.start()]
        section = re.findall(r"^## (.*)$", before, re.MULTILINE)[-1]
        blocks.append(Block(section, before.count("\n") + 2, found[1], found[2]))
    return blocks


BLOCKS = blocks_of(README)


def in_language(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


EXAMPLES = {
    section: [block for block in in_language("python") if block.section == section and not block.tests_something]
    for section in dict.fromkeys(block.section for block in in_language("python"))
}


def shell(script: str) -> "subprocess.CompletedProcess[str]":
    """Run a script in the project's root, as in a shell where its virtual environment is active."""
    environment = {key: value for key, value in os.environ.items() if key != "DATABASE_URL"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)  # noqa: S607 - whichever sh there is


class TestBlocks:
    def test_every_block_is_in_a_language_that_is_executed_here(self) -> None:
        assert {block.language for block in BLOCKS} == {"python", "sql", "sh", "console"}
        assert len(re.findall("^ *```", README, re.MULTILINE)) == 2 * len(BLOCKS)

    @pytest.mark.parametrize("section", EXAMPLES)
    async def test_python(self, section: str, database: Database, capsys: pytest.CaptureFixture[str]) -> None:
        """The blocks of a section run one after the other, print what their comments say, and leave nothing behind."""
        names: dict[str, object] = {"__name__": "readme"}
        for block in EXAMPLES[section]:
            # The empty lines let a traceback name the README's own line.
            source = "\n" * (block.line - 1) + block.on(database)
            code = compile(source, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = FunctionType(code, names)()
            if inspect.isawaitable(result):
                await result
            assert capsys.readouterr().out.splitlines() == block.printed, str(block)
        for engine in names.values():
            if isinstance(engine, AsyncEngine):
                assert isinstance(engine.pool, QueuePool)
                assert engine.pool.checkedout() == 0
                await engine.dispose()

    @pytest.mark.parametrize("block", [block for block in BLOCKS if block.tests_something], ids=str)
    def test_the_kit_runs_as_shown(self, block: Block, tmp_path: Path) -> None:
        """pytest collects the block as a module of a project that has no settings, and all of it passes."""
        (tmp_path / "test_mine.py").write_text(block.text)
        command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"^\d{2,} passed", done.stdout, re.MULTILINE)

    @pytest.mark.parametrize("block", in_language("sh"), ids=str)
    def test_sh(self, block: Block, empty_database: Database) -> None:
        """Everything is run; but of make only that it knows the target, and of pip that the extras exist."""
        script = []
        for line in block.on(empty_database).splitlines():
            if line.startswith("pip install"):
                extras = re.findall(r"[\[,]([\w-]+)(?=[\],])", line)
                assert extras
                assert set(extras) <= set(PROJECT["optional-dependencies"])
            else:
                script.append(re.sub(r"^make\b", "make --dry-run", line))
        done = shell("\n".join(script))
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.parametrize("block", in_language("console"), ids=str)
    def test_console(self, block: Block) -> None:
        """A command prints what is shown below it."""
        command, _, shown = block.text.removeprefix("$ ").partition("\n")
        done = shell(command)
        assert done.stdout == shown
        assert bool(done.returncode) == shown.startswith("FAILED")


STUCK = UUID("00000000-0000-0000-0000-000000000001")


@dataclass(frozen=True)
class Trouble:
    """A database where something is wrong."""

    connection: psycopg.Connection
    forgotten: int


class TestQueries:
    """The queries for psql, in a database where there is something to find."""

    @pytest.fixture
    async def trouble(self, database: Database) -> AsyncIterator[Trouble]:
        """A saga whose worker died an hour ago among others that are well, and a transaction that was forgotten."""
        step = LogStep("TakePayment", "act", SagaStepStatus.STARTED)
        done = LogStep("TakePayment", "act", SagaStepStatus.COMPLETED)
        async with engine_on(database.url("asyncpg")) as engine:
            storage = SqlAlchemySagaStorage(engine)
            await storage.save(Checkpoint(STUCK, name="order", status=SagaStatus.RUNNING, steps=[step]))
            for number, status in enumerate(SagaStatus, start=2):
                await storage.save(Checkpoint(UUID(int=number), name="order", status=status, steps=[step, done]))
        update = "UPDATE saga_executions SET name = 'refund' WHERE id = %s"
        with psycopg.connect(database.url()) as forgotten, psycopg.connect(database.url(), autocommit=True) as mine:
            mine.execute("UPDATE saga_executions SET updated_at = now() - interval '1 hour' WHERE id = %s", [STUCK])
            mine.execute("UPDATE saga_logs SET created_at = now() - interval '1 hour' WHERE saga_id = %s", [STUCK])
            forgotten.execute(update, [STUCK])
            async with await psycopg.AsyncConnection.connect(database.url(), autocommit=True) as waiter:
                waiting = asyncio.create_task(waiter.execute(update, [STUCK]))
                await until_blocked(database)
                yield Trouble(mine, forgotten.info.backend_pid)
                forgotten.rollback()
                await waiting

    @pytest.mark.parametrize("block", in_language("sql"), ids=str)
    def test_finds_what_is_wrong_and_nothing_else(self, block: Block, trouble: Trouble) -> None:
        rows = trouble.connection.execute(block.text.encode()).fetchall()
        assert [row[0] for row in rows] in ([STUCK], [trouble.forgotten])

    def test_finished_sagas_arent_read(self, trouble: Trouble) -> None:
        """The query for stuck sagas can use the partial index, which doesn't hold the finished ones."""
        query = next(block.text for block in in_language("sql") if "silent_for" in block.text)
        trouble.connection.execute("SET enable_seqscan = off")
        plan = trouble.connection.execute(f"EXPLAIN {query}".encode()).fetchall()
        assert "ix_saga_executions_recovery" in str(plan)


class TestClaims:
    """What the README says of the code, held against it."""

    def test_every_error_has_a_row(self) -> None:
        errors = {name for name, kind in vars(saga_store).items() if _is_error(kind)}
        assert set(re.findall(r"^\| `(\w+Error)` \|", README, re.MULTILINE)) == errors - {"SagaStoreError"}

    def test_every_table_and_index_is_named(self) -> None:
        for table in Base.metadata.tables.values():
            for name in (table.name, table.primary_key.name, *_index_names(table)):
                assert f"`{name}`" in README

    def test_versions_are_those_of_the_package(self) -> None:
        """The table of versions says what pyproject.toml asks for."""
        stated = dict(re.findall(r"^\| ([\w-]+) \| (.*) \|$", README.partition("## Versions")[2], re.MULTILINE))
        pythons = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
        assert stated.pop("Python") == ", ".join(pythons)
        assert stated.pop("PostgreSQL") == "14 and later"
        needed = _least_versions([*PROJECT["dependencies"], *_extras("asyncpg", "psycopg", "cqrs", "ops", "otel")])
        assert {name.lower(): said.split()[0] for name, said in stated.items()} == needed


def _is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, SagaStoreError)


def _index_names(table: object) -> Iterable[str]:
    assert isinstance(table, Table)
    return [str(index.name) for index in table.indexes]


def _extras(*names: str) -> list[str]:
    return [requirement for name in names for requirement in PROJECT["optional-dependencies"][name]]


def _least_versions(requirements: Iterable[str]) -> dict[str, str]:
    found = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match}


class TestDocuments:
    """All documents, the README and docs/ among them."""

    @pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
    def test_every_relative_link_leads_somewhere(self, document: Path) -> None:
        links = [link.partition("#")[0] for link in LINK.findall(document.read_text()) if "://" not in link]
        missing = [link for link in links if not (document.parent / link).exists()]
        assert not missing

    @pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
    def test_every_target_of_make_that_is_named_exists(self, document: Path) -> None:
        for target in re.findall(r"`make ([\w-]+)`", document.read_text()):
            done = shell(f"make --dry-run {target}")
            assert done.returncode == 0, done.stderr
