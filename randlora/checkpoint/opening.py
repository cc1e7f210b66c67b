"""Opening the files of an adapter: regular ones of a sensible size, looked at before a byte is read.

What is looked at is the open file, which stays the same whatever its name stands for afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from types import TracebackType

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_SIZES = ("st_dev", "st_ino", "st_size", "st_mtime_ns")


class OpenFile:
    """A regular file, open for reading; a context. ``ValueError`` for what is not there, another kind, or no access."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            _check_kind(path, os.stat(path))  # to open a device may have effects
            # Whatever takes its place meanwhile must not keep us waiting, as a FIFO without a writer does.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            self._stat = os.fstat(self._descriptor)
            _check_kind(path, self._stat)
        except BaseException:
            os.close(self._descriptor)
            raise

    @classmethod
    def if_there(cls, path: Path, stack: contextlib.ExitStack) -> OpenFile | None:
        """The file, which `stack` closes; None if nothing has this name."""
        try:
            return stack.enter_context(cls(path))
        except ValueError as error:
            if isinstance(error.__cause__, FileNotFoundError) and not os.path.islink(path):
                return None
            raise

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, limit: int) -> bytes:
        """All of it; ``ValueError`` if that is more than `limit` bytes."""
        if self._stat.st_size > limit:
            raise ValueError(f"{self.path} has {self._stat.st_size} bytes, where at most {limit} were expected")
        try:
            with open(os.dup(self._descriptor), "rb") as file:
                return file.read(limit)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error

    def path_of_descriptor(self) -> str:
        """A path for libraries that open files by themselves: to this one, not to what took its place."""
        path = f"/proc/self/fd/{self._descriptor}"
        return path if os.path.exists(path) else os.fspath(self.path)

    def is_current(self) -> bool:
        """Whether its path still leads to it, and it was not written to since it was opened."""
        try:
            now = os.stat(self.path)
        except OSError:
            return False
        return all(getattr(now, name) == getattr(self._stat, name) for name in _SIZES)


def _check_kind(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{path}: cannot be read: {os.strerror(errno.EISDIR)}")
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ValueError(f"{path} is {kind}: a regular file was expected")
