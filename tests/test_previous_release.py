"""Deployments migrate first: what was released before keeps its contract, its own, on the newest schema."""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import pytest

from saga_store.sqlalchemy.tables import REVISION
from saga_store.testing.postgres import PostgresServer
from tests.databases import Database, Databases
from tests.extent import WHOLE

ROOT = Path(__file__).parent.parent
RELEASES = tomllib.loads((ROOT / "tests" / "releases.toml").read_text())

# Below the release's own tests: its template is a database that today's migrations made. Its contract needs no empty
# one for each test.
CONFTEST = """
import os
from pathlib import Path

import pytest
from sqlalchemy import make_url

import saga_store
from tests.databases import Database

assert Path(saga_store.__file__).is_relative_to(Path.cwd()), "not the release, but what is installed here"


@pytest.fixture(scope="session")
def template():
    return Database(make_url(os.environ["MIGRATED_DATABASE"]))


@pytest.fixture(scope="session")
def database(databases, template):
    with databases.clone(template) as database:
        yield database
"""
CONTRACT = "from tests.test_contract import TestPostgreSQL, TestPostgreSQLTransaction\n"
# With one bind for each driver. What is refused before any SQL, and contexts of every kind, don't depend on the tables.
SHORT = "TestPostgreSQL and not sessionmaker and not refused and not bad and not round_trip and not Transaction"


def git(*arguments: str) -> "subprocess.CompletedProcess[bytes]":
    # Only reading, so it doesn't matter who owns the checkout.
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, check=False)


@pytest.fixture
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The files of a release; skipped where the history isn't to be had, which is said."""
    commit = RELEASES[request.param]
    if shutil.which("git") is None or git("rev-parse", "--git-dir").returncode:
        pytest.skip("needs a clone with its history, and git to read it")
    if git("cat-file", "-e", f"{commit}^{{commit}}").returncode:
        pytest.skip(f"commit {commit} isn't in this clone: if it is a shallow one, git fetch --unshallow")
    archive = git("archive", "--format=zip", commit, "saga_store", "tests", "pyproject.toml")
    assert archive.returncode == 0, archive.stderr.decode()
    with ZipFile(BytesIO(archive.stdout)) as files:
        files.extractall(tmp_path)
    return tmp_path


@pytest.fixture
def migrated(databases: Databases, template: Database) -> Iterator[Database]:
    """The newest schema in a database of its own, which nobody connects to, so that it can be copied."""
    with databases.clone(template) as database:
        yield database


class TestPreviousRelease:
    @pytest.mark.parametrize("release", RELEASES, indirect=True)
    def test_keeps_its_contract_on_the_newest_schema(
        self, release: Path, migrated: Database, server: PostgresServer
    ) -> None:
        """The release's package passes the release's own tests on a database that today's migrations made."""
        folder = release / "tests" / "newest_schema"
        folder.mkdir()
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "test_newest_schema.py").write_text(CONTRACT)
        selection = [] if WHOLE else ["-k", SHORT]
        settings = {
            "PYTHONPATH": str(release),
            "SAGA_STORE_TEST_PG": server.url,
            "MIGRATED_DATABASE": migrated.url(),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection, str(folder)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=release, env=os.environ | settings
        )
        assert done.returncode == 0, done.stdout + done.stderr


class TestReleases:
    def test_every_one_needs_a_revision_that_is_no_longer_the_newest(self) -> None:
        """The first revision is among them: packages that need it are at work."""
        assert "saga_store_0001" in RELEASES
        assert all(revision <= REVISION for revision in RELEASES)
