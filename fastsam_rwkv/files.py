"""Files that appear whole or not at all, and leftovers of killed processes. Standard library only."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import short_repr

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

_PREFIX, _SUFFIX = ".fastsam-rwkv-", ".part"


@contextmanager
def whole_file(file: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file for writing that takes its name only if the block ends without an exception.

    Until then the bytes have a temporary name in the same folder, and an existing file stays. If `file` is a symlink,
    its target is replaced. An existing file keeps its permissions, and a new one has those of the umask. A device or a
    FIFO is written in place. Temporary files that a killed process left in the folder are removed.

    Raises:
        OSError: The folder or the file cannot be written.
    """
    try:
        target = Path(os.path.realpath(file))
    except ValueError as error:  # a null character
        raise OSError(f"no file can have the name {short_repr(os.fspath(file))}: {error}") from error
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        with target.open("wb") as stream:
            yield stream
        return
    sweep(target.parent.glob(f"{_PREFIX}*{_SUFFIX}"))
    part, descriptor = _create(target.parent)
    try:
        with open(descriptor, "wb") as stream:
            if mode is not None:
                part.chmod(stat.S_IMODE(mode))
            yield stream
            stream.flush()
            os.fsync(descriptor)
            if fcntl is None:
                stream.close()  # Windows renames no open file
            os.replace(part, target)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Create an empty folder with a name of its own inside `parent`, and remove it at the end.

    `sweep` recognizes it as a leftover if this process is killed.

    Raises:
        OSError: `parent` cannot be written.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        descriptor = None if fcntl is None else os.open(folder, os.O_RDONLY)
        if descriptor is None or _own(folder, descriptor):
            break
        os.close(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def sweep(leftovers: Iterable[Path]) -> None:
    """Remove those of `whole_file`'s or `temporary_folder`'s temporary paths whose process has ended.

    A process holds a lock on its temporary paths, which the system releases even if the process is killed. Without
    such locks, as on Windows, nothing is removed.
    """
    if fcntl is None:
        return
    for path in leftovers:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        except OSError:  # held by a live process, or not ours to remove
            continue
        finally:
            os.close(descriptor)


def _create(folder: Path) -> tuple[Path, int]:
    """Create a temporary file under the umask, and return its path and descriptor, which holds the lock."""
    while True:
        part = folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if _own(part, descriptor):
            return part, descriptor
        os.close(descriptor)


def _own(path: Path, descriptor: int) -> bool:
    """Lock a new temporary path; False if another process took it for a leftover before that."""
    if fcntl is None:
        return True
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
