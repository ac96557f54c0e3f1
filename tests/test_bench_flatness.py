"""``make bench-flatness``, at a size that says nothing about speed: it does what it claims to do."""

import argparse
import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest

from benchmarks.flatness import CALLS, EACH, LIVING, fill, measure, misses, render
from tests.databases import Databases

SAGAS = 25_000
WORLDS = ("none", "finished", "stubs")


@pytest.fixture
def urls(databases: Databases) -> Iterator[Callable[[int], dict[str, str]]]:
    with ExitStack() as stack:

        def filled(sagas: int) -> dict[str, str]:
            made = {name: stack.enter_context(databases.empty()).url() for name in WORLDS}
            for name, url in made.items():
                fill(url, name, sagas)
            return made

        yield filled


def count(url: str, what: Any) -> tuple[int, ...]:  # noqa: ANN401 - a literal
    with psycopg.connect(url, autocommit=True) as connection:
        [row] = connection.execute(what)
        return tuple(row)


def test_the_databases_differ_by_what_is_over_alone(urls: Callable[[int], dict[str, str]]) -> None:
    """The same sagas are unfinished in each; the finished ones have histories, and the stubs an archive."""
    made = urls(SAGAS)
    sagas = "SELECT count(*) FILTER (WHERE status = 'RUNNING'), count(*), count(archived_at) FROM saga_executions"
    assert {name: count(url, sagas) for name, url in made.items()} == {
        "none": (3 * LIVING, 3 * LIVING, 0),
        "finished": (3 * LIVING, 3 * LIVING + SAGAS, 0),
        "stubs": (3 * LIVING, 3 * LIVING + SAGAS, SAGAS),
    }
    entries = [count(url, "SELECT count(*) FROM saga_logs")[0] for url in made.values()]
    assert entries == [3 * LIVING * EACH, (3 * LIVING + SAGAS) * EACH, 3 * LIVING * EACH]
    archives = (
        "SELECT count(*) >= 3, sum(sagas) FROM saga_archives a "
        "WHERE EXISTS (SELECT FROM saga_executions e WHERE e.archived_at = a.archived_at)"
    )
    assert count(made["stubs"], archives) == (True, SAGAS)


def test_each_call_is_timed_and_its_pages_counted(urls: Callable[[int], dict[str, str]]) -> None:
    """In all three, by turns; and what is counted is what the call itself touches."""
    options = argparse.Namespace(rounds=2, calls=3)
    found = asyncio.run(measure(urls(100), options))
    assert list(found["seconds"]) == list(found["pages"]) == list(CALLS)
    for name in CALLS:
        assert {world: len(rounds) for world, rounds in found["seconds"][name].items()} == dict.fromkeys(WORLDS, 2)
        assert 3 <= found["pages"][name]["none"] < 20_000
    # An entry is inserted, and its saga locked; a list reads many more.
    assert found["pages"]["log_step"]["none"] < 40
    assert found["pages"]["list of what is stuck"]["none"] > found["pages"]["history"]["none"]


def test_what_wasnt_met_is_said() -> None:
    """In the table that is printed, and by the exit code; compared round by round."""
    seconds = {"none": [1.0, 2.0, 1.0], "finished": [1.1, 2.2, 9.0], "stubs": [1.3, 2.6, 1.3]}
    report: dict[str, Any] = {
        "machine": {"cores": 2, "cpu": "x", "load_before": 0, "load_after": 0},
        "server": {"version": "18"},
        "plan": {"sagas": 10, "rounds": 3, "calls": 1},
        "seconds": {"create": seconds},
        "pages": {"create": {"none": 10.0, "finished": 12.0, "stubs": 11.5}},
    }
    assert "| create" in render(report)
    assert "1.10, <= 1.2: met" in render(report)
    assert "1.30, <= 1.2: NOT MET" in render(report)
    assert misses(report) == ["create among stubs: 1.30 times as long; at most 1.2 is allowed"]
