"""pyright, which is a program of Node's: ``make pyright`` fetches it by npm. Tests fetch nothing."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".pyright"
RELEASE = "1.1.414"
PROGRAM = FOLDER / "node_modules" / "pyright" / "index.js"


def command() -> list[str]:
    """Return how to run it; where it isn't to be had the test is skipped, and the reason says how to get it."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node on PATH, which pyright needs")
    if not PROGRAM.is_file():
        pytest.skip("there is no pyright here; get it by: make pyright")
    return [node, str(PROGRAM)]


if __name__ == "__main__":
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("there is no npm on PATH; on Debian and Ubuntu: apt-get install npm")
    FOLDER.mkdir(exist_ok=True)
    quiet = ["--silent", "--no-fund", "--no-audit", "--no-save", "--ignore-scripts"]
    subprocess.run([npm, "install", *quiet, "--prefix", str(FOLDER), f"pyright@{RELEASE}"], check=True)
