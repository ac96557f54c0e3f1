"""``make bench-retention``, at a size that says nothing about speed: it does what it claims to do."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from benchmarks.retention import DIGEST, WAYS, fill, one, render, step
from tests.databases import Database

SAGAS = 60


@pytest.mark.parametrize("way", WAYS)
def test_each_way_lets_all_go_that_is_old_enough(database: Database, tmp_path: Path, way: str) -> None:
    """By hand, by our removal alone, and archived."""
    url = database.url()
    fill(url, SAGAS, 3, tmp_path)
    place = tmp_path / "archive" if way == "archive" else tmp_path
    place.mkdir(exist_ok=True)

    assert asyncio.run(step(way, url, str(place)))["sagas"] == SAGAS
    assert one(url, "SELECT count(*) FROM saga_logs") == (0,)


def test_what_comes_back_has_the_same_digest(database: Database, tmp_path: Path) -> None:
    url = database.url()
    fill(url, SAGAS, 3)
    digest = one(url, DIGEST)

    for name in ("archive", "verify", "restore"):
        assert asyncio.run(step(name, url, str(tmp_path)))["sagas"] == SAGAS
    assert one(url, DIGEST) == digest


def test_what_wasnt_met_is_said() -> None:
    """In the table that is printed."""
    took = {"sagas": 10, "seconds": 1.0, "peak_mb": 301.0}
    names = ("archive", "verify", "restore", "restore again")
    report: dict[str, Any] = {
        "machine": {"cores": 2, "cpu": "x", "load_before": 0, "load_after": 0},
        "server": {"version": "18"},
        "plan": {
            "sagas": 10,
            "standing": 0,
            "entries": 8,
            "rounds": 1,
            "writers": 16,
            "million": 10,
            "million_entries": 8,
        },
        "among_writers": {
            "rates": {"delete": [1000.0], "remove": [800.0], "archive": [200.0]},
            "longest": {"baseline": 0.1, "delete": 0.2, "remove": 0.2, "archive": 0.7},
            "failed": {},
        },
        "cycles": {"forgotten": [100, 120], "stubs": [100, 120]},
        "million": {**dict.fromkeys(names, took), "equal": {"another database": False}, "bytes": 1},
    }
    text = render(report)

    assert "0.80, >= 0.75: met" in text
    assert "0.20, >= 0.25: NOT MET" in text
    assert "+0.60 s, <= 0.5: NOT MET" in text
    assert "at most 1.20x that; <= 1.1: NOT MET" in text
    assert "301 MB, < 300: NOT MET" in text
    assert "another database: NO" in text
