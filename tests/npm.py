"""Packages of npm's: fetched as archives, of which no script is run."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unpacked(package: str, folder: Path) -> Iterator[Path]:
    """Give the unpacked ``name@version``, beside the folder where it is to be moved to within the block."""
    npm = shutil.which("npm") or sys.exit("there is no npm on PATH; on Debian and Ubuntu: apt-get install npm")
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        # It compares the archive with the digest that the registry has of it.
        command = [npm, "pack", "--loglevel=error", "--ignore-scripts", "--pack-destination", temporary, package]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(temporary).glob("*.tgz")
        with tarfile.open(archive) as packed:
            # Python 3.11.4 is the first that has it.
            packed.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
            packed.extractall(temporary)  # noqa: S202 - npm has compared it
        yield Path(temporary, "package")
