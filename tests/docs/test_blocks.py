"""Every code block of every document is run here as it stands, or a table says where it is run, or why not."""

import ast
import asyncio
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FunctionType

import psycopg
import pytest
import yaml
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from saga_store import schema
from saga_store.cli import main
from saga_store.cli.exits import Exit
from tests.databases import Database, Databases
from tests.docs import given
from tests.pages import DOCUMENTS, EXAMPLE_URL, FENCE, ROOT, Block, blocks_of

BLOCKS = [block for page in DOCUMENTS for block in blocks_of(page)]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])

# By page and language, or by page and a block's first line: the test that runs it, or why nothing does.
LEFT_OUT = {
    ("docs/archive-format.md", "sql"): "tests/retention/test_analysts.py asks DuckDB the same of an archive of its own",
    (
        "docs/archive-format.md",
        "sh",
    ): "reads archives of somebody's; the format is held by tests/retention/test_format.py",
    (
        "docs/contract.md",
        "from datetime import timedelta",
    ): "for a storage that is slow: tests/test_kit.py has patience",
    ("docs/cqrs.md", "python"): "tests/test_cqrs.py, where there are sagas of python-cqrs",
    ("docs/cqrs.md", "pip install 'saga-store[cqrs,asyncpg]'     # or psycopg in place of asyncpg"): (
        "tests/houses/test_install.py installs extras, and migrates"
    ),
    ("docs/get-started.md", "sh"): "tests/docs/test_get_started.py types the page",
    ("docs/get-started.md", "python"): "tests/docs/test_get_started.py types the page",
    ("docs/how-to/celery.md", "python"): "tests/test_how_to.py, with a worker of Celery's",
    ("docs/how-to/fastapi.md", "python"): "tests/test_how_to.py serves it",
    ("docs/how-to/litestar.md", "python"): "tests/test_how_to.py serves it",
    ("docs/how-to/kubernetes.md", "python"): "defines a probe for an application; tests/test_schema.py awaits acheck",
    ("docs/how-to/plain-worker.md", "python"): "tests/test_how_to.py, to the end of its worker",
    (
        "docs/how-to/write-a-saga-by-hand.md",
        "python",
    ): "tests/test_how_to.py; the runner is the example's",
    ("docs/how-to/test-your-code.md", "python"): "tests/test_pytest_plugin.py types the page",
    ("docs/limits.md", "python"): "tests/test_pgbouncer.py, through PgBouncer",
    ("docs/limits.md", "ini"): "tests/test_pgbouncer.py, by PgBouncer",
    ("docs/migrations.md", "python"): "tests/test_migration_docs.py, and tests/test_hosts.py for the projects",
    ("docs/migrations.md", "ini"): "tests/test_migration_docs.py",
    ("docs/migrations.md", "sh"): "tests/test_migration_docs.py, in a folder and with a role of its own",
    ("docs/recovery.md", "import asyncio"): "runs until it is told to stop: test_the_worker_of_the_page below",
    ("docs/retention.md", "createdb drill"): "a server of somebody's; tests/retention/test_archive.py restores",
    ("docs/scale.md", "sh"): "tests/test_cli_shards.py, with a file of its own",
    ("docs/scale.md", "python"): "tests/test_shards.py, with several databases",
    ("docs/web.md", "from fastapi import FastAPI"): "tests/test_web.py mounts it",
    ("docs/web.md", "from litestar import Litestar, asgi"): "tests/test_web.py mounts it",
    ("docs/web.md", "saga-store web --url postgresql://...            # http://127.0.0.1:8765/"): (
        "serves until it is stopped: tests/test_web_command.py"
    ),
}
# Lines that go on until somebody stops them, or a saga is finished.
ENDLESS = {"--follow": "tests/test_terminal.py follows"}
# Pages whose commands are one or the other: each finds the shop as it was.
ALTERNATIVES = {"docs/inspection.md", "docs/operations.md"}
LANGUAGES = {"python", "sh", "sql", "console", "yaml", "toml", "ini", "json", "text"}

Typing = Callable[[str, Database], tuple[int, str]]


def key(block: Block) -> tuple[str, str] | None:
    """Return the entry of the table that leaves the block out."""
    keys = ((block.page, block.language), (block.page, block.first_line))
    return next((found for found in keys if found in LEFT_OUT), None)


def run_here(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and not key(block)]


def pages_with(language: str) -> dict[str, list[Block]]:
    blocks = [block for block in run_here(language) if not block.tests_something]
    return {page: [block for block in blocks if block.page == page] for page in dict.fromkeys(b.page for b in blocks)}


PYTHON = pages_with("python")
SHELL = pages_with("sh")


class TestTable:
    def test_every_block_has_a_language_that_is_known_here(self) -> None:
        assert {block.language for block in BLOCKS} <= LANGUAGES
        for page, document in DOCUMENTS.items():
            assert len(FENCE.findall(document)) == 2 * len(blocks_of(page)), page

    def test_nothing_stands_in_the_table_that_isnt_there_any_more(self) -> None:
        assert set(LEFT_OUT) == {found for found in map(key, BLOCKS) if found}

    def test_the_tests_that_it_names_are_there(self) -> None:
        for reason in (*LEFT_OUT.values(), *ENDLESS.values()):
            assert reason
            for test in re.findall(r"tests/[\w/]+\.py", reason):
                assert (ROOT / test).is_file(), test


@pytest.fixture
async def shop(database: Database) -> Database:
    await given.fill(database)
    return database


@pytest.fixture
def there(tmp_path: Path) -> dict[str, str]:
    return dict(given.elsewhere(tmp_path))


def placed(text: str, there: dict[str, str]) -> str:
    for said, real in there.items():
        text = text.replace(said, real)
    return text


@pytest.mark.parametrize("page", PYTHON)
async def test_python(page: str, shop: Database, there: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page run one after the other, print what their comments say, and leave nothing behind."""
    if "tenant_a" in DOCUMENTS[page]:
        schema.upgrade(shop.url("psycopg"), schema="tenant_a", create_schema=True)
    async with given.names(page, shop) as names:
        for block in PYTHON[page]:
            # The empty lines let a traceback name the page's own line.
            source = "\n" * (block.line - 1) + placed(block.on(shop), there)
            code = compile(source, page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = FunctionType(code, names)()
            if inspect.isawaitable(result):
                await result
            printed = capsys.readouterr().out.splitlines()
            assert printed == block.printed or not block.printed, str(block)
        await _leave(names)


async def _leave(names: dict[str, object]) -> None:
    for made in names.values():
        if isinstance(made, asyncio.Task):
            made.cancel()
        elif isinstance(made, AsyncEngine):
            assert isinstance(made.pool, QueuePool)
            assert made.pool.checkedout() == 0
            await made.dispose()
    if "collector" in names:
        names["REGISTRY"].unregister(names["collector"])  # type: ignore[attr-defined] # prometheus-client's


def test_the_worker_of_the_page(shop: Database, tmp_path: Path) -> None:
    """The program of docs/recovery.md sees the shop's forgotten order through, and ends well when it is told to."""
    block = next(block for block in blocks_of("docs/recovery.md") if block.first_line == "import asyncio")
    program = tmp_path / "worker.py"
    program.write_text(block.on(shop))
    with (
        psycopg.connect(shop.url(), autocommit=True) as connection,
        subprocess.Popen([sys.executable, program]) as worker,
    ):
        try:
            query = "SELECT status FROM saga_executions WHERE id = %s"
            while connection.execute(query, [given.IN_DOUBT]).fetchone() != ("COMPLETED",):
                assert worker.poll() is None
        finally:
            worker.terminate()
    assert worker.returncode == 0


@pytest.mark.parametrize("block", [block for block in run_here("python") if block.tests_something], ids=str)
def test_the_kit_runs_as_shown(block: Block, tmp_path: Path) -> None:
    """pytest collects the block as a module of a project that has no settings, and all of it passes."""
    (tmp_path / "test_mine.py").write_text(block.text)
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)


@pytest.fixture
def source(page: str, request: pytest.FixtureRequest) -> Database:
    """What the page's commands find: the shop, or for the page on adoption what python-cqrs has left."""
    found: Database = request.getfixturevalue("cqrs_database" if page == "docs/adoption.md" else "shop")
    return found


@pytest.fixture
def typing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Typing:
    """Types a line in an empty folder, on a database; returns its exit code, and what it has printed."""
    monkeypatch.chdir(tmp_path)

    def type_in(line: str, database: Database) -> tuple[int, str]:
        monkeypatch.setenv("DATABASE_URL", database.url())
        code = type_(EXAMPLE_URL.sub(lambda found: database.url(found[1]), line))
        return code, "".join(capfd.readouterr())

    return type_in


@pytest.mark.parametrize("page", SHELL)
def test_sh(page: str, source: Database, databases: Databases, there: dict[str, str], typing: Typing) -> None:
    """Every line is run; but of make only that it knows the target, and of pip that the extras exist."""
    for block in SHELL[page]:
        for line in placed(block.text, there).splitlines():
            if any(option in line for option in ENDLESS):
                continue
            with databases.clone(source) if page in ALTERNATIVES else nullcontext(source) as database:
                if "break-lease" in line:
                    given.hold(database)
                code, printed = typing(line, database)
                assert code in {Exit.DONE, Exit.ATTENTION}, f"{block}: {line}\n{printed}"


def type_(line: str) -> int:
    """Type a line, and return its exit code; our own command runs in this process, which takes a tenth of the time."""
    if line.startswith("pip install"):
        extras = set(re.findall(r"[\[,]([\w-]+)(?=[\],])", line))
        assert extras
        assert extras <= EXTRAS
        return Exit.DONE
    if line.startswith("export DATABASE_URL="):
        return Exit.DONE  # which the test has set
    if re.match(r"saga-store saga (retry|give-up|break-lease|settle) --", line):
        line += " --yes"  # of a plan, which a person would be asked about
    if line.startswith("saga-store ") and not re.search(r"[|<>;$]", line):
        return main(shlex.split(line, comments=True)[1:])
    settings = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    script = re.sub(r"^make\b", "make --dry-run", line)
    done = subprocess.run(
        ["sh", "-ec", script],  # noqa: S607 - whichever sh there is
        stdin=subprocess.DEVNULL,
        check=False,
        cwd=ROOT if re.match("make|alembic", line) else None,
        env=os.environ | settings,
    )
    return done.returncode


@pytest.mark.parametrize("block", run_here("console"), ids=str)
def test_console(block: Block) -> None:
    """A command prints what is shown below it."""
    command, _, shown = block.text.removeprefix("$ ").partition("\n")
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.stdout == shown
    assert bool(done.returncode) == shown.startswith("FAILED")


@pytest.mark.parametrize("block", [*run_here("yaml"), *run_here("toml"), *run_here("json")], ids=str)
def test_data(block: Block) -> None:
    """It can be read as what it says that it is."""
    match block.language:
        case "yaml":
            assert yaml.safe_load(block.text)
        case "toml":
            assert tomllib.loads(block.text)
        case _:
            assert json.loads(block.text)
