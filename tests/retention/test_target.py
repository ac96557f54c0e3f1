"""Targets: what is there, what isn't, what a slow or broken one does to its caller, and that no password gets out."""

import asyncio
import errno
import gc
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from saga_store.retention import ArchiveDamagedError, Target, TargetError
from saga_store.retention.target import MARKER, Writing, temporary, without_secrets
from tests.retention.faulty import Faults

SECRET = "hunter2-s3cret"  # noqa: S105 - what must not be seen


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture(params=["folder", "memory"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    return Target(str(tmp_path) if request.param == "folder" else "memory://sagas")


async def put(target: Target, path: str, content: bytes = b"x") -> None:
    await target.write(path, content)


class TestFiles:
    async def test_what_is_written_is_there_under_its_name_alone(self, target: Target) -> None:
        """Nothing is left under the name that it had while it was written."""
        await target.prepare()
        writing = await Writing.begin(target, "2026/11/26/a.jsonl.gz")
        await writing.write([b"one, ", b"two"])
        assert await target.files("2026") == [temporary("2026/11/26/a.jsonl.gz")]
        await writing.finish()

        assert await target.files() == ["2026/11/26/a.jsonl.gz", MARKER]
        assert await target.read("2026/11/26/a.jsonl.gz") == b"one, two"

    async def test_what_is_missing_is_told(self, target: Target) -> None:
        """And removing it is no mistake."""
        await target.prepare()

        with pytest.raises(ArchiveDamagedError, match=r"x\.jsonl\.gz: isn't there"):
            await target.read("x.jsonl.gz")
        await target.remove("x.jsonl.gz")
        assert await target.files("nowhere") == []

    async def test_names_lead_back(self, target: Target) -> None:
        await put(target, "a/b")

        assert target.path(target.uri("a/b")) == "a/b"
        assert target.path("s3://elsewhere/a/b") is None


class TestPrepare:
    async def test_an_empty_one_becomes_a_place_for_archives(self, target: Target) -> None:
        """And is one from then on, whatever archives it has."""
        await target.prepare(writes=False)
        assert await target.files() == []
        await target.prepare()
        await put(target, "2026/11/26/a.jsonl.gz")
        await target.prepare()

        assert MARKER in await target.files()

    async def test_foreign_files_are_in_the_way(self, target: Target) -> None:
        """One is named; what is hidden, or a file system's own, isn't."""
        await put(target, ".Trash/x")
        await target.prepare(writes=False)
        await put(target, "holiday.jpg")

        with pytest.raises(TargetError, match=r"isn't for archives.*holiday\.jpg.*a folder of its own"):
            await target.prepare()

    async def test_a_folder_that_is_missing_isnt_made(self, tmp_path: Path) -> None:
        """Its disk may not be mounted, and what is written below the mount is lost."""
        missing = tmp_path / "missing"

        with pytest.raises(TargetError, match="there is no such folder; make it, or mount what it is on"):
            await Target(str(missing)).prepare()
        assert not await Target(str(tmp_path)).files()

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b'{"format": "saga-store archive", "version": 2}', "is of format 2, and this release reads 1"),
            (b"hello", "doesn't say that it is a saga-store archive"),
        ],
    )
    async def test_one_of_another_format_is_refused(self, target: Target, content: bytes, reason: str) -> None:
        await put(target, MARKER, content)

        with pytest.raises(ArchiveDamagedError, match=f"{MARKER}: {reason}"):
            await target.prepare()

    @pytest.mark.parametrize(
        ("uri", "reason"),
        [
            ("", "is no URI"),
            (" ", "is no URI"),
            ("/tmp/\0", "is no URI"),  # noqa: S108 - it is refused
            ("nosuch://x", "nosuch"),
            ("gs://bucket/x", "its library isn't installed here"),
        ],
    )
    def test_what_is_no_target_is_refused(self, uri: str, reason: str) -> None:
        """In one line."""
        with pytest.raises(TargetError, match=reason) as raised:
            Target(uri)
        assert "\n" not in str(raised.value)


class TestFailing:
    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), "it is full .*No space left.*nothing was removed"),
            (PermissionError(errno.EACCES, "Permission denied"), "it refuses .*see what this user may do"),
            (FileNotFoundError("The specified bucket does not exist"), "it isn't there .*bucket does not exist"),
            (ValueError("two\nlines"), "writing a.jsonl failed: ValueError: two lines"),
            (MemoryError(), "MemoryError"),
        ],
    )
    async def test_whatever_it_raises_is_told_in_one_line(self, faults: Faults, error: Exception, reason: str) -> None:
        """With what was being done, and what to do now."""
        faults.fails_at, faults.error = 1, lambda: error

        with pytest.raises(TargetError, match=reason) as raised:
            await Target("faulty://x").write("a.jsonl", b"x")
        assert "\n" not in str(raised.value)
        assert raised.value.target == "faulty://x"

    async def test_one_that_does_nothing_is_given_up(self, faults: Faults) -> None:
        """After its patience; the loop goes on meanwhile, and so does the program."""
        faults.hangs = threading.Event()
        target = Target("faulty://x", patience=timedelta(seconds=0.2))
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        with pytest.raises(TargetError, match=r"did nothing for 0\.2 s"):
            await target.read("a")
        ticking.cancel()
        faults.hangs.set()
        assert ticks > 1

    async def test_who_is_cancelled_doesnt_wait_for_it(self, faults: Faults) -> None:
        """Ctrl-C works, however long the target takes."""
        faults.hangs = threading.Event()
        began = time.monotonic()

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await Target("faulty://x").read("a")
        faults.hangs.set()
        assert time.monotonic() - began < 20

    async def test_one_that_is_slow_and_gets_on_isnt_given_up(self, faults: Faults) -> None:
        """Patience is for silence, not for the whole."""
        target = Target("faulty://x", patience=timedelta(seconds=0.5))
        writing = await Writing.begin(target, "a")
        faults.hangs = threading.Event()
        threading.Timer(0.2, faults.hangs.set).start()

        await writing.write([b"x"] * 3)
        await writing.finish()
        assert await target.read("a") == b"xxx"


class Uploading(AbstractBufferedFile):  # type: ignore[misc] # fsspec is untyped
    """Goes up when it is closed, and that is when it is collected, too."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__(MemoryFileSystem(), "/x", mode="wb")
        self.seen = seen
        self.is_let_go = threading.Event()

    def _initiate_upload(self) -> None:
        self.seen.append("begun")

    def _upload_chunk(self, final: bool = False) -> bool:  # noqa: FBT001, FBT002 - as fsspec calls it
        self.seen.append("uploaded" if final else "part")
        return True

    def discard(self) -> None:
        self.seen.append("discarded")
        self.is_let_go.set()


async def test_of_a_write_that_fails_nothing_comes_later(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the file is collected, long after what there was of it has been removed."""
    seen: list[str] = []
    files = [Uploading(seen)]
    monkeypatch.setattr(target, "open_new", lambda _: files[0])

    def pieces() -> Iterator[bytes]:
        yield b"x"
        raise OSError(errno.EIO, "the disk is broken")

    with pytest.raises(OSError, match="the disk is broken"):
        await target.write_pieces("a", pieces())
    assert await asyncio.to_thread(files[0].is_let_go.wait, 20)
    files.clear()
    gc.collect()
    assert seen == ["discarded"]


class TestSecrets:
    @pytest.mark.parametrize(
        "uri",
        [
            f"faulty://user:{SECRET}@host/sagas",
            f"faulty://{SECRET}@host/sagas",
            f"faulty://host/sagas?sig={SECRET}",
            f"faulty://host/sagas#{SECRET}",
            f"faulty://user:{SECRET.replace('-', '%2D')}@host/sagas",
        ],
    )
    async def test_no_credential_of_a_uri_is_ever_seen(
        self, faults: Faults, caplog: pytest.LogCaptureFixture, uri: str
    ) -> None:
        """Not in the target's name, nor in errors, their causes and tracebacks, nor in the log."""
        caplog.set_level(logging.DEBUG)
        target = Target(uri)
        faults.fails_at = 1
        faults.error = lambda: OSError(f"403 for {uri}: {SECRET} is wrong")

        with pytest.raises(TargetError) as raised:
            await target.write("a", b"x")
        seen = "".join(traceback.format_exception(raised.value)) + repr(target) + target.name + caplog.text
        assert SECRET not in seen
        assert SECRET.replace("-", "%2D") not in seen
        assert raised.value.__context__ is None

    async def test_nor_one_of_its_options(self, faults: Faults) -> None:
        """Whatever their names have of secrets, also below others."""
        target = Target("faulty://x", key="AKIAXXXX", client_kwargs={"aws_secret_access_key": SECRET}, region="eu")
        faults.fails_at, faults.error = 1, lambda: OSError(f"AKIAXXXX:{SECRET} is wrong in eu")

        with pytest.raises(TargetError, match=r"\*\*\*:\*\*\* is wrong in eu") as raised:
            await target.write("a", b"x")
        assert SECRET not in "".join(traceback.format_exception(raised.value))

    @pytest.mark.parametrize("broken", [Target, lambda uri: Target(uri, protocol=1)])
    def test_nor_one_of_a_uri_that_isnt_understood(self, broken: Callable[[str], Target]) -> None:
        with pytest.raises(TargetError) as raised:
            broken(f"nosuch://user:{SECRET}@host/x?token={SECRET}")
        assert SECRET not in "".join(traceback.format_exception(raised.value))

    def test_a_name_is_the_uri_without_them(self) -> None:
        assert without_secrets(f"ftp://me:{SECRET}@host:21/a/b?x={SECRET}#y") == "ftp://host:21/a/b"
        assert without_secrets("s3://bucket/a") == "s3://bucket/a"
        assert without_secrets("s3://bucket/a@b") == "s3://bucket/a@b"
        assert without_secrets("http://host:80/a@b") == "http://host:80/a@b"

    @pytest.mark.parametrize("odd", ["@", "'", '"', " ", "/", "?", "#", "%40", "@x@"])
    def test_whatever_a_password_is_made_of(self, odd: str) -> None:
        """Also if it isn't escaped as it should be."""
        uri = f"ftp://me:{SECRET}{odd}{SECRET}@127.0.0.1:1/a"
        if odd not in "/?#":
            assert without_secrets(uri) == "ftp://127.0.0.1:1/a"
        with pytest.raises(TargetError) as raised:
            Target(uri)
        assert SECRET not in "".join(traceback.format_exception(raised.value))

    def test_a_path_leads_nowhere_else(self, tmp_path: Path) -> None:
        """The ledger may say what it likes."""
        target = Target(str(tmp_path))
        assert target.path(target.uri("2026/a.jsonl.gz")) == "2026/a.jsonl.gz"
        for path in ("../a", "2026/../../a", "2026//a", "./a", ""):
            assert target.path(f"{target.name}/{path}") is None
