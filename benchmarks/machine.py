"""What the figures came from: the machine, the libraries, and how long its disk takes to write for good."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import Any

LIBRARIES = ("saga-store", "SQLAlchemy", "asyncpg", "psycopg", "python-cqrs", "dbos")
VOLATILE = {"tmpfs", "ramfs"}
SYNCS = 200
PAGE = b"\0" * 8192


def machine(folder: Path) -> dict[str, Any]:
    return {
        "cores": _cores(),
        "cpu": _cpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "filesystem": filesystem(folder),
        "sync_ms": round(_sync_seconds(folder) * 1000, 3),
        "load_before": load(),
    }


def libraries() -> dict[str, str | None]:
    return {name: installed(name) for name in LIBRARIES}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def load() -> float:
    """Return how many processes wanted a core in the last minute, ours among them."""
    return round(os.getloadavg()[0], 1)


def busy() -> float | None:
    """Return the seconds that the cores have worked since the machine began; None where there is no /proc."""
    try:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:8])
    except OSError:
        return None
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def filesystem(folder: Path) -> str:
    """Return the kind of file system that the folder is on; "unknown" where there is no /proc."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    inside = [(len(at), kind) for at, kind in mounts if folder.resolve().is_relative_to(at)]
    return max(inside, default=(0, "unknown"))[1]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _sync_seconds(folder: Path) -> float:
    """Return how long it takes to write a page and have it on disk: the least that a commit takes."""
    sync = getattr(os, "fdatasync", os.fsync)
    taken = []
    with TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(SYNCS):
            start = time.perf_counter()
            file.seek(0)
            file.write(PAGE)
            sync(file.fileno())
            taken.append(time.perf_counter() - start)
    return median(taken)
