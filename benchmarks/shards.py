"""``python -m benchmarks.shards``: what routing costs, and what several shards do, on one server and on two.

Routing is measured in one process: the same storage asked directly and as the only shard of a ShardedSagaStorage, turn
by turn. What shards do is measured with several client processes, each with callers of its own; every saga that they
say they ran has to be there.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg

from benchmarks.__main__ import FOLDER, say
from benchmarks.beds import MIGRATED, OF_SAGAS, make_template
from benchmarks.machine import libraries, load, machine
from benchmarks.ours import WORDS, engine_on
from benchmarks.report import markdown
from benchmarks.rows import CONNECTIONS
from benchmarks.server import BenchmarkError, Server, serve
from benchmarks.workload import Clock, RunSaga, measure, run_by_calls, run_crowd, tickets_for
from saga_store.sharding import ShardedSagaStorage
from saga_store.sqlalchemy import SqlAlchemySagaStorage

if TYPE_CHECKING:
    from saga_store.storage import SagaStorage

WARM_UP_SECONDS = 0.5
ROUTED_AT_A_TIME = (1, 64)
MOST_ROUTING_COSTS = 1.03
LEAST_OF_TWO_SERVERS = 1.7


class Layout(NamedTuple):
    """So many shards, on so many servers."""

    shards: int
    servers: int

    def __str__(self) -> str:
        def some(count: int, what: str) -> str:
            return f"{count} {what}" if count == 1 else f"{count} {what}s"

        return f"{some(self.shards, 'shard')} on {some(self.servers, 'server')}"


ALONE = Layout(1, 1)
LAYOUTS = (ALONE, Layout(2, 1), Layout(4, 1), Layout(2, 2), Layout(4, 2))


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        rounds: How often each layout has its turn.
        seconds: How long sagas are started in a turn.
        processes: Client processes.
        callers: Sagas at a time of each process.
        routed: How often the routed and the direct storage have their turns, of a third of those seconds.
        seed: Of the order of turns.
    """

    rounds: int = 5
    seconds: float = 3.0
    processes: int = 2
    callers: int = 64
    routed: int = 30
    seed: int = 1


async def routing_costs(url: str, plan: Plan) -> dict[int, list[tuple[float, float]]]:
    """Return, for each crowd and round, how many times as much a routed saga takes: of time, and of client CPU."""
    costs: dict[int, list[tuple[float, float]]] = {}
    async with engine_on(url, connections=CONNECTIONS) as engine:
        direct = SqlAlchemySagaStorage(engine)
        routed = ShardedSagaStorage([direct])
        await routed.find_sagas(limit=1)  # a shard begins empty
        storages: list[SagaStorage] = [direct, routed]
        for crowd in ROUTED_AT_A_TIME:
            sides: list[RunSaga] = [partial(run_by_calls, storage, WORDS) for storage in storages]
            for side in sides:
                await run_crowd(side, Clock(), at_a_time=crowd, tickets=tickets_for(min(WARM_UP_SECONDS, plan.seconds)))
            costs[crowd] = []
            for number in range(plan.routed):
                sagas, seconds, cpu = [0, 0], [0.0, 0.0], [0.0, 0.0]
                # In turns, so that neither is always the one that comes first.
                for turn in (0, 1, 1, 0) if number % 2 else (1, 0, 0, 1):
                    one = await measure(sides[turn], at_a_time=crowd, seconds=plan.seconds / 6)
                    sagas[turn] += one.sagas
                    seconds[turn] += one.seconds
                    cpu[turn] += one.cpu_seconds
                of_time, of_cpu = (spent[1] / sagas[1] / (spent[0] / sagas[0]) for spent in (seconds, cpu))
                costs[crowd].append((of_time, of_cpu))
    return costs


_together: Any = None


def _meet(barrier: Any) -> None:  # noqa: ANN401 - multiprocessing's, which has no type of its own
    global _together  # noqa: PLW0603 - what a process of the pool is given once
    _together = barrier


def run_client(urls: Sequence[str], callers: int, seconds: float) -> tuple[int, int, float]:
    """In a process of its own: return how many sagas it ran to warm up and how many then, and for how long."""

    async def work() -> tuple[int, int, float]:
        async with AsyncExitStack() as stack:
            engines = [
                await stack.enter_async_context(engine_on(url, connections=max(2, CONNECTIONS // len(urls))))
                for url in urls
            ]
            shards = [SqlAlchemySagaStorage(engine) for engine in engines]
            storage: SagaStorage = ShardedSagaStorage(shards) if len(shards) > 1 else shards[0]
            run_saga: RunSaga = partial(run_by_calls, storage, WORDS)
            warm = await run_crowd(
                run_saga, Clock(), at_a_time=callers, tickets=tickets_for(min(WARM_UP_SECONDS, seconds))
            )
            await asyncio.to_thread(_together.wait)
            measured = await measure(run_saga, at_a_time=callers, seconds=seconds)
            return warm, measured.sagas, measured.seconds

    return asyncio.run(work())


class Shards:
    """The databases of a layout, and the proof that every saga is in one of them."""

    def __init__(self, layout: Layout, servers: Sequence[Server]) -> None:
        self.layout = layout
        self.urls = [
            servers[index % layout.servers].create(f"bench_{layout.shards}_{layout.servers}_{index}", template=MIGRATED)
            for index in range(layout.shards)
        ]
        self._sagas = 0

    def settle(self, sagas: int) -> None:
        self._sagas += sagas
        found, entries = 0, 0
        for url in self.urls:
            with psycopg.connect(url, autocommit=True) as connection:
                found += _one(connection, OF_SAGAS.sagas)
                entries += _one(connection, OF_SAGAS.entries)
                connection.execute(OF_SAGAS.vacuum)
        if (found, entries) != (self._sagas, self._sagas * OF_SAGAS.entries_per_saga):
            raise BenchmarkError(f"{self.layout}: of {self._sagas} sagas {found} were found, with {entries} entries")


def measure_layouts(servers: Sequence[Server], plan: Plan, tell: Callable[[str], None]) -> dict[str, list[float]]:
    """Return the sagas a second of all processes together, by layout; one figure a round."""
    beds = [Shards(layout, servers) for layout in LAYOUTS]
    speeds: dict[str, list[float]] = {str(bed.layout): [] for bed in beds}
    order = random.Random(plan.seed)  # noqa: S311 - it shuffles turns
    spawning = multiprocessing.get_context("spawn")
    barrier = spawning.Barrier(plan.processes)
    with ProcessPoolExecutor(plan.processes, spawning, _meet, (barrier,)) as pool:
        for number in range(1, plan.rounds + 1):
            for server in servers:
                server.checkpoint()
            for bed in order.sample(beds, len(beds)):
                jobs = [pool.submit(run_client, bed.urls, plan.callers, plan.seconds) for _ in range(plan.processes)]
                clients = [job.result() for job in jobs]
                bed.settle(sum(warm + sagas for warm, sagas, _ in clients))
                speed = sum(sagas / seconds for _, sagas, seconds in clients)
                speeds[str(bed.layout)].append(speed)
                tell(f"round {number}/{plan.rounds}: {bed.layout!s:<22} {speed:7,.0f} sagas/s")
    return speeds


def _one(connection: psycopg.Connection, query: Any) -> int:  # noqa: ANN401 - a literal
    [count] = connection.execute(query).fetchone() or [0]
    return int(count)


def make_report(
    plan: Plan, facts: dict[str, Any], costs: dict[int, list[tuple[float, float]]], speeds: dict[str, list[float]]
) -> dict[str, Any]:
    alone = speeds[str(ALONE)]
    return {
        **facts,
        "plan": asdict(plan),
        "routing": {
            str(crowd): {
                "time": median(of_time for of_time, _ in found),
                "cpu": median(of_cpu for _, of_cpu in found),
                "rounds": found,
            }
            for crowd, found in costs.items()
        },
        "layouts": {
            name: {
                "sagas_per_second": median(found),
                "ratio": median([one / other for one, other in zip(found, alone, strict=True)]),
                "rounds": found,
            }
            for name, found in speeds.items()
        },
    }


def render(report: dict[str, Any]) -> Iterator[str]:
    """Yield tables, and what the targets say of them."""
    cores, plan = report["machine"]["cores"], report["plan"]
    yield f"- {cores} cores ({report['machine']['cpu']}), shared by servers and clients"
    yield f"- load {report['machine']['load_before']} before, {report['machine']['load_after']} after"
    if report["machine"]["load_before"] > cores / 2:
        yield "- WARNING: others were busy on this machine when it began: the figures are rough"
    lines = [["A routed saga / a direct one", "time", "least", "most", "the client's CPU"]]
    for crowd, found in report["routing"].items():
        times = [of_time for of_time, _ in found["rounds"]]
        figures = found["time"], min(times), max(times), found["cpu"]
        lines.append([f"{crowd} at a time", *(f"{figure:.3f}" for figure in figures)])
    yield from markdown(lines)
    title = f"{plan['processes']} processes of {plan['callers']} callers"
    lines = [[title, "sagas/s", f"beside {ALONE}"]]
    for name, found in report["layouts"].items():
        lines.append([name, f"{found['sagas_per_second']:,.0f}", f"{found['ratio']:.2f}"])
    yield from markdown(lines)
    yield ""
    for crowd, found in report["routing"].items():
        met = "met" if round(found["time"], 3) <= MOST_ROUTING_COSTS else "NOT MET"
        yield f"routing with {crowd} at a time costs at most {MOST_ROUTING_COSTS:g}: {found['time']:.3f}, {met}"
    two = report["layouts"][str(Layout(2, 2))]["ratio"]
    needed = 2 + plan["processes"]
    verdict = "met" if two >= LEAST_OF_TWO_SERVERS else "NOT MET"
    if cores < needed:
        verdict = f"can't be told on {cores} cores: two servers and {plan['processes']} clients need {needed}"
    yield f"two servers do at least {LEAST_OF_TWO_SERVERS:g} of one: {two:.2f}, {verdict}"


def main() -> None:
    options = _options()
    plan = Plan(**{name: getattr(options, name) for name in asdict(Plan())})
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    before = machine(folder)
    with ExitStack() as stack:
        servers = [stack.enter_context(serve(folder)) for _ in range(max(layout.servers for layout in LAYOUTS))]
        for server in servers:
            make_template(server)
        say("what routing costs")
        costs = asyncio.run(routing_costs(servers[0].create("bench_routing", template=MIGRATED), plan))
        speeds = measure_layouts(servers, plan, say)
        facts = {
            "machine": {**before, "load_after": load()},
            "libraries": libraries(),
            "server": {"version": servers[0].version, "settings": servers[0].settings},
        }
    report = make_report(plan, facts, costs, speeds)
    options.json.write_text(json.dumps(report, indent=1))
    say("\n".join(render(report)))
    say(f"\nall figures: {options.json}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shards", description=__doc__)
    plan = Plan()
    parser.add_argument("--rounds", type=int, default=plan.rounds, help=f"turns of each layout ({plan.rounds})")
    parser.add_argument("--seconds", type=float, default=plan.seconds, help=f"of a turn ({plan.seconds:g})")
    parser.add_argument("--processes", type=int, default=plan.processes, help=f"of clients ({plan.processes})")
    parser.add_argument("--callers", type=int, default=plan.callers, help=f"of each process ({plan.callers})")
    parser.add_argument("--routed", type=int, default=plan.routed, help=f"rounds of routed and direct ({plan.routed})")
    parser.add_argument("--seed", type=int, default=plan.seed, help=f"of the order of turns ({plan.seed})")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="whose disk the servers' data is on (.bench)")
    parser.add_argument("--json", type=Path, default=FOLDER / "shards.json", help="the file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
