"""Environments as pip makes them of a line such as ``pip install '.[asyncpg]'``, without fetching anything.

All that a line asks for is installed already among the tests' own libraries. Linking just that into a new environment
shows what isn't asked for and yet needed, which an environment that has everything never shows.
"""

import shutil
import sys
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from tests.wheel import ROOT, SOURCES, Environment, succeed

if TYPE_CHECKING:
    import subprocess

PROGRAM = """#!{python}
import sys
from {module} import {function}
sys.exit({function}())
"""


def copy_checkout(folder: Path) -> Path:
    """Copy what a clone has, as far as it is installed or used from there; no build of ours changes the real one."""
    folder.mkdir(parents=True)
    for name in (*SOURCES, "alembic.ini", "examples"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def make_environment(folder: Path, extras: Iterable[str], how: str, checkout: Path) -> Environment:
    """Install the checkout: ``plain``, as a wheel; ``sdist``, as a source distribution; ``editable``."""
    venv.create(folder, with_pip=False, symlinks=True)
    environment = Environment(folder)
    for found in _needed([f"saga-store[{','.join(extras)}]"]):
        _link(found, environment)
    source = str(checkout)
    if how == "sdist":
        built = folder / "built"
        succeed(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(built), source)
        (archive,) = built.glob("*.tar.gz")
        source = str(archive)
    # The build's own environment is the one thing that pip would fetch besides.
    setuptools = distribution("setuptools")
    _link(setuptools, environment)
    install = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--no-deps", "--no-index"]
    succeed(*install, "--no-build-isolation", *(["--editable"] if how == "editable" else []), source)
    _unlink(setuptools, environment)
    return environment


def _needed(requirements: list[str]) -> list[Distribution]:
    """Follow what they ask for to its end, but for saga-store itself, which is installed of the checkout."""
    found: dict[str, Distribution] = {}
    asked: set[str] = set()
    while requirements:
        requirement = Requirement(requirements.pop())
        if str(requirement) in asked:
            continue
        asked.add(str(requirement))
        wanted = distribution(requirement.name)
        found[requirement.name.lower()] = wanted
        for line in wanted.requires or []:
            marker = Requirement(line).marker
            if not marker or any(marker.evaluate({"extra": extra}) for extra in (requirement.extras or {""})):
                requirements.append(line.partition(";")[0])
    del found["saga-store"]
    return list(found.values())


def _roots(found: Distribution) -> set[str]:
    """Return what it has in site-packages, by name: packages, modules, its metadata."""
    return {file.parts[0] for file in found.files or [] if file.parts[0] not in {"..", "__pycache__"}}


def _link(found: Distribution, environment: Environment) -> None:
    for name in _roots(found):
        target = environment.packages / name
        if not target.exists():
            target.symlink_to(str(found.locate_file(name)))
    for entry in found.entry_points:
        if entry.group == "console_scripts":
            program = environment.programs / entry.name
            program.write_text(
                PROGRAM.format(python=environment.programs / "python", module=entry.module, function=entry.attr)
            )
            program.chmod(0o755)


def _unlink(found: Distribution, environment: Environment) -> None:
    for name in _roots(found):
        (environment.packages / name).unlink(missing_ok=True)


def run_in(environment: Environment, script: str, cwd: Path, url: str) -> "subprocess.CompletedProcess[str]":
    """Run a shell script as typed in a shell where the environment is active, and where HOME is empty."""
    settings = {"DATABASE_URL": url, "HOME": str(environment.folder / "home")}
    return environment.run("sh", "-ec", script, cwd=cwd, settings=settings)
