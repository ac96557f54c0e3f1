"""A short form of `make archive-kills`."""

import subprocess
import sys

from tests.databases import Database
from tests.wheel import ROOT

KILLS = 5


def test_a_killed_archiver_loses_nothing(database: Database) -> None:
    """Killed at random moments while it archives and restores, again and again: each saga is in one of both places."""
    line = [sys.executable, "-m", "tests.retention.kills", "--kills", str(KILLS), "--sagas", "120"]
    done = subprocess.run(
        [*line, "--url", database.url()], capture_output=True, text=True, check=False, cwd=ROOT, timeout=300
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{KILLS} kills, 0 ended by themselves; 120 sagas archived, 0 in the table" in done.stdout
