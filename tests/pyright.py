"""pyright, which is a program of Node's: ``make pyright`` fetches it by npm. Tests fetch nothing."""

import shutil
from pathlib import Path

import pytest

from tests.npm import unpacked

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".pyright"
RELEASE = "1.1.414"
PROGRAM = FOLDER / RELEASE / "index.js"


def command() -> list[str]:
    """Return how to run it; where it isn't to be had the test is skipped, and the reason says how to get it."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node on PATH, which pyright needs")
    if not PROGRAM.is_file():
        pytest.skip("there is no pyright here; get it by: make pyright")
    return [node, str(PROGRAM)]


if __name__ == "__main__" and not PROGRAM.is_file():
    with unpacked(f"pyright@{RELEASE}", FOLDER) as package:
        package.rename(PROGRAM.parent)  # whole, or not there
