"""What can go wrong with an archive, beyond what can go wrong with a storage."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from saga_store.errors import SagaStoreError


class ArchiveError(SagaStoreError):
    """Base of what goes wrong with archives; nothing was removed that isn't in a verified one."""


class TargetError(ArchiveError):
    """The target couldn't do it: it isn't there, refuses, is full or slow, or holds what isn't an archive.

    ``target`` names it without credentials, ``reason`` says what to do.
    """

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(target, reason)
        self.target = target
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.target}: {self.reason}"


class ArchiveDamagedError(ArchiveError):
    """An archive isn't what was written, or never was one; ``file`` says which, ``line`` where, if it is one line."""

    def __init__(self, file: str, line: int | None, reason: str) -> None:
        super().__init__(file, line, reason)
        self.file = file
        self.line = line
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


class ShardsFailedError(ArchiveError):
    """Some shards failed, and the others are done; once more completes what is left.

    ``errors`` says what went wrong, by the places of the shards; ``report`` what was done on all of them.
    """

    def __init__(self, errors: Mapping[int, SagaStoreError], report: Any) -> None:  # noqa: ANN401 - a verb's own
        super().__init__(errors, report)
        self.errors = errors
        self.report = report

    def __str__(self) -> str:
        failed = "; ".join(f"shard {place}: {error}" for place, error in sorted(self.errors.items()))
        return f"{failed}; the other shards are done, and once more completes the rest"


@contextmanager
def on_disk(*kinds: type[Exception]) -> Iterator[None]:
    """Translate what goes wrong with temporary files: an OSError, or one of these kinds."""
    translated: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except translated as exc:
        raise ArchiveError(
            f"the folder for temporary files, {tempfile.tempdir or 'which TMPDIR names'}, can't take them: {exc}; free "
            "some space there, or name another one by TMPDIR"
        ) from exc
