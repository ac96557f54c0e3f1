"""A small file system for a tablespace, which can be full."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOM = "512m"
MARGIN = 16 * 1024
TRIES = 50


class SmallDisk:
    """A tmpfs whose size is what is used, as long as it is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """Leave it no room beyond what is used; the server may use more in between, and then it needs another try."""
        for tried in range(TRIES):
            found = os.statvfs(self.folder)
            used = (found.f_blocks - found.f_bfree) * found.f_frsize
            if self._resize(str(used + (1 + tried) * MARGIN)) == 0:
                return
        raise OSError(f"{self.folder} grows too fast to be filled up")

    def clear(self) -> None:
        if self._resize(ROOM) != 0:
            raise OSError(f"{self.folder} can't be given its {ROOM} back")

    def _resize(self, size: str) -> int:
        remount = ["mount", "-o", f"remount,size={size}", str(self.folder)]
        return subprocess.run(remount, check=False, capture_output=True).returncode


@contextmanager
def small_disk(folder: Path, owner: tuple[int, int]) -> Iterator[SmallDisk | None]:
    """Mount one; None where that isn't permitted, which takes root and the right to mount."""
    folder.mkdir()
    mount = shutil.which("mount")
    options = f"size={ROOM},mode=0700,uid={owner[0]},gid={owner[1]}"
    if mount is None or os.geteuid() != 0:
        yield None
        return
    mounted = subprocess.run(
        [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        yield None
        return
    try:
        yield SmallDisk(folder)
    finally:
        unmount(folder)


def unmount(folder: Path) -> None:
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607 - wherever it is
