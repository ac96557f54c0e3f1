"""``python -m benchmarks.telemetry``: what it costs a client to tell what it does, in processor time for each saga.

The rounds of all ways alternate, and each is compared with the one without a telemetry beside it. That comes twice: the
second one shows how much of a ratio is chance.
"""

import argparse
import asyncio
import time
from collections.abc import Callable
from functools import partial
from statistics import median

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from benchmarks.__main__ import say
from benchmarks.ours import WORDS, engine_on
from benchmarks.report import markdown
from benchmarks.workload import Clock, run_by_calls, run_crowd
from saga_store import schema
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from saga_store.telemetry import Telemetry
from saga_store.telemetry.opentelemetry import OpenTelemetry
from saga_store.testing.postgres import serve


def instruments() -> Telemetry:
    return OpenTelemetry(meter=MeterProvider(metric_readers=[InMemoryMetricReader()]).get_meter("bench"))


def spans() -> Telemetry:
    tracers = TracerProvider()
    tracers.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    meters = MeterProvider(metric_readers=[InMemoryMetricReader()])
    return OpenTelemetry(meter=meters.get_meter("bench"), tracer=tracers.get_tracer("bench"))


BASE, AGAIN = "no telemetry", "no telemetry, again"
WAYS: dict[str, Callable[[], Telemetry | None]] = {
    BASE: lambda: None,
    AGAIN: lambda: None,
    "OpenTelemetry: instruments": instruments,
    "OpenTelemetry: instruments, and a span for each call": spans,
}


async def measure(url: str, rounds: int, sagas: int, at_a_time: int) -> dict[str, list[float]]:
    """Return the processor's seconds for a saga, by way and round."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    async with engine_on(url, connections=5) as engine:
        ways = {name: SqlAlchemySagaStorage(engine, telemetry=make()) for name, make in WAYS.items()}
        for number in range(-1, rounds):  # the first round warms up
            for name, storage in ways.items():
                began = time.process_time()
                run_saga = partial(run_by_calls, storage, WORDS)
                await run_crowd(run_saga, Clock(), at_a_time=at_a_time, tickets=iter(range(sagas)))
                if number >= 0:
                    found[name].append((time.process_time() - began) / sagas)
    return found


def render(found: dict[str, list[float]]) -> str:
    lines = [["12 calls of a saga", "processor time", "ratio"]]
    for name, seconds in found.items():
        ratio = median(mine / base for mine, base in zip(seconds, found[BASE], strict=True))
        lines.append([name, f"{median(seconds) * 1e6:,.0f} µs", f"{ratio:.3f}"])
    return "\n".join(markdown(lines))


def main() -> None:
    options = _options()
    with serve(options.postgres) as server:
        schema.upgrade(server.url)
        say(render(asyncio.run(measure(server.url, options.rounds, options.sagas, options.at_a_time))))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.telemetry", description="Measure what it costs a client to tell what it does."
    )
    parser.add_argument("--rounds", type=int, default=15, help="how often each way is measured (15)")
    parser.add_argument("--sagas", type=int, default=400, help="how many sagas a round has (400)")
    parser.add_argument("--at-a-time", type=int, default=16, help="how many of them run at a time (16)")
    parser.add_argument("--postgres", default="embedded", help="as SAGA_STORE_TEST_PG (embedded)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
