"""A small file system for a tablespace, which can be full."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOM = "512m"


class SmallDisk:
    """A tmpfs whose size is what is used, as long as it is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        used = os.statvfs(self.folder)
        self._resize(str((used.f_blocks - used.f_bfree) * used.f_frsize))

    def clear(self) -> None:
        self._resize(ROOM)

    def _resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)  # noqa: S607 - wherever it is


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
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607 - wherever it is
