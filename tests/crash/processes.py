"""The processes that write, archive and restore: started, killed and followed."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import URL

from tests.crash import archiver
from tests.crash.client import Setup
from tests.crash.journal import Answer, Answered, Tail
from tests.crash.plan import PATIENCE_SECONDS, ROOT, CrashTestError, Plan
from tests.proxy import Proxy

# Each way to use a storage; a client that is started anew goes on with another.
WAYS = [
    (driver, bind, group_commit)
    for group_commit in (True, False)
    for driver, bind in (
        ("asyncpg", "engine"),
        ("psycopg", "sessionmaker"),
        ("psycopg", "engine"),
        ("asyncpg", "sessionmaker"),
    )
]


async def _start(module: str, setup: Setup | archiver.Setup, errors: BinaryIO) -> asyncio.subprocess.Process:
    """Start a module with its setup; it notices by its standard input if this process dies."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        json.dumps(asdict(setup)),
        stdin=asyncio.subprocess.PIPE,
        stderr=errors,
        cwd=ROOT,
    )


class ClientProcess:
    """A client, with a proxy of its own before each server; its answers are counted as it writes its journal."""

    def __init__(self, number: int, ways: Sequence[tuple[Proxy, URL]], journals: Path, plan: Plan) -> None:
        self.proxies = [proxy for proxy, _ in ways]
        self._number = number
        self._urls = [url.render_as_string(hide_password=False) for _, url in ways]
        self.journals = journals
        self._plan = plan
        self._lives = 0
        self._tail: Tail | None = None
        self._process: asyncio.subprocess.Process | None = None
        self.answers: Counter[Answer] = Counter()
        self.codes: Counter[str | None] = Counter()

    @property
    def process(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise CrashTestError(f"client {self._number} hasn't been started")
        return self._process

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        driver, bind, group_commit = WAYS[(self._number + 3 * self._lives) % len(WAYS)]
        self._lives += 1
        name = f"{self._number}.{self._lives}"
        journal = self.journals / f"{name}.jsonl"
        setup = Setup(
            name,
            self._urls,
            str(journal),
            driver,
            bind,
            group_commit,
            self._plan.tasks,
            f"{self._plan.seed}/{name}",
        )
        with self._errors(name).open("wb") as errors:
            self._process = await _start("tests.crash.client", setup, errors)
        self._tail = Tail(journal)

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()
        self.follow()

    async def finish(self) -> None:
        """Let it note its last answers and end."""
        self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), PATIENCE_SECONDS)
        except TimeoutError as exc:
            raise CrashTestError(f"a write of client {self._number} hangs: it doesn't end") from exc
        self.follow()
        self.check()

    def follow(self) -> None:
        for line in self._tail.read() if self._tail else ():
            if isinstance(line, Answered):
                self.answers[line.answer] += 1
                self.codes[line.code or line.error] += 1

    def check(self) -> None:
        """See that it hasn't ended by itself."""
        if self.process.returncode not in {None, 0}:
            said = self._errors(f"{self._number}.{self._lives}").read_text()
            raise CrashTestError(f"client {self._number} ended with {self.process.returncode}:\n{said[-4000:]}")

    def _errors(self, name: str) -> Path:
        return self.journals / f"{name}.stderr"


class ArchiverProcess:
    """One that archives, or restores, with a proxy of its own before each server."""

    def __init__(self, ways: Sequence[tuple[Proxy, URL]], place: Path, plan: Plan, *, restores: bool) -> None:
        self.proxies = [proxy for proxy, _ in ways]
        self._urls = [url.render_as_string(hide_password=False) for _, url in ways]
        self._place = place
        self._plan = plan
        self._restores = restores
        self._lives = 0
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._lives += 1
        setup = archiver.Setup(
            self._urls,
            str(self._place / "archives"),
            "asyncpg" if self._lives % 2 else "psycopg",
            self._restores,
            f"{self._plan.seed}/{self._restores}/{self._lives}",
        )
        with self._errors.open("wb") as errors:
            self._process = await _start("tests.crash.archiver", setup, errors)

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def kill(self) -> None:
        self.check()
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None

    def check(self) -> None:
        """See that it hasn't ended by itself."""
        if self._process is not None and self._process.returncode is not None:
            raise CrashTestError(
                f"the {'restorer' if self._restores else 'archiver'} ended with {self._process.returncode}:\n"
                f"{self._errors.read_text()[-4000:]}"
            )

    @property
    def _errors(self) -> Path:
        return self._place / "journals" / f"{'restorer' if self._restores else 'archiver'}.stderr"
