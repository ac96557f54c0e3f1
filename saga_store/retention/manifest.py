"""What stands beside an archive's object and says what is in it; no I/O."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from saga_store.retention.errors import ArchiveDamagedError
from saga_store.retention.lines import read_moment, read_uuid, read_whole, written
from saga_store.retention_model import SagaMark

FORMAT = "saga-store archive"
VERSION = 1
MANIFEST = ".manifest.json"

SUFFIXES = {"gzip": ".jsonl.gz", "zstd": ".jsonl.zst"}
"""How an object's name ends, by how it is compressed."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Of a line: id, version, entries, last entry, SHA-256.
_FIELDS = 5


@dataclass(frozen=True, slots=True)
class Line:
    """A line of an object: what the saga was, and the SHA-256 of the line without its newline."""

    mark: SagaMark
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an object holds: ``path`` is the object's, ``lines`` its lines in order; ``written_at`` by its archiver."""

    id: UUID
    path: str
    sha256: str
    bytes: int
    lines: Sequence[Line]
    written_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def marks(self) -> list[SagaMark]:
        return [line.mark for line in self.lines]

    @property
    def entries(self) -> int:
        return sum(line.mark.entries for line in self.lines)

    @property
    def own_path(self) -> str:
        return manifest_path(self.path)


def object_path(archive_id: UUID, day: datetime, compression: str) -> str:
    """Return where an object goes: by the day, so that old ones are found, and expire, by their folder."""
    return f"{day.astimezone(UTC):%Y/%m/%d}/{archive_id}{SUFFIXES[compression]}"


def compression_of(path: str) -> str | None:
    """Return how an object is compressed; None if the path is no object's."""
    return next((name for name, suffix in SUFFIXES.items() if path.endswith(suffix)), None)


def manifest_path(path: str) -> str:
    """Return the path of the manifest of an object, or of a manifest."""
    for suffix in (*SUFFIXES.values(), MANIFEST):
        path = path.removesuffix(suffix)
    return path + MANIFEST


def parquet_paths(path: str) -> tuple[str, str]:
    """Return where an object's Parquet files are: of its sagas, and of their entries."""
    stem = manifest_path(path).removesuffix(MANIFEST)
    return f"{stem}.sagas.parquet", f"{stem}.entries.parquet"


def encode_manifest(manifest: Manifest) -> bytes:
    """Write it with a saga on each line, so that people and line-based tools can read it, too."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "id": str(manifest.id),
        "object": manifest.path.rpartition("/")[2],
        "sha256": manifest.sha256,
        "bytes": manifest.bytes,
        "sagas": len(manifest.lines),
        "entries": manifest.entries,
        "written_at": written(manifest.written_at),
    }
    lines = ",\n".join(
        json.dumps([str(line.mark.id), line.mark.version, line.mark.entries, line.mark.last_entry_id, line.sha256])
        for line in manifest.lines
    )
    return f'{json.dumps(head)[:-1]}, "lines": [\n{lines}\n]}}\n'.encode("ascii")


def decode_manifest(content: bytes, path: str, uri: str) -> Manifest:
    """Read a manifest.

    Args:
        content: What is stored.
        path: Where; its object is beside it.
        uri: How to call it in errors.

    Raises:
        ArchiveDamagedError: It is none, of another format, or contradicts itself.
    """
    found = check_format(content, uri)
    try:
        return _manifest(found, path)
    except (ValueError, TypeError, KeyError) as exc:
        missing = f"it lacks {exc}" if isinstance(exc, KeyError) else str(exc)
        raise ArchiveDamagedError(uri, None, f"is no manifest, or was changed: {missing}") from exc


def check_format(content: bytes, uri: str) -> dict[str, Any]:
    """Return what a marker or manifest holds.

    Raises:
        ArchiveDamagedError: It is neither, or of a format that this release doesn't know.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT or type(found.get("version")) is not int:
        raise ArchiveDamagedError(uri, None, f"doesn't say that it is a {FORMAT}; it isn't one, or it was changed")
    if found["version"] != VERSION:
        raise ArchiveDamagedError(
            uri, None, f"is of format {found['version']}, and this release reads {VERSION}: use a newer saga-store"
        )
    return found


def _manifest(found: dict[str, Any], path: str) -> Manifest:
    name = found["object"]
    folder, _, own_name = path.rpartition("/")
    # Nothing but what stands beside it: a manifest from elsewhere mustn't lead to other files.
    if not isinstance(name, str) or compression_of(name) is None or manifest_path(name) != own_name:
        raise ValueError(f"its object is {name!r:.80}, which isn't beside it")
    if not isinstance(found["lines"], list):
        raise TypeError("its lines are no list")
    lines = [_line(number, each) for number, each in enumerate(found["lines"], 1)]
    manifest = Manifest(
        read_uuid(found["id"]),
        f"{folder}/{name}" if folder else name,
        _sha256(found["sha256"]),
        read_whole("bytes", found["bytes"]),
        lines,
        read_moment("written_at", found["written_at"]),
    )
    if (found["sagas"], found["entries"]) != (len(lines), manifest.entries):
        raise ValueError("its lines don't add up to the sagas and entries that it has")
    return manifest


def _line(number: int, found: object) -> Line:
    if not isinstance(found, list) or len(found) != _FIELDS:
        raise ValueError(f"line {number} isn't id, version, entries, last entry and SHA-256")
    saga_id, version, entries, last_entry_id, sha256 = found
    mark = SagaMark(
        read_uuid(saga_id),
        read_whole("version", version, least=1),
        read_whole("entries", entries),
        read_whole("last entry", last_entry_id),
    )
    return Line(mark, _sha256(sha256))


def _sha256(value: object) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{value!r:.80} is no SHA-256 of 64 hexadecimal digits")
    return value
