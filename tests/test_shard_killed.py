"""One of four servers is SIGKILLed under load: what stops, what goes on, and that everything is recovered.

`make shard-kill` is the long form: half a minute, and each shard on a server of its own.
"""

import asyncio
import logging
from contextlib import ExitStack
from datetime import timedelta

import pytest

from saga_store import schema
from saga_store.testing.postgres import restartable
from tests.databases import Database, Databases
from tests.shard_outage import outage

SHARD = 2


async def test_sagas_elsewhere_do_not_notice(
    databases: Databases, template: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """None of the other shards fails, claims there go on, and at the end every saga is finished, each step done once.

    Those of the killed one fail with an error that says so, or go through in time.
    """
    caplog.set_level(logging.CRITICAL, "saga_store")
    with ExitStack() as stack:
        urls = [stack.enter_context(databases.clone(template)).url() for _ in range(3)]
        server = stack.enter_context(restartable())
        urls.insert(SHARD, server.facts.url)
        await asyncio.to_thread(schema.upgrade, server.facts.url.replace("postgresql://", "postgresql+psycopg://"))
        outcome = await outage(urls, SHARD, server, seconds=2.0, callers=8, retry_for=timedelta(seconds=0.2))
    assert outcome.wrong == []
    assert not outcome.failed_elsewhere
    assert outcome.failed_there
    assert set(outcome.failed_there) <= {"StorageUnavailableError", "UnknownOutcomeError"}
    assert outcome.completed_meanwhile
    assert outcome.missing == (SHARD,)
    assert all(heard.ended(outcome.killed, outcome.started) for heard in outcome.heard[:SHARD])
