"""A storage's work in OpenTelemetry's words: instruments, and spans by its semantic conventions for databases."""

import time
from collections.abc import Mapping, Sequence
from contextvars import Context as Variables
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from saga_store.telemetry import Call, End, Resolution

try:
    from opentelemetry import context, metrics, trace
except ImportError as _exc:
    raise ImportError(
        "saga_store.telemetry.opentelemetry needs opentelemetry-api: pip install saga-store[otel]"
    ) from _exc

__all__ = ["OpenTelemetry"]

# What the conventions say for db.client.operation.duration; the waits are of the same kind.
_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
_ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
# What is measured for several callers at once has none of their traces for an example.
_OF_NOBODY = trace.set_span_in_context(trace.INVALID_SPAN, context.Context())


class OpenTelemetry:
    """Tells OpenTelemetry what a storage does: ``SqlAlchemySagaStorage(engine, telemetry=OpenTelemetry())``.

    Instruments: ``db.client.operation.duration``, of each call as its caller sees it; ``saga_store.flush.rows`` and
    ``saga_store.queue.wait_time`` of group commit; ``saga_store.retries``, by ``error.type``;
    ``saga_store.lost_answers``, by ``saga_store.resolution``; ``saga_store.lock.wait_time``. A saga's id is an
    attribute of spans alone.

    Args:
        meter: Makes the instruments; None: that of the global provider.
        tracer: Makes a span for each call, which is current meanwhile; None: there are no spans. Statements of group
            commit that several callers share belong to no span.
    """

    def __init__(self, *, meter: metrics.Meter | None = None, tracer: trace.Tracer | None = None) -> None:
        meter = meter or metrics.get_meter("saga_store", _version())
        self._tracer = tracer
        self._durations = meter.create_histogram(
            "db.client.operation.duration",
            "s",
            "Duration of database client operations.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._rows = meter.create_histogram(
            "saga_store.flush.rows",
            "{row}",
            "Rows that a statement of group commit writes.",
            explicit_bucket_boundaries_advisory=_ROWS,
        )
        self._queue_waits = meter.create_histogram(
            "saga_store.queue.wait_time",
            "s",
            "How long writes wait for their turn to be sent.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._lock_waits = meter.create_histogram(
            "saga_store.lock.wait_time",
            "s",
            "How long writes wait for rows that other transactions have locked.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._retries = meter.create_counter(
            "saga_store.retries", "{retry}", "Statements that failed in a way that may pass, and were sent again."
        )
        self._lost_answers = meter.create_counter(
            "saga_store.lost_answers", "{answer}", "Writes whose answer got lost, by what came of them."
        )

    def begin(self, call: Call) -> End:
        attributes = _attributes(call.operation, call.table, call.namespace, call.host, call.port)
        span = token = None
        if self._tracer is not None:
            of_span = attributes if call.saga_id is None else attributes | {"saga_store.saga_id": str(call.saga_id)}
            name = f"{call.operation} {call.table}"
            span = self._tracer.start_span(name, kind=trace.SpanKind.CLIENT, attributes=of_span)
            token = context.attach(trace.set_span_in_context(span))
        began = time.perf_counter()

        def end(error: BaseException | None) -> None:
            seconds = time.perf_counter() - began
            failed = _failure(error)
            try:
                self._durations.record(seconds, attributes | failed if failed else attributes)
            finally:
                if span is not None and token is not None:
                    context.detach(token)
                    _end(span, error, failed)

        return end

    def detach(self, context: Variables) -> None:
        context.run(_forget)

    def flushed(self, rows: int, waited: Sequence[float]) -> None:
        self._rows.record(rows, context=_OF_NOBODY)
        for seconds in waited:
            self._queue_waits.record(seconds, context=_OF_NOBODY)

    def retried(self, error: Exception) -> None:
        self._retries.add(1, {"error.type": _error_type(error)}, context=_OF_NOBODY)

    def resolved(self, resolution: Resolution) -> None:
        self._lost_answers.add(1, {"saga_store.resolution": resolution}, context=_OF_NOBODY)

    def waited_for_lock(self, seconds: float) -> None:
        self._lock_waits.record(seconds, context=_OF_NOBODY)


def _forget() -> None:
    context.attach(_OF_NOBODY)


@lru_cache(maxsize=1000)
def _attributes(
    operation: str, table: str, namespace: str | None, host: str | None, port: int | None
) -> dict[str, str | int]:
    known = {
        "db.system.name": "postgresql",
        "db.operation.name": operation,
        "db.collection.name": table,
        "db.namespace": namespace,
        "server.address": host,
        "server.port": port,
    }
    return {name: value for name, value in known.items() if value is not None}


def _failure(error: BaseException | None) -> dict[str, str | int]:
    if error is None:
        return {}
    code = getattr(error, "sqlstate", None)
    return {"error.type": _error_type(error)} | ({"db.response.status_code": code} if code else {})


def _error_type(error: BaseException) -> str:
    return getattr(error, "sqlstate", None) or type(error).__qualname__


def _end(span: trace.Span, error: BaseException | None, failed: Mapping[str, str | int]) -> None:
    if error is not None:
        span.set_attributes(failed)
        span.set_status(trace.StatusCode.ERROR, str(error))
    span.end()


def _version() -> str:
    try:
        return version("saga-store")
    except PackageNotFoundError:
        return ""
