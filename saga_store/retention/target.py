"""Where archives are kept: a folder of any file system that fsspec knows, such as ``s3://bucket/sagas``.

What fsspec does blocks, for as long as the other side pleases. So it is done in threads, and who is cancelled or has
waited long enough leaves them behind.
"""

import asyncio
import errno
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from saga_store.retention.errors import ArchiveDamagedError, ArchiveError, TargetError
from saga_store.retention.manifest import FORMAT, VERSION, check_format
from saga_store.retention.threads import in_thread

if TYPE_CHECKING:
    from io import BufferedIOBase

_T = TypeVar("_T")

MARKER = "saga-store-archive.json"
PATIENCE = timedelta(minutes=5)

_LOCAL = {"file", "local"}
# What file systems and desktops put into a folder by themselves.
_NOBODYS = {"lost+found"}
_SECRETS = re.compile(r"key|secret|token|pass|credential|connection_string|sas|auth", re.IGNORECASE)
_USER_INFO = re.compile(r"//[^/@\s'\"]+@")
# Of a URI, up to the last @ of its authority, for a password may have one.
_AUTHORITY = re.compile(r"//([^/?#]*)@")
# What would be one if its password were escaped; elsewhere it may be a path.
_LIKE_AUTHORITY = re.compile(r"//([^/?#@:]*:(?!\d*(?:[/?#]|$))[^@]*)@")
_QUERY = re.compile(r"\?[^\s'\"<>]+")
_SHORTEST_SECRET = 3
# Of a manifest, which has about 130 bytes for each of its sagas.
_SMALL = 256 * 2**20


class Call:
    """What runs in a thread; it says when it gets on, so that a slow target isn't taken for a dead one."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.is_abandoned = False

    def gets_on(self) -> None:
        """Say so.

        Raises:
            TargetError: Nobody waits for it any more.
        """
        if self.is_abandoned:
            raise TargetError("the target", "nobody waits for it any more")
        self._last = time.monotonic()

    def seconds_silent(self) -> float:
        return time.monotonic() - self._last


class Target:
    """A folder for archives.

    Args:
        uri: As fsspec has it: ``/folder``, ``file:///folder``, ``s3://bucket/prefix``, ``gs://``, ``memory://``.
        patience: For how long the target may do nothing before it counts as dead.
        options: For fsspec's file system, such as ``endpoint_url``, ``key`` and ``secret`` of S3.

    Raises:
        TargetError: The URI can't be understood, or its library isn't installed.
    """

    def __init__(self, uri: str, *, patience: timedelta = PATIENCE, **options: Any) -> None:  # noqa: ANN401 - fsspec's
        if not uri.strip() or "\0" in uri:
            raise TargetError(repr(uri)[:60], "is no URI; write one like s3://bucket/sagas or /srv/sagas")
        try:
            from fsspec.core import url_to_fs  # noqa: PLC0415 - of an extra
        except ImportError:
            raise TargetError(
                without_secrets(uri), "needs fsspec: install the extra, as in pip install 'saga-store[archive]'"
            ) from None
        self._secrets = _secrets(uri, options)
        self._patience = patience.total_seconds()
        self.name: str = without_secrets(uri).rstrip("/")
        root, problem = "", None
        try:
            self._fs, root = url_to_fs(uri, **options)
        except Exception as exc:  # noqa: BLE001 - each file system has errors of its own
            self.name = without_secrets(_LIKE_AUTHORITY.sub("//", uri)).rstrip("/")
            problem = self._problem("can't be used", exc)
        if problem:
            raise problem  # out here, where it has no context: that may have a password in it
        self._root = str(root).rstrip("/")
        protocol = self._fs.protocol
        self._is_local = bool(_LOCAL & {protocol} if isinstance(protocol, str) else _LOCAL & {*protocol})
        if self._is_local:
            self.name = f"file://{self._root}"

    @classmethod
    def of(cls, given: "str | os.PathLike[str] | Target") -> "Target":
        return given if isinstance(given, Target) else cls(os.fspath(given))

    def __repr__(self) -> str:
        return f"Target({self.name!r})"

    def uri(self, path: str) -> str:
        """Name what is at this path, without credentials."""
        return f"{self.name}/{path}" if path else self.name

    def path(self, uri: str) -> str | None:
        """Return the path of what has this name; None if it is elsewhere."""
        path = uri.removeprefix(f"{self.name}/")
        return None if path == uri or {"", ".", ".."} & {*path.split("/")} else path

    async def prepare(self, *, writes: bool = True) -> None:
        """See that it is there, and a place for archives; if it is to be written and is empty, make it one.

        Raises:
            TargetError: None of it is so.
        """
        await self.run("looking at it", lambda call: self._prepare(call, writes=writes))

    async def files(self, below: str = "") -> list[str]:
        """List the paths of all files, sorted; nothing if there is no such folder."""
        return await self.run("listing it", lambda _: self._files(below))

    async def has(self, path: str) -> bool:
        """Return whether there is such a file.

        Raises:
            TargetError: It can't be seen.
        """

        def look(_: Call) -> bool:
            self._fs.invalidate_cache()
            try:
                self._fs.info(self._at(path))
            except FileNotFoundError:
                return False
            return True

        return await self.run(f"looking for {path}", look)

    async def open(self, path: str) -> "BufferedIOBase":
        """Open a file to read.

        Raises:
            ArchiveDamagedError: It isn't there.
            TargetError: It can't be read.
        """
        return await self.run(f"reading {path}", lambda _: self.open_here(path))

    async def read(self, path: str) -> bytes:
        """Read a small file, whole; raises as ``open`` does."""
        return await self.run(f"reading {path}", lambda call: self.read_here(path, call))

    def open_here(self, path: str) -> "BufferedIOBase":
        """Open a file in this thread; what the file system raises isn't translated."""
        self._fs.invalidate_cache()
        try:
            file: BufferedIOBase = self._fs.open(self._at(path), "rb")
        except FileNotFoundError:
            raise ArchiveDamagedError(self.uri(path), None, "isn't there") from None
        return file

    def read_here(self, path: str, call: Call, *, most: int = _SMALL) -> bytes:
        """Read a small file in this thread; what the file system raises isn't translated."""
        with self.open_here(path) as file:
            call.gets_on()
            content = file.read(most + 1)
        if len(content) > most:
            raise ArchiveDamagedError(self.uri(path), None, f"is bigger than the {most:,} bytes that are read of it")
        return content

    async def write(self, path: str, content: bytes) -> None:
        """Write a small file; as ``write_pieces`` does."""
        await self.write_pieces(path, [content])

    async def write_pieces(self, path: str, pieces: Iterable[bytes]) -> None:
        """Write a file, under another name until it is whole; of one that fails nothing comes later."""
        writing = await Writing.begin(self, path)
        try:
            for piece in pieces:
                await writing.write([piece])
            await writing.finish()
        except BaseException:
            writing.abandon()
            raise

    async def remove(self, path: str) -> None:
        """Remove a file, if it is there."""

        def remove(_: Call) -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._at(path))

        await self.run(f"removing {path}", remove)

    async def run(self, what: str, work: Callable[[Call], _T]) -> _T:
        """Have something done in a thread of its own, and translate what goes wrong.

        Who is cancelled doesn't wait for the thread, nor does a program that ends.
        """
        call = Call()
        done = in_thread(what, lambda: self.translated(what, partial(work, call)))
        try:
            while True:
                finished, _ = await asyncio.wait([done], timeout=max(self._patience - call.seconds_silent(), 0.01))
                if finished:
                    return done.result()
                if call.seconds_silent() >= self._patience:
                    raise TargetError(self.name, f"{what} failed: it did nothing for {self._patience:g} s")
        finally:
            call.is_abandoned = True
            done.cancel()  # what becomes of it now is nobody's

    def translated(self, what: str, work: Callable[[], _T]) -> _T:
        """Do something in this thread, and translate what goes wrong."""
        problem = None
        try:
            return work()
        except ArchiveError:
            raise
        except Exception as exc:  # noqa: BLE001 - each file system has errors of its own
            problem = self._problem(f"{what} failed", exc)
        raise problem  # out here, where it has no context

    def _prepare(self, call: Call, *, writes: bool) -> None:
        self._fs.invalidate_cache()
        if self._is_local and not self._fs.isdir(self._root):
            # To make it would be to fill the disk below a mount that is missing.
            raise TargetError(self.name, "there is no such folder; make it, or mount what it is on")
        try:
            marker = self._fs.cat_file(self._at(MARKER))
        except FileNotFoundError:
            foreign = [path for path in self._files("") if not _is_nobodys(path)]
            if foreign:
                raise TargetError(
                    self.name,
                    f"isn't empty, and isn't for archives ({foreign[0]!r:.120}); give it a folder of its own",
                ) from None
            if not writes:
                return
            call.gets_on()
            self._put(MARKER, f'{{"format": "{FORMAT}", "version": {VERSION}}}\n'.encode())
            marker = self._fs.cat_file(self._at(MARKER))
        check_format(marker, self.uri(MARKER))

    def _put(self, path: str, content: bytes) -> None:
        with self._fs.open(self._at(path), "wb") as file:
            file.write(content)
            self.sync(file)

    def _files(self, below: str) -> list[str]:
        self._fs.invalidate_cache()
        start = self._at(below) if below else self._root
        found = self._fs.find(start)
        prefix = f"{self._fs._strip_protocol(self._root)}/".lstrip("/")  # noqa: SLF001 - fsspec's own way to a plain path
        return sorted(str(path).lstrip("/").removeprefix(prefix) for path in found)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def sync(self, file: Any) -> None:  # noqa: ANN401 - any of fsspec's
        """Have the disk hold it, where it is ours: what is removed from the database has to outlive a power cut."""
        if self._is_local:
            file.flush()
            os.fsync(file.fileno())

    def open_new(self, path: str) -> Any:  # noqa: ANN401 - any of fsspec's
        self._fs.makedirs(self._fs._parent(self._at(path)), exist_ok=True)  # noqa: SLF001 - as all of fsspec does
        return self._fs.open(self._at(path), "wb")

    def rename(self, path: str, new: str) -> None:
        self._fs.mv(self._at(path), self._at(new))
        if self._is_local:
            # A new name is on the disk when its folder is, and a new folder when the one above it is.
            for folder in Path(self._at(new)).parents:
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                if folder == Path(self._root):
                    break

    def _problem(self, what: str, exc: Exception) -> TargetError:
        said = self._scrubbed(str(exc) or type(exc).__name__)
        problem = TargetError(self.name, f"{what}: {_advice(exc, said)}")
        if said == str(exc) and not self._secrets:
            problem.__cause__ = exc
        return problem

    def _scrubbed(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(_QUERY.sub("?***", _USER_INFO.sub("//***@", text)).split())


class Writing:
    """A file that is being written, under another name until it is whole."""

    def __init__(self, target: Target, path: str, file: Any) -> None:  # noqa: ANN401 - any of fsspec's
        self._target = target
        self.path = path
        self._file = file

    @classmethod
    async def begin(cls, target: Target, path: str) -> "Writing":
        file = await target.run(f"writing {path}", lambda _: target.open_new(temporary(path)))
        return cls(target, path, file)

    async def run(self, work: Callable[[Any, Call], _T]) -> _T:
        """Have the thread write to the file."""
        return await self._target.run(f"writing {self.path}", lambda call: work(self._file, call))

    async def write(self, pieces: Sequence[bytes]) -> None:
        def write(file: Any, call: Call) -> None:  # noqa: ANN401 - any of fsspec's
            for piece in pieces:
                file.write(piece)
                call.gets_on()

        await self.run(write)

    def abandon(self) -> None:
        """Have nothing more come of it; nobody waits for that."""
        in_thread("archive", lambda: _let_go(self._file))

    async def finish(self) -> None:
        """See it onto the disk, and give it its name."""

        def finish(file: Any, call: Call) -> None:  # noqa: ANN401 - any of fsspec's
            self._target.sync(file)
            file.close()
            call.gets_on()
            self._target.rename(temporary(self.path), self.path)

        await self.run(finish)


def _let_go(file: Any) -> None:  # noqa: ANN401 - any of fsspec's
    """Close a file without what is left of it: fsspec's own would be finished when it is collected, anywhere."""
    from fsspec.spec import AbstractBufferedFile  # noqa: PLC0415 - of an extra

    with suppress(Exception):
        if isinstance(file, AbstractBufferedFile):
            file.closed = True
            file.discard()
        else:
            file.close()


def temporary(path: str) -> str:
    return f"{path}.part"


def without_secrets(uri: str) -> str:
    """Return a URI without user, password, query and fragment."""
    return re.split(r"[?#]", _AUTHORITY.sub("//", uri), maxsplit=1)[0]


def _secrets(uri: str, options: Mapping[str, object]) -> list[str]:
    found: set[str] = set()
    for user_info in [*_AUTHORITY.findall(uri), *_LIKE_AUTHORITY.findall(uri)]:
        found |= {user_info, *user_info.split(":", 1), *re.split(r"[:/?#]", user_info)}
    with suppress(ValueError):
        parts = urlsplit(uri)
        found |= {parts.query, parts.fragment}
        found |= {value for _, value in parse_qsl(parts.query)}

    def look(given: Mapping[str, object]) -> None:
        for name, value in given.items():
            if isinstance(value, Mapping):
                look(value)
            elif isinstance(value, str) and _SECRETS.search(name):
                found.add(value)

    look(options)
    found |= {unquote(secret) for secret in found}
    return sorted((secret for secret in found if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)


def _advice(exc: Exception, said: str) -> str:
    code = getattr(exc, "errno", None)
    if isinstance(exc, ImportError):
        return f"{said}; its library isn't installed here"
    if code in {errno.ENOSPC, errno.EDQUOT}:
        return f"it is full ({said}); free some space or give another target: nothing was removed"
    if isinstance(exc, PermissionError):
        return f"it refuses ({said}); see what this user may do there"
    if isinstance(exc, FileNotFoundError):
        return f"it isn't there ({said}); make it, or look at the URI"
    return f"{type(exc).__name__}: {said}"


def _is_nobodys(path: str) -> bool:
    first = path.split("/", 1)[0]
    return first.startswith(".") or first in _NOBODYS
