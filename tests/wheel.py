"""The package as users have it: the built wheel in an environment of its own, with no checkout in sight."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("saga_store", "pytest_saga_store.py", "migrations", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment with the wheel; all else that the package needs is that of the tests' own."""

    folder: Path

    @property
    def programs(self) -> Path:
        return self.folder / "bin"

    @property
    def packages(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def run(
        self, *command: str, cwd: Path = Path("/"), settings: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program of the environment, with nothing of the tests' own environment but what is given."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SAGA_", "DATABASE_"))}
        inherited["PATH"] = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=cwd, env=inherited | dict(settings or {})
        )


def build_wheel(folder: Path) -> Path:
    """Build from a copy, in which nothing is left over from earlier builds."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    succeed(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_wheel(wheel: Path, folder: Path) -> Environment:
    """Make the environment; what the wheel depends on needn't be fetched for it once more."""
    venv.create(folder, with_pip=False, symlinks=True)
    # pip would find the package of the tests' own environment, and be content with that.
    options = ["--no-deps", "--no-index", "--ignore-installed"]
    succeed(sys.executable, "-m", "pip", "--python", str(folder), "install", *options, str(wheel))
    # A path in a .pth file counts, but not the .pth files there, which would lead to the checkout.
    packages = Environment(folder).packages / "dependencies.pth"
    packages.write_text(sysconfig.get_path("purelib") + "\n")
    return Environment(folder)


def succeed(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
