"""The half of keeping and letting go that every storage shares: what is asked is checked, and changes told apart."""

import abc
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TypeVar
from uuid import UUID

from saga_store.errors import InvalidSagaDataError
from saga_store.inspection import INTERVENTION, Cursor, read_cursor, record, valid_moment
from saga_store.interface import IRetentionStorage
from saga_store.model import UNFINISHED, LogStep, SagaLogEntry, SagaStatus, SagaStepStatus
from saga_store.retention_model import (
    KEPT_AFTER_RESTORE,
    MOST_MARKS,
    ArchivePage,
    ArchiveState,
    ArchivingTurn,
    ExpiredPage,
    Restored,
    Retention,
    RetentionSnapshot,
    SagaArchive,
    SagaMark,
    SagaRecord,
    SagaStub,
    StubsMade,
)
from saga_store.validation import (
    valid_big_count,
    valid_count,
    valid_id,
    valid_member,
    valid_name,
    valid_period,
    valid_person,
    valid_step,
    valid_text,
)

_T = TypeVar("_T")
_LONGEST_PAGE = 1000
# A longer context is left to the database to be parsed: Python would take many times its size for it.
_MOST_PARSED = 2**20
_JSON_SPACE = " \t\r\n"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Hold:
    """What ``hold_saga`` and ``release_saga`` are asked for, checked.

    ``until`` is None for a hold without an end, and for a release.
    """

    saga_id: UUID
    by: str
    reason: str
    releases: bool = False
    until: datetime | None = None

    def check(self, held_until: str | None, now: datetime) -> None:
        """Refuse what can't be done to a saga that is held so long, at this time of the database's."""
        if self.releases and held_until is None:
            raise InvalidSagaDataError("saga_id", f"names a saga that isn't held: {self.saga_id}")
        if self.until is not None and self.until <= now:
            raise InvalidSagaDataError(
                "until",
                f"must be in the future, and {self.until.isoformat()} isn't; leave it out for a hold without end",
            )

    def step(self, before: Mapping[str, object]) -> LogStep:
        """Return the entry that records it, given what was there before."""
        verb = "release_saga" if self.releases else "hold_saga"
        rest = dict(before)
        if not self.releases:
            rest["until"] = None if self.until is None else self.until.isoformat()
        details = record(self.by, self.reason, rest)
        return LogStep(f"{INTERVENTION}{verb}", "act", SagaStepStatus.COMPLETED, details)


@dataclass(frozen=True, slots=True)
class Change:
    """How a line of the ledger changes: from one of these states to another, with these values."""

    archive_id: UUID
    before: frozenset[ArchiveState]
    after: ArchiveState
    values: Mapping[str, str | int | None]

    def refusal(self, found: SagaArchive) -> InvalidSagaDataError:
        allowed = " or ".join(sorted(self.before - {self.after}))
        return InvalidSagaDataError(
            "archive_id", f"names an archive that is {found.state}, not {allowed}: {self.archive_id}"
        )


@dataclass(frozen=True, slots=True)
class Terms:
    """A policy, checked: how many seconds finished sagas are kept, None for ever."""

    completed: float | None
    failed: float | None
    names: Mapping[str, float | None]

    def seconds(self, name: str, status: SagaStatus) -> float | None:
        if name in self.names:
            return self.names[name]
        return self.completed if status is SagaStatus.COMPLETED else self.failed

    @property
    def least(self) -> float | None:
        """The shortest of them; None if everything is kept for ever."""
        return min(self.finite, default=None)

    @property
    def finite(self) -> set[float]:
        """Those after which something goes."""
        return {term for term in (self.completed, self.failed, *self.names.values()) if term is not None}


def checked_terms(policy: Retention) -> Terms:
    """Check a policy.

    Raises:
        InvalidSagaDataError: A negative duration, or an impossible name.
    """
    names = policy.names
    if not isinstance(names, Mapping):
        raise InvalidSagaDataError("names", f"must be a dict of names and durations, not a {type(names).__name__}")
    return Terms(
        _valid_term("completed", policy.completed),
        _valid_term("failed", policy.failed),
        {valid_name("names", name): _valid_term("names", term) for name, term in names.items()},
    )


def _valid_term(field: str, term: object) -> float | None:
    return None if term is None else valid_period(field, term).total_seconds()


class CheckedSnapshot(RetentionSnapshot):
    """A snapshot that checks what it is asked."""

    async def find_expired(self, policy: Retention, *, after: str | None = None, limit: int = 1000) -> ExpiredPage:
        terms, cursor = checked_terms(policy), read_cursor(after)
        limit = min(valid_count("limit", limit, least=1), MOST_MARKS)
        if terms.least is None:
            return ExpiredPage([])
        return await self._find(terms, cursor, limit)

    @abc.abstractmethod
    async def _find(self, terms: Terms, after: Cursor | None, limit: int) -> ExpiredPage:
        """Return what ``find_expired`` promises."""


class RetentionStorage(IRetentionStorage):
    """What a storage has to do, once it is checked."""

    _joins = False

    def _call_joins(self) -> bool:
        """Whether a call made here and now is part of a transaction that the caller commits."""
        return self._joins

    @abc.abstractmethod
    async def _hold(self, hold: Hold) -> None:
        """Hold or release, and record it."""

    @abc.abstractmethod
    def _archiving(self, by: str) -> AbstractAsyncContextManager[ArchivingTurn]:
        """Do what ``archiving`` promises."""

    @abc.abstractmethod
    def _snapshot(self) -> AbstractAsyncContextManager[RetentionSnapshot]:
        """Do what ``snapshot`` promises."""

    @abc.abstractmethod
    async def _add_archive(self, archive_id: UUID, uri: str | None, by: str) -> SagaArchive:
        """Add a line that is WRITING, and return it; or return the one that has this id."""

    @abc.abstractmethod
    async def _change_archive(self, change: Change) -> SagaArchive | None:
        """Change a line, and return it; None if there is none in one of those states."""

    @abc.abstractmethod
    async def _fetch_archive(self, archive_id: UUID) -> SagaArchive | None: ...

    @abc.abstractmethod
    async def _fetch_archives(self, states: Sequence[ArchiveState], limit: int, after: Cursor | None) -> ArchivePage:
        """Return what ``find_archives`` promises."""

    @abc.abstractmethod
    async def _fetch_stub(self, saga_id: UUID) -> SagaStub | None: ...

    @abc.abstractmethod
    async def _make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade | None:
        """Do what ``make_stubs`` promises; None if there is no VERIFIED archive of this id."""

    @abc.abstractmethod
    async def _restore(
        self, records: Sequence[SagaRecord], archive_id: UUID | None, keep_for: timedelta
    ) -> list[Restored]:
        """Do what ``restore_sagas`` promises, for different sagas."""

    @abc.abstractmethod
    async def _forget(self, older_than: timedelta, limit: int, after: Cursor | None) -> tuple[int, Cursor | None]:
        """Delete some of what ``forget_stubs`` deletes, from there on; return how many, and where the rest begins."""

    @abc.abstractmethod
    async def _fetch_lag(self, terms: Terms) -> timedelta:
        """Return for how long the oldest saga that should be gone has been so; zero if there is none."""

    async def hold_saga(self, saga_id: UUID, *, by: str, reason: str, until: datetime | None = None) -> None:
        end = None if until is None else valid_moment("until", until)
        await self._hold(Hold(valid_id(saga_id), *valid_person(by, reason), until=end))

    async def release_saga(self, saga_id: UUID, *, by: str, reason: str) -> None:
        await self._hold(Hold(valid_id(saga_id), *valid_person(by, reason), releases=True))

    def archiving(self, *, by: str) -> AbstractAsyncContextManager[ArchivingTurn]:
        self._check_commits()
        return self._archiving(valid_name("by", by))

    def snapshot(self) -> AbstractAsyncContextManager[RetentionSnapshot]:
        self._check_commits()
        return self._snapshot()

    async def begin_archive(self, archive_id: UUID, *, uri: str | None, by: str) -> SagaArchive:
        self._check_commits()
        _valid_archive_id(archive_id)
        uri = None if uri is None else _valid_line("uri", uri)
        by = valid_name("by", by)
        archive = await self._add_archive(archive_id, uri, by)
        if (archive.uri, archive.by, archive.state) != (uri, by, ArchiveState.WRITING):
            raise InvalidSagaDataError(
                "archive_id", f"is that of another archive, which is {archive.state}: {archive_id}"
            )
        return archive

    async def verify_archive(  # noqa: PLR0913 - as in the interface
        self,
        archive_id: UUID,
        *,
        sha256: str | None,
        sagas: int,
        entries: int,
        bytes: int,  # noqa: A002 - as in the interface
        watermark: str | None,
    ) -> SagaArchive:
        if sha256 is not None and not _SHA256.fullmatch(valid_text("sha256", sha256)):
            raise InvalidSagaDataError("sha256", f"must be 64 hexadecimal digits, not {sha256!r:.80}")
        read_cursor(watermark)
        values = {
            "sha256": sha256,
            "sagas": valid_big_count("sagas", sagas),
            "entries": valid_big_count("entries", entries),
            "bytes": valid_big_count("bytes", bytes),
            "watermark": watermark,
        }
        return await self._change(archive_id, {ArchiveState.WRITING}, ArchiveState.VERIFIED, values)

    async def fail_archive(self, archive_id: UUID, *, error: str) -> SagaArchive:
        values = {"error": _valid_line("error", error)}
        return await self._change(
            archive_id, {ArchiveState.WRITING, ArchiveState.VERIFIED}, ArchiveState.FAILED, values
        )

    async def finish_archive(self, archive_id: UUID) -> SagaArchive:
        return await self._change(archive_id, {ArchiveState.VERIFIED}, ArchiveState.REMOVED, {})

    async def get_archive(self, archive_id: UUID) -> SagaArchive:
        archive = await self._fetch_archive(_valid_archive_id(archive_id))
        if archive is None:
            raise _no_archive(archive_id)
        return archive

    async def find_archives(
        self, *, states: Sequence[ArchiveState] = (), limit: int = 50, after: str | None = None
    ) -> ArchivePage:
        if isinstance(states, str) or not isinstance(states, Sequence):
            raise InvalidSagaDataError("states", f"must be a list of ArchiveState, not {states!r:.60}")
        wanted = [valid_member("states", ArchiveState, state) for state in states]
        limit = min(valid_count("limit", limit, least=1), _LONGEST_PAGE)
        return await self._fetch_archives(wanted, limit, read_cursor(after))

    async def find_stub(self, saga_id: UUID) -> SagaStub | None:
        return await self._fetch_stub(valid_id(saga_id))

    async def make_stubs(self, archive_id: UUID, marks: Sequence[SagaMark]) -> StubsMade:
        self._check_commits()
        _valid_archive_id(archive_id)
        checked = {mark.id: mark for mark in _valid_sequence("marks", marks, SagaMark)}
        if len(checked) > MOST_MARKS:
            raise InvalidSagaDataError("marks", f"must be at most {MOST_MARKS}, not {len(checked)}; make several calls")
        for mark in checked.values():
            valid_id(mark.id)
            for field in ("version", "entries", "last_entry_id"):
                valid_big_count(field, getattr(mark, field))
        made = await self._make_stubs(archive_id, list(checked.values()))
        if made is None:
            raise Change(archive_id, frozenset({ArchiveState.VERIFIED}), ArchiveState.REMOVED, {}).refusal(
                await self.get_archive(archive_id)
            )
        return made

    async def restore_saga(
        self, record: SagaRecord, *, archive_id: UUID | None = None, keep_for: timedelta = KEPT_AFTER_RESTORE
    ) -> Restored:
        [restored] = await self.restore_sagas([record], archive_id=archive_id, keep_for=keep_for)
        return restored

    async def restore_sagas(
        self,
        records: Sequence[SagaRecord],
        *,
        archive_id: UUID | None = None,
        keep_for: timedelta = KEPT_AFTER_RESTORE,
    ) -> list[Restored]:
        self._check_commits()
        keep_for = valid_period("keep_for", keep_for)
        checked = [checked_record(one) for one in _valid_sequence("records", records, SagaRecord)]
        ids = [one.id for one in checked]
        if len(set(ids)) < len(ids):
            twice = next(saga_id for saga_id in ids if ids.count(saga_id) > 1)
            raise InvalidSagaDataError("records", f"must be of different sagas, and two are of {twice}")
        if archive_id is not None:
            archive_id = _valid_archive_id(archive_id)
        return await self._restore(checked, archive_id, keep_for) if checked else []

    async def forget_stubs(self, *, older_than: timedelta, limit: int = 1000) -> int:
        self._check_commits()
        limit = min(valid_count("limit", limit), MOST_MARKS)
        older_than = valid_period("older_than", older_than)
        forgotten, after = 0, None
        while forgotten < limit:
            gone, after = await self._forget(older_than, limit - forgotten, after)
            forgotten += gone
            if after is None:
                break
        return forgotten

    async def forget_all_stubs(self, *, older_than: timedelta, at_once: int = 1000) -> AsyncIterator[int]:
        self._check_commits()
        at_once = min(valid_count("at_once", at_once, least=1), MOST_MARKS)
        older_than = valid_period("older_than", older_than)
        after = None
        while True:
            gone, after = await self._forget(older_than, at_once, after)
            yield gone
            if after is None:
                return

    async def _change(
        self,
        archive_id: UUID,
        before: set[ArchiveState],
        after: ArchiveState,
        values: Mapping[str, str | int | None],
    ) -> SagaArchive:
        """Change a line; once more is as good as once, since an answer may get lost."""
        self._check_commits()
        change = Change(_valid_archive_id(archive_id), frozenset(before), after, values)
        changed = await self._change_archive(change)
        if changed is None:
            changed = await self.get_archive(archive_id)
            if changed.state is not after or any(getattr(changed, name) != value for name, value in values.items()):
                raise change.refusal(changed)
        return changed

    def _check_commits(self) -> None:
        if self._call_joins():
            raise InvalidSagaDataError(
                "bind", "must be one with which the storage commits its own calls: archiving takes several transactions"
            )


def checked_record(record: SagaRecord) -> SagaRecord:
    """Return the record, if a finished saga can be as it says.

    Raises:
        InvalidSagaDataError: It can't; the field says what of it.
    """
    valid_id(record.id)
    valid_name("name", record.name)
    if valid_member("status", SagaStatus, record.status) in UNFINISHED:
        raise InvalidSagaDataError(
            "status", f"must be COMPLETED or FAILED in a record, not {record.status}: {record.id}"
        )
    _check_context(record)
    valid_count("version", record.version, least=1)
    valid_count("recovery_attempts", record.recovery_attempts)
    for field in ("created_at", "updated_at"):
        valid_moment(field, getattr(record, field))
    for entry in _valid_sequence("entries", record.entries, SagaLogEntry):
        valid_step(LogStep(entry.step_name, entry.action, entry.status, entry.details))
        valid_moment("created_at", entry.created_at)
        valid_big_count("entries", entry.id)
    ids = [entry.id for entry in record.entries]
    if any(later <= earlier for earlier, later in pairwise(ids)):
        raise InvalidSagaDataError("entries", f"must be in the order of their ids: {record.id}")
    return record


def _check_context(record: SagaRecord) -> None:
    text = valid_text("context", record.context)
    is_object = text.lstrip(_JSON_SPACE).startswith("{") and text.rstrip(_JSON_SPACE).endswith("}")
    if is_object and len(text) <= _MOST_PARSED:
        try:
            json.loads(text, parse_int=str, parse_float=str)
        except RecursionError:
            pass  # deeper than Python reads, but PostgreSQL has had it
        except ValueError:
            is_object = False
    if not is_object:
        raise InvalidSagaDataError("context", f"must be the text of a JSON object: {text!r:.60} of {record.id}")


def check_is_object(context: str) -> None:
    """Raise ValueError if this isn't the beginning of an object, as JSON's text."""
    if not context.lstrip(_JSON_SPACE).startswith("{"):
        raise ValueError(f"its context is no JSON object: {context!r:.60}")


def same_content(record: SagaRecord, other: SagaRecord) -> bool:
    """Whether both tell the same, but for the ids of entries."""
    return _content(record) == _content(other)


def _content(record: SagaRecord) -> tuple[object, ...]:
    entries = [
        (entry.step_name, entry.action, entry.status, entry.details, entry.created_at) for entry in record.entries
    ]
    return (
        *(record.id, record.name, record.status, record.context, record.version, record.recovery_attempts),
        *(record.created_at, record.updated_at, entries),
    )


def _valid_archive_id(archive_id: object) -> UUID:
    if not isinstance(archive_id, UUID):
        raise InvalidSagaDataError("archive_id", f"must be a uuid.UUID, not {archive_id!r:.60}")
    return archive_id


def _no_archive(archive_id: UUID) -> InvalidSagaDataError:
    return InvalidSagaDataError("archive_id", f"names no archive of the ledger: {archive_id}")


def _valid_line(field: str, text: object) -> str:
    line = valid_text(field, text)
    if not line or len(line.splitlines()) > 1:
        raise InvalidSagaDataError(field, f"must be one line, not {line!r:.60}")
    return line


def _valid_sequence(field: str, values: object, kind: type[_T]) -> Sequence[_T]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InvalidSagaDataError(field, f"must be a list of {kind.__name__}, not a {type(values).__name__}")
    for value in values:
        if not isinstance(value, kind):
            raise InvalidSagaDataError(field, f"must hold {kind.__name__} objects, not a {type(value).__name__}")
    return values
