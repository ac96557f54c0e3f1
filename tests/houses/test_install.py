"""The way in: README's lines and the pages' by the letter, in all kinds of installs, in the checkout and elsewhere."""

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from saga_store import schema
from saga_store.schema import State
from tests.databases import Database
from tests.environments import copy_checkout, make_environment, run_in
from tests.pages import DOCUMENTS, blocks_of
from tests.wheel import ROOT, Environment

# What README says to type, from its extras to the environment; each kind of install with another of them.
LINES = re.findall(r"^pip install '\.\[([\w,]+)\]'$", DOCUMENTS["README.md"], re.MULTILINE)
# The pages whose code needs no more than that.
PAGES = [
    "README.md",
    "docs/concepts/storage.md",
    "docs/concepts/checkpoints.md",
    "docs/concepts/leases.md",
    "docs/concepts/contexts.md",
    "docs/how-to/business-rows.md",
    "docs/reference/errors.md",
]
KINDS = {"plain": ["psycopg"], "sdist": ["asyncpg"], "editable": ["asyncpg", "psycopg"]}

# Runs blocks one after the other, in the environment's own Python, and says what each has printed.
RUNNER = """
import ast, asyncio, contextlib, inspect, io, json, sys, types

async def main():
    said = []
    for page in json.load(sys.stdin):
        names = {"__name__": "page"}
        for block in page:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                code = compile(block, "page", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                result = types.FunctionType(code, names)()
                if inspect.isawaitable(result):
                    await result
            said.append(printed.getvalue().splitlines())
        if "engine" in names:
            await names["engine"].dispose()
    print(json.dumps(said))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("house") / "saga-store")


@pytest.fixture(scope="module", params=KINDS)
def environment(
    request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    folder = tmp_path_factory.mktemp("environment") / "venv"
    return make_environment(folder, KINDS[request.param], request.param, checkout)


@pytest.fixture(scope="module")
def by_readme(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment by README's own lines, all of them typed, and what the kit asks for."""
    extras = ["testing", *(extra for line in LINES for extra in line.split(","))]
    return make_environment(tmp_path_factory.mktemp("readme") / "venv", extras, "plain", checkout)


class TestEntryPoints:
    @pytest.mark.parametrize(
        "command",
        [
            "saga-store upgrade",
            "python -m saga_store upgrade",
            "alembic upgrade head",
            "python -m alembic upgrade head",
            "cd / && saga-store upgrade",
            "cd / && python -m saga_store upgrade",
            "cd / && alembic -c $OLDPWD/alembic.ini upgrade head",
        ],
    )
    def test_all_do_the_same(
        self, environment: Environment, checkout: Path, empty_database: Database, command: str
    ) -> None:
        """In the checkout and elsewhere, whatever was installed in whichever way."""
        done = run_in(environment, command, checkout, empty_database.url())
        assert done.returncode == 0, done.stderr
        assert schema.check(empty_database.url()).state is State.CURRENT

    def test_the_library(self, environment: Environment, checkout: Path, tmp_path: Path) -> None:
        """The migrations are importable, and are those beside the package that is imported."""
        program = "import saga_store as s, saga_store.migrations.online as o; print(o.__file__); print(s.__file__)"
        for folder in (checkout, tmp_path):
            done = run_in(environment, f"python -c '{program}'", folder, "")
            assert done.returncode == 0, done.stderr
            migrations, package = map(Path, done.stdout.split())
            assert migrations.parents[1] in {package.parents[1], package.parent}


class TestReadme:
    def test_its_lines_are_found(self) -> None:
        assert {"asyncpg", "psycopg"} <= set(LINES)
        assert len(LINES) == len(re.findall("^pip install", DOCUMENTS["README.md"], re.MULTILINE))

    @pytest.mark.parametrize(
        ("page", "section"), [("README.md", "Install"), ("docs/migrations.md", "In a deploy pipeline")]
    )
    def test_its_commands(
        self, by_readme: Environment, checkout: Path, empty_database: Database, page: str, section: str
    ) -> None:
        """In the checkout, as README says, and each with the newcomer's URL replaced by the test's."""
        script = "\n".join(
            line
            for block in blocks_of(page)
            if block.section == section and block.language == "sh"
            for line in block.on(empty_database).splitlines()
            if not line.startswith("pip install")
        )
        done = run_in(by_readme, script, checkout, "")
        assert done.returncode == 0, done.stderr
        assert schema.check(empty_database.url()).state is State.CURRENT

    def test_its_code(self, by_readme: Environment, database: Database, tmp_path: Path) -> None:
        """Every example runs there, and prints what its comments say; nothing that README doesn't install is needed."""
        program = tmp_path / "runner.py"
        program.write_text(RUNNER)
        pages = [[block for block in blocks_of(page) if block.language == "python"] for page in PAGES]
        (tmp_path / "blocks.json").write_text(json.dumps([[block.on(database) for block in page] for page in pages]))
        done = run_in(by_readme, f"python {program} < {tmp_path / 'blocks.json'}", tmp_path, "")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [block.printed for page in pages for block in page]

    def test_its_contract(self, by_readme: Environment, tmp_path: Path) -> None:
        """The kit runs with what the extra ``testing`` brings."""
        block = next(block for block in blocks_of("docs/contract.md") if block.tests_something)
        (tmp_path / "test_mine.py").write_text(block.text)
        done = run_in(by_readme, "python -m pytest -q -p no:cacheprovider -k State", tmp_path, "")
        assert done.returncode == 0, done.stdout + done.stderr

    def test_what_is_missing_is_named(self, environment: Environment, tmp_path: Path) -> None:
        """Without a driver, or python-cqrs, one line says what to install."""
        done = run_in(environment, "python -c 'import saga_store.cqrs'", tmp_path, "")
        assert done.stderr.splitlines()[-1].endswith("pip install saga-store[cqrs]")
        for driver in {"psycopg", "asyncpg"} - {found.stem for found in environment.packages.iterdir()}:
            done = run_in(environment, "saga-store check", tmp_path, f"postgresql+{driver}://h/d")
            assert done.returncode == 1
            assert done.stderr == (
                f"saga-store: the driver {driver} isn't installed: pip install saga-store[{driver}]\n"
            )


# Libraries that are imported by another name than they are installed by.
_IMPORTED_AS = {"python_cqrs": "cqrs", "pyyaml": "yaml", "opentelemetry_api": "opentelemetry"}


def test_what_is_imported_is_declared() -> None:
    """Every library that the package, the tests, the examples or the benchmarks import is asked for by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    names = {re.split(r"[\[<>=]", line)[0].lower().replace("-", "_") for line in lines}
    declared = names | {_IMPORTED_AS.get(name, name.removesuffix("_cli")) for name in names}
    ours = {"saga_store", "tests", "examples", "benchmarks", "migrations", "website", "shop"}
    found = {
        name.partition(".")[0]
        for folder in ("saga_store", "tests", "examples", "benchmarks", "migrations", "website")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for name in _imported(node)
    }
    assert found - declared - ours - set(sys.stdlib_module_names) == set()


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
