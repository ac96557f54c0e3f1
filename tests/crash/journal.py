"""What a client asked of its storage and what it was told: synced lines that survive its SIGKILL."""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Asked:
    """A write that is about to be asked for.

    Attributes:
        token: Marks what it writes: the context, and each log entry.
        call: The method, for messages.
        saga: The saga's id.
        at: When, in nanoseconds on the monotonic clock, which all processes of a machine share.
        creates: Whether it creates the saga.
        status: The status that it sets; None leaves it.
        context: Whether it sets the context.
        steps: How many log entries it appends.
        fenced: Whether it writes only at a certain version: then its outcome can be found out.
        expects: That version, if it was known before; a run finds it out itself.
        lane: Writes of one lane to one saga are asked at once, and promised to take effect in this order.
    """

    token: str
    call: str
    saga: str
    at: int
    creates: bool = False
    status: str | None = None
    context: bool = False
    steps: int = 0
    fenced: bool = False
    expects: int | None = None
    lane: str | None = None

    @property
    def changes_row(self) -> bool:
        """Whether it raises the version."""
        return self.creates or self.context or self.status is not None

    @property
    def leaves_an_id(self) -> bool:
        """Whether the row will know it again, for a while: so do all runs, whoever commits them."""
        return self.fenced or self.call.startswith("run")

    @property
    def is_status_alone(self) -> bool:
        """Whether it changes the row without leaving its token there."""
        return self.status is not None and not (self.creates or self.context)


class Answer(StrEnum):
    """What a client was told."""

    OK = "ok"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    UNKNOWN = "unknown"
    UNEXPECTED = "unexpected"


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back: ``version`` if the call returns one; ``error``, ``code`` (SQLSTATE), ``notes`` if it raised."""

    token: str
    answer: Answer
    at: int
    version: int | None = None
    error: str | None = None
    code: str | None = None
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Operation:
    """A write and its answer; None if the client died before it heard or could note one."""

    asked: Asked
    answered: Answered | None

    @property
    def answer(self) -> Answer | None:
        return self.answered.answer if self.answered else None

    @property
    def is_open(self) -> bool:
        """Whether it may be stored or not, and nobody was told."""
        return self.answer in {None, Answer.UNKNOWN}


class Journal:
    """Appends to one client's file; returns when the line is on disk. Lines that wait at once share a sync."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def note(self, what: Asked | Answered) -> None:
        noted = asyncio.get_running_loop().create_future()
        self._waiting.append((f"{json.dumps(asdict(what))}\n".encode(), noted))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        await noted

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            await asyncio.to_thread(self._write_synced, b"".join(line for line, _ in batch))
            for _, noted in batch:
                if not noted.done():
                    noted.set_result(None)
        self._writer = None

    def _write_synced(self, lines: bytes) -> None:
        while lines:
            lines = lines[os.write(self._file, lines) :]
        os.fsync(self._file)


class Tail:
    """Follows a journal that is still being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> Iterator[Asked | Answered]:
        """Yield what has been added since; a line that a killed client didn't finish was never noted."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield _parsed(json.loads(line))


class Record:
    """All that was asked and answered, gathered from journals."""

    def __init__(self) -> None:
        self._asked: dict[str, Asked] = {}
        self._answered: dict[str, Answered] = {}

    def add(self, what: Asked | Answered) -> None:
        known: dict[str, Any] = self._asked if isinstance(what, Asked) else self._answered
        if what.token in known:
            raise ValueError(f"{what.token} is noted twice in the journals: {known[what.token]} and {what}")
        known[what.token] = what

    @classmethod
    def of(cls, journals: Path) -> Self:
        record = cls()
        for path in sorted(journals.glob("*.jsonl")):
            for what in Tail(path).read():
                record.add(what)
        return record

    def operations(self) -> list[Operation]:
        return [Operation(asked, self._answered.get(token)) for token, asked in self._asked.items()]


def now() -> int:
    return time.monotonic_ns()


def _parsed(line: dict[str, Any]) -> Asked | Answered:
    if "answer" in line:
        return Answered(**{**line, "answer": Answer(line["answer"])})
    return Asked(**line)
