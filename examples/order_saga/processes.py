"""The other programs of the story: the migration, and the workers, one of which is killed."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process

from examples.order_saga.database import ROOT, SCHEMA
from examples.order_saga.terminal import say

PATIENCE = 60
"""Seconds after which a program that says nothing more is taken for stuck."""


class DemoError(Exception):
    """Something in the story went another way than it should."""


async def migrate(url: str) -> None:
    """Run ``saga-store upgrade``, as a deployment would."""
    await _run(url, "saga_store", "upgrade", "--schema", SCHEMA, "--create-schema", name="saga-store")


async def work(url: str, *arguments: str, kill_at: str | None = None) -> None:
    """Run a worker to its end; or kill it, as soon as it says ``kill_at``."""
    await _run(url, "examples.order_saga.worker", *arguments, name="worker", kill_at=kill_at)


async def look(url: str, verb: str, saga: str) -> None:
    """Run a verb of ``saga-store saga`` as an operator would, in the same terminal."""
    command = ["saga", verb, saga, "--schema", SCHEMA]
    say(f"  $ saga-store {' '.join(command)}\n")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "saga_store", *command, cwd=ROOT, env=os.environ | {"DATABASE_URL": url}
    )
    if ended := await process.wait():
        raise DemoError(f"saga-store ended with exit code {ended}, not 0")


async def _run(url: str, module: str, *arguments: str, name: str, kill_at: str | None = None) -> None:
    say(f"  $ python -m {' '.join([module, *arguments])}")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": url},
        stdin=PIPE,
        stdout=PIPE,
        stderr=STDOUT,
    )
    name = f"{name} {process.pid}"
    try:
        async with asyncio.timeout(PATIENCE):
            await _listen(process, name, kill_at)
    except TimeoutError as exc:
        raise DemoError(f"{name} was still running after {PATIENCE} seconds") from exc
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    expected = -signal.SIGKILL if kill_at else 0
    if process.returncode != expected:
        raise DemoError(f"{name} ended with exit code {process.returncode}, not {expected}")


async def _listen(process: Process, name: str, kill_at: str | None) -> None:
    if process.stdout is None:
        raise DemoError(f"{name} can't be heard")
    async for line in process.stdout:
        said = line.decode().rstrip()
        say(f"    {name} | {said}")
        if said == kill_at:
            say(f"  $ kill -9 {process.pid}")
            process.kill()
    await process.wait()
