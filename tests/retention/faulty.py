"""A file system in memory that fails, hangs or lies when it is told to."""

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


@dataclass
class Faults:
    """What goes wrong next.

    Attributes:
        fails_at: Which operation raises ``error``, counted from 1; None: none does.
        error: What it raises.
        spoils: Called with each object that gets its final name; what it returns is stored in its place, None: nothing.
        hangs: Operations wait for it, if there is one.
    """

    fails_at: int | None = None
    error: Callable[[], Exception] = lambda: OSError(errno.ENOSPC, "No space left on device")
    spoils: Callable[[str, bytes], bytes | None] | None = None
    hangs: threading.Event | None = None
    done: list[str] = field(default_factory=list)

    def operation(self, what: str) -> None:
        self.done.append(what)
        if self.hangs:
            self.hangs.wait(30)
        if len(self.done) == self.fails_at:
            raise self.error()


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc] # fsspec has no types
    protocol = "faulty"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[Faults] = Faults()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.replace("faulty://", "memory://"))
        return stripped

    def _open(self, path: str, mode: str = "rb", **options: object) -> Any:  # noqa: ANN401 - fsspec's
        self.faults.operation(f"open {mode}")
        if mode == "wb":
            file = _FaultyFile(self, path)
            file.commit()
            return file
        return super()._open(path, mode, **options)

    def mv(self, path1: str, path2: str, **options: object) -> None:
        self.faults.operation("rename")
        super().mv(path1, path2, **options)
        if self.faults.spoils:
            path = self._strip_protocol(path2)
            spoilt = self.faults.spoils(path, self.store[path].getvalue())
            if spoilt is None:
                del self.store[path]
            else:
                self.store[path] = MemoryFile(self, path, spoilt)

    def find(self, path: str, **options: object) -> Any:  # noqa: ANN401 - fsspec's
        self.faults.operation("list")
        return super().find(path, **options)

    def cat_file(self, path: str, **options: Any) -> bytes:  # noqa: ANN401 - fsspec's
        self.faults.operation("read")
        content: bytes = super().cat_file(path, **options)
        return content


class _FaultyFile(MemoryFile):  # type: ignore[misc] # fsspec has no types
    def write(self, data: bytes) -> int:
        self.fs.faults.operation("write")
        written: int = super().write(data)
        return written

    def close(self) -> None:
        if not self.closed:
            self.fs.faults.operation("close")


@contextmanager
def faulty() -> Iterator[Faults]:
    """Give a file system that is empty and works, for ``faulty://`` URIs, and the faults to give it."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.store.clear()
    FaultyFileSystem.faults = Faults()
    try:
        yield FaultyFileSystem.faults
    finally:
        FaultyFileSystem.store.clear()
        FaultyFileSystem.faults = Faults()
