"""docs/migrations.md: its commands are run, its code is that of the examples, and its tables are complete."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from saga_store import schema
from tests.databases import Database
from tests.pages import DOCUMENTS, EXAMPLE_URL, FENCE, ROOT, Block, blocks_of
from tests.programs import client_programs

PAGE = "docs/migrations.md"
DOCUMENT = DOCUMENTS[PAGE]
BLOCKS = blocks_of(PAGE)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
EXAMPLES = {
    path: path.read_text()
    for pattern in ("*.py", "*.ini")
    for project in (ROOT / "examples").glob("host_*")
    for path in sorted(project.rglob(pattern))
}


def in_language(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def run(script: str, database: Database, folder: Path) -> None:
    """Run a script as in a shell where the environment with the package is active, and PostgreSQL's programs are."""
    programs = [str(Path(sys.executable).parent), str(client_programs()), os.environ["PATH"]]
    settings = {"PATH": os.pathsep.join(programs), "DATABASE_URL": database.url()}
    done = subprocess.run(
        ["sh", "-ec", script],  # noqa: S607 - whichever sh there is
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def is_part_of(block: str, text: str) -> bool:
    """Whether the block's lines stand in the text, in their order; others may stand in between."""
    lines = iter(text.splitlines())
    return all(line in lines for line in block.splitlines() if line)


@pytest.fixture
def role(database: Database) -> Iterator[str]:
    """A name for the application's role, which is gone afterwards."""
    name = f"saga_test_{uuid4().hex[:8]}"
    yield name
    with psycopg.connect(database.url(), autocommit=True) as connection:
        connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


class TestBlocks:
    def test_every_block_is_in_a_language_that_is_tested_here(self) -> None:
        assert {block.language for block in BLOCKS} == {"sh", "yaml", "sql", "python", "ini", "console"}
        assert len(FENCE.findall(DOCUMENT)) == 2 * len(BLOCKS)

    def test_the_commands_of_a_pipeline(self, empty_database: Database, tmp_path: Path) -> None:
        """They take a database from nothing to what this release needs."""
        section = [block for block in in_language("sh") if block.section == "In a deploy pipeline"]
        script = "\n".join(EXAMPLE_URL.sub(empty_database.url(), block.text) for block in section)
        run(script, empty_database, tmp_path)
        assert schema.check(empty_database.url()).state is schema.State.CURRENT

    def test_the_commands_of_a_dba(self, empty_database: Database, tmp_path: Path, role: str) -> None:
        """The printed SQL leads to the same tables, and the role that it makes may write to them."""
        section = [block for block in in_language("sh") if block.section == "For a DBA"]
        script = "\n".join(block.text for block in section).replace("shop_app", role)
        run(script, empty_database, tmp_path)
        with psycopg.connect(empty_database.url(), autocommit=True) as connection:
            allowed = connection.execute("SELECT has_table_privilege(%s, 'saga_logs', 'INSERT')", [role]).fetchone()
            connection.execute(f"DROP OWNED BY {role}".encode())
        assert allowed == (True,)

    def test_the_job(self, empty_database: Database, tmp_path: Path) -> None:
        """Its steps are run; but of pip only that the extras exist."""
        (job,) = in_language("yaml")
        steps = re.findall(r"^ +- run: (.*)$", job.text, re.MULTILINE)
        install, *others = steps
        assert set(re.findall(r"[\[,](\w+)(?=[\],])", install)) <= set(EXTRAS)
        run("\n".join(others), empty_database, tmp_path)
        assert schema.check(empty_database.url()).state is schema.State.CURRENT

    @pytest.mark.parametrize("block", in_language("sql"), ids=str)
    def test_sql(self, block: Block, database: Database) -> None:
        with psycopg.connect(database.url()) as connection:
            assert connection.execute(block.text.encode()).fetchall()

    @pytest.mark.parametrize("block", [*in_language("python"), *in_language("ini")], ids=str)
    def test_code_is_that_of_the_examples(self, block: Block) -> None:
        """They are run from the wheel, in tests/test_hosts.py."""
        assert [path for path, text in EXAMPLES.items() if is_part_of(block.text, text)]


class TestClaims:
    def test_every_revision_says_what_it_locks(self) -> None:
        table = DOCUMENT.partition("| Revision | Statement | Lock |")[2].partition("\n\n")[0]
        assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [found.revision for found in schema.history()]
