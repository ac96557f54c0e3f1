"""The format: what is written comes back; what was changed, cut off or never an archive is told by file and line."""

import gzip
import hashlib
import io
import json
import random
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saga_store import SagaLogEntry, SagaStatus, SagaStepStatus
from saga_store.retention import ArchiveDamagedError
from saga_store.retention.errors import ArchiveError
from saga_store.retention.files import ArchiveFile, Found, read_object
from saga_store.retention.lines import decode
from saga_store.retention.manifest import (
    SUFFIXES,
    Manifest,
    compression_of,
    decode_manifest,
    encode_manifest,
    manifest_path,
    object_path,
)
from saga_store.retention_model import SagaHead, SagaMark, SagaRecord

NOW = datetime(2026, 11, 26, 9, 30, 0, 123456, tzinfo=UTC)
URI = "s3://bucket/x.jsonl.zst"


def record(entries: int = 8, context: str = '{"a": 1.0, "a":2}', details: str | None = "no\n“way”") -> SagaRecord:
    saga_id = uuid4()
    history = [
        SagaLogEntry(7 + at, saga_id, "pay é", "act", SagaStepStatus.STARTED, details if at % 2 else None, NOW)
        for at in range(entries)
    ]
    return SagaRecord(saga_id, "order", SagaStatus.FAILED, context, 3, 1, NOW, NOW + timedelta(days=1), history)


def head(saga: SagaRecord) -> SagaHead:
    return SagaHead(saga.mark, saga.name, saga.status, saga.recovery_attempts, saga.created_at, saga.updated_at)


def archived(sagas: Sequence[SagaRecord], compression: str = "gzip") -> tuple[Manifest, bytes]:
    file = ArchiveFile(compression)
    for saga in sagas:
        file.write([head(saga), saga.context[:5], saga.context[5:], saga.entries[:3], saga.entries[3:], None])
    sha256, size = file.finish()
    content = b"".join(file.pieces())
    file.close()
    return Manifest(uuid4(), f"2026/11/26/x{SUFFIXES[compression]}", sha256, size, file.lines), content


def read(manifest: Manifest, content: bytes) -> list[Found]:
    return list(read_object(io.BytesIO(content), manifest, URI))


def rewritten(manifest: Manifest, lines: Sequence[bytes]) -> tuple[Manifest, bytes]:
    """Return an archive that somebody edited without leaving a trace in the hashes."""
    content = gzip.compress(b"".join(lines))
    marks = [
        type(line)(line.mark, hashlib.sha256(text.rstrip(b"\n")).hexdigest())
        for line, text in zip(manifest.lines, lines, strict=True)
    ]
    return Manifest(manifest.id, manifest.path, hashlib.sha256(content).hexdigest(), len(content), marks), content


class TestRoundTrip:
    @pytest.mark.parametrize("compression", SUFFIXES)
    def test_sagas_come_back_to_the_letter(self, compression: str) -> None:
        """Contexts with the spaces, numbers and double keys they had, histories in order, times to the microsecond."""
        sagas = [record(0), record(1), record(8), record(2000, context='{"x":"%s"}' % ("€" * 3_000_000))]
        manifest, content = archived(sagas, compression)

        assert [found.record for found in read(manifest, content)] == sagas
        assert [found.line for found in read(manifest, content)] == [1, 2, 3, 4]
        assert (len(manifest.lines), manifest.entries) == (4, 2009)

    @settings(max_examples=60, deadline=None)
    @given(
        name=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=255),
        context=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
        details=st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
        moment=st.datetimes(timezones=st.just(UTC)),
        number=st.integers(1, 2**63 - 1),
    )
    def test_whatever_a_database_can_hold_is_a_line_of_ascii(
        self, name: str, context: str, details: str | None, moment: datetime, number: int
    ) -> None:
        saga_id = UUID(int=number)
        entry = SagaLogEntry(number, saga_id, name, "compensate", SagaStepStatus.COMPENSATED, details, moment)
        saga = SagaRecord(saga_id, name, SagaStatus.COMPLETED, context, number, 0, moment, moment, [entry])
        manifest, content = archived([saga])

        assert gzip.decompress(content).isascii()
        assert gzip.decompress(content).count(b"\n") == 1
        assert read(manifest, content)[0].record == saga

    def test_a_line_is_what_the_specification_shows(self) -> None:
        """The example of docs/archive-format.md, as anybody's JSON parser reads it."""
        manifest, content = archived([record(1)])
        [line] = gzip.decompress(content).splitlines()
        saga = json.loads(line)

        assert hashlib.sha256(line).hexdigest() == manifest.lines[0].sha256
        assert hashlib.sha256(content).hexdigest() == manifest.sha256
        assert json.loads(saga["context"]) == {"a": 2}
        assert saga["created_at"] == "2026-11-26T09:30:00.123456Z"
        assert saga["history"] == [
            {
                "id": 7,
                "step_name": "pay é",
                "action": "act",
                "status": "STARTED",
                "details": None,
                "created_at": "2026-11-26T09:30:00.123456Z",
            }
        ]

    def test_a_saga_that_turns_out_unreadable_is_taken_back(self) -> None:
        """What was written of it is gone, and the sagas before and after it are there."""
        one, two, broken = record(), record(), record()
        with closing(ArchiveFile("zstd")) as file:
            file.write([head(one), one.context, one.entries, None])
            position = file.begin_frame()
            file.write([head(broken), broken.context])
            file.take_back(position)
            file.write([head(two), two.context, two.entries, None])
            sha256, size = file.finish()
            manifest = Manifest(uuid4(), "x.jsonl.zst", sha256, size, file.lines)

            assert [found.record for found in read(manifest, b"".join(file.pieces()))] == [one, two]

    def test_entries_that_the_database_counted_and_nobody_read_stop_it(self) -> None:
        """The mark is of a statement of its own, and has to agree with what was read."""
        saga = record()
        problem = f"saga {saga.id} has 8 entries up to 14, and 7 up to 13 were read"

        with closing(ArchiveFile("gzip")) as file, pytest.raises(ArchiveError, match=problem):
            file.write([head(saga), saga.context, saga.entries[:-1], None])


class TestDamage:
    @pytest.mark.parametrize("compression", SUFFIXES)
    def test_whatever_is_changed_cut_or_added_is_noticed(self, compression: str) -> None:
        """A bit anywhere, an end anywhere, bytes behind the end, the same twice."""
        manifest, content = archived([record() for _ in range(20)], compression)
        chance = random.Random(1)  # noqa: S311 - repeatable
        damaged = [content[:length] for length in chance.sample(range(len(content)), 25)]
        damaged += [content + b"\0", content + content]
        for _ in range(60):
            changed = bytearray(content)
            changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            damaged.append(bytes(changed))

        for each in damaged:
            with pytest.raises(ArchiveDamagedError, match="^" + URI):
                read(manifest, each)

    def test_an_edited_line_is_named(self) -> None:
        """Also if it is compressed again."""
        manifest, content = archived([record() for _ in range(5)])
        lines = gzip.decompress(content).splitlines(keepends=True)
        lines[2] = lines[2].replace(b'"FAILED"', b'"COMPLETED"')

        with pytest.raises(ArchiveDamagedError, match=f"^{URI}, line 3: isn't what was written") as raised:
            read(manifest, gzip.compress(b"".join(lines)))
        assert (raised.value.file, raised.value.line) == (URI, 3)

    def test_lines_that_are_missing_or_too_many_are_named(self) -> None:
        manifest, content = archived([record() for _ in range(3)])
        lines = gzip.decompress(content).splitlines(keepends=True)

        with pytest.raises(ArchiveDamagedError, match="line 3: is missing"):
            read(manifest, gzip.compress(b"".join(lines[:2])))
        with pytest.raises(ArchiveDamagedError, match="line 4: is one too many"):
            read(manifest, gzip.compress(b"".join([*lines, lines[0]])))
        with pytest.raises(ArchiveDamagedError, match="line 3: is cut off"):
            read(manifest, gzip.compress(b"".join(lines)[:-1]))

    @pytest.mark.parametrize(
        ("old", "new", "reason"),
        [
            (b'{"id":"', b'{"id":"X', "is no UUID"),
            (b'"version":3', b'"version":0', "version 0 is no whole number from 1"),
            (b'"version":3', b'"version":3.0', "version 3.0 is no whole number"),
            (b'"version":3', b'"version":true', "version True is no whole number"),
            (b'"version":3', b'"version":4', "the manifest has"),
            (b'"version":3', b'"version":NaN', "has NaN, which JSON doesn't know"),
            (b'"FAILED"', b'"RUNNING"', "COMPLETED or FAILED"),
            (b'"FAILED"', b'["FAILED"]', "COMPLETED or FAILED"),
            (b'"name":"order"', b'"name":""', "name must not be empty"),
            (b'"name":"order"', b'"name":"or\\u0000der"', "must not contain NUL"),
            (b'"name":"order"', b'"name":"\\ud800"', "lone surrogate"),
            (b'"name":"order"', b'"title":"order"', "look at 'name, title'"),
            (b'"name":"order",', b"", "look at 'name'"),
            (b'"context":"', b'"context":{"a":"', "isn't JSON"),
            (b"00.123456Z", b"00.123456", "is no time like"),
            (b"2026-11-26T", b"2026-13-26T", "is no time like"),
            (b'"action":"act"', b'"action":"undo"', "entry 1: "),
            (b'"action":"act"', b'"action":[]', "entry 1: its action"),
            (b'"status":"STARTED"', b'"status":{}', "entry 1: its status"),
            (b'"id":8', b'"id":7', "entry 2: its id 7 doesn't follow 7"),
            (b'"history":[', b'"history":[1,', "entry 1: it is no object"),
            (b'"history":[{', b'"history":{"x":[{', "isn't JSON"),
            (b"pay ", b"pay\xff", "isn't ASCII"),
            (b'"recovery_attempts":1', b'"recovery_attempts":-1', "whole number from 0"),
            (b'"recovery_attempts":1', b'"recovery_attempts":' + b"[" * 100_000, "nested too deep"),
        ],
    )
    def test_a_line_that_is_no_saga_is_named_whatever_the_hashes_say(self, old: bytes, new: bytes, reason: str) -> None:
        """Somebody who edits an archive can compute hashes, too."""
        manifest, content = archived([record(), record(2)])
        lines = gzip.decompress(content).splitlines(keepends=True)
        assert old in lines[1]
        lines[1] = lines[1].replace(old, new, 1)

        with pytest.raises(ArchiveDamagedError, match=reason) as raised:
            read(*rewritten(manifest, lines))
        assert raised.value.line == 2

    def test_anything_at_all_is_a_line_or_a_reason(self) -> None:
        """Never another exception."""
        for line in (b"", b"null", b"[]", b"{}", b'"x"', b"1e999", b"\xff", b'{"id": 1}', b"[" * 10_000):
            with pytest.raises(ValueError, match=r"."):
                decode(line)


class TestManifest:
    def test_it_comes_back(self) -> None:
        """With a saga on each line."""
        manifest, _ = archived([record(), record(0)])
        content = encode_manifest(manifest)

        assert decode_manifest(content, manifest.own_path, URI) == manifest
        assert content.count(b"\n") == 4

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"format": "tar"}, "doesn't say that it is a saga-store archive"),
            ({"version": 2}, "is of format 2, and this release reads 1: use a newer saga-store"),
            ({"version": True}, "doesn't say that it is"),
            ({"object": "../../etc/passwd.jsonl.gz"}, "isn't beside it"),
            ({"object": "y.jsonl.gz"}, "isn't beside it"),
            ({"object": None}, "isn't beside it"),
            ({"sha256": "0" * 63}, "is no SHA-256"),
            ({"sagas": 3}, "don't add up"),
            ({"entries": 0}, "don't add up"),
            ({"bytes": -1}, "bytes -1 is no whole number"),
            ({"id": "x"}, "is no UUID"),
            ({"lines": {}}, "its lines are no list"),
            ({"lines": [[1, 2]]}, "line 1 isn't id, version"),
            ({"lines": [["x", 1, 1, 1, "y"]]}, "is no UUID"),
        ],
    )
    def test_one_that_was_changed_is_refused(self, changes: dict[str, object], reason: str) -> None:
        """In one line, which names the file; it leads to no other file."""
        manifest, _ = archived([record(), record()])
        content = json.dumps(json.loads(encode_manifest(manifest)) | changes).encode()

        with pytest.raises(ArchiveDamagedError, match=reason) as raised:
            decode_manifest(content, manifest.own_path, URI)
        assert raised.value.file == URI
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("content", [b"", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format":'])
    def test_what_is_none_is_refused(self, content: bytes) -> None:
        with pytest.raises(ArchiveDamagedError, match="doesn't say that it is a saga-store archive"):
            decode_manifest(content, "x.manifest.json", URI)

    def test_what_a_manifest_lacks_is_named(self) -> None:
        manifest, _ = archived([record()])
        found = json.loads(encode_manifest(manifest))
        del found["sha256"]

        with pytest.raises(ArchiveDamagedError, match="it lacks 'sha256'"):
            decode_manifest(json.dumps(found).encode(), manifest.own_path, URI)

    def test_objects_stand_in_a_folder_for_each_day(self) -> None:
        """Of UTC; manifests beside them."""
        archive_id = UUID(int=1)
        path = object_path(archive_id, NOW.astimezone().replace(hour=9), "zstd")

        assert path == f"2026/11/26/{archive_id}.jsonl.zst"
        assert manifest_path(path) == f"2026/11/26/{archive_id}.manifest.json"
        assert compression_of(path) == "zstd"
        assert compression_of("notes.txt") is None


def test_marks_say_what_to_compare() -> None:
    """A saga without entries has none to compare."""
    saga = record(0)

    assert saga.mark == SagaMark(saga.id, 3, 0, 0)
