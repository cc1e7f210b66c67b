"""Replacing files of a folder as a whole: whatever interrupts it, each is the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_TEMPORARY = ".randlora-", ".tmp"
_OLD = ".old"  # in the temporary folder: the file that describes the others, until they are replaced


def write_text(path: Path, text: str) -> None:
    replace_files(path.parent, {path.name: lambda temporary: temporary.write_text(text, encoding="utf-8")})


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], Any]], described_by: str | None = None) -> None:
    """``writers[name](path)`` writes each file aside; when all are complete, they take the places of the old ones.

    Files that go together cannot be renamed together, so the one named `described_by`, if it changes, is removed before
    and put in place last: a crash in between leaves none, never one that describes other files. Saving waits while
    another process saves into the same folder, which is made if it is missing.

    Raises:
        OSError: no access, a full disk. What was there is there again then, and nothing else; only if the last step of
            all fails, the file named `described_by` is gone.
    """
    with _made(folder), _alone_in(folder) as alone:
        if alone:  # then what is there was left by a process that was killed
            for stale in folder.glob("*".join(_TEMPORARY)):
                shutil.rmtree(stale, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY[0], suffix=_TEMPORARY[1], dir=folder))
        try:
            mode = _default_mode(temporary / ".mode")
            for name, write in writers.items():
                write(temporary / name)
                os.chmod(temporary / name, mode)  # safetensors makes its files private
                _sync(temporary / name)
            if described_by is not None and not _same(temporary / described_by, folder / described_by):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(folder / described_by, temporary / _OLD)
                    _sync(folder)
            for i, name in enumerate(sorted(writers, key=lambda name: name == described_by)):
                try:
                    os.replace(temporary / name, folder / name)
                except OSError:
                    if i == 0 and described_by is not None and (temporary / _OLD).exists():
                        os.rename(temporary / _OLD, folder / described_by)
                    raise
                _sync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path`, new or empty, when the block is left; if it raises, it is removed.

    Meanwhile, and if the process is killed, it is ``<name>.incomplete-<digits>`` beside it.

    Raises:
        OSError: no access, a full disk, or somebody has put something into `path` meanwhile.
    """
    with _made(path.parent):
        temporary = path.with_name(f"{path.name}.incomplete-{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            yield temporary
            for found in temporary.rglob("*"):
                _sync(found)
            _sync(temporary)
            if os.name == "nt" and path.is_dir():  # there a folder takes no other's place, be it empty
                path.rmdir()
            os.rename(temporary, path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def is_replacing(folder: Path) -> bool:
    """Whether files of `folder` are being replaced, or were when that was interrupted."""
    return any(folder.glob("*".join(_TEMPORARY)))


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes `folder` and its parents where they are missing, and removes what it made if that stays empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Keeps other savers out of `folder`; False where its file system has no locks."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        try:
            yield alone
        finally:
            if alone:  # closing is not enough where a forked child has the descriptor too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _default_mode(probe: Path) -> int:
    """What the umask leaves of a new file's permissions; asking for the umask would set it for all threads."""
    probe.touch()
    return stat.S_IMODE(probe.stat().st_mode)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _same(a: Path, b: Path) -> bool:
    try:
        return a.read_bytes() == b.read_bytes()
    except OSError:
        return False
