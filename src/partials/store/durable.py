"""Files that are whole or not there: written aside, synced, renamed, and the folder synced."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .._errors import StoreError

PARTIAL = ".partial"
ASIDE = re.compile(rf"\.[0-9a-f]{{12}}\{PARTIAL}$")
NO_LINK = getattr(os, "O_NOFOLLOW", 0)

_SENTENCES = {
    errno.ENOSPC: ("the disk is full", "free space there, then resume: finished blocks are kept"),
    errno.EDQUOT: ("the disk quota is used up", "free space there, then resume: finished blocks are kept"),
    errno.EFBIG: ("the file is larger than this process may write", "raise the limit (ulimit -f), or choose smaller blocks"),
    errno.EROFS: ("the file system is read-only", "another folder"),
    errno.EACCES: ("the folder may not be written to", "another folder, or its permissions"),
    errno.EPERM: ("the folder may not be written to", "another folder, or its permissions"),
    errno.ENOENT: ("what was written aside is gone", "another run may have removed it, or the folder: only one run at a time"),
    errno.ELOOP: ("it is a link, which would lead out of the store", "another folder"),
    errno.ENAMETOOLONG: ("its name is too long", "another folder"),
}


def write(path: Path, pieces: Iterable[Any]) -> None:
    """Write the pieces to `path`: afterwards it holds all of them, or what it held before.

    They are written aside under a name of their own, so that several may write one file at once. What a killed process left aside
    is for `sweep`.

    Raises
    ------
    StoreError
        where the system refuses: a full disk, a read-only folder, a limit on file sizes.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(6)}{PARTIAL}")
    try:
        made = _make_folders(path.parent)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for piece in pieces:
                _write_all(descriptor, memoryview(piece))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(aside, path)
        for folder in (path.parent, *made):
            sync_folder(folder)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise refused(path, error) from error


def sweep(folder: Path) -> None:
    """Remove what killed processes have left aside, anywhere below a folder that nobody is writing to."""
    for place, _, names in os.walk(folder):
        for name in filter(ASIDE.search, names):
            with suppress(OSError):
                os.unlink(os.path.join(place, name))


def append(path: Path, line: bytes) -> None:
    """Add one line to a file, synced: after a crash it is there whole, or torn at the end, where a reader sees that."""
    try:
        made = _make_folders(path.parent)
        new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINK, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, memoryview(line))
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, size)  # (what has been written of the line takes space that others may need)
                raise
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        for folder in (path.parent, *made) if new else ():
            sync_folder(folder)
    except OSError as error:
        raise refused(path, error) from error


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; the folders that hold the new ones' names."""
    new = []
    while not folder.is_dir():
        new.append(folder)
        folder = folder.parent
    for place in reversed(new):
        place.mkdir(exist_ok=True)
    return [place.parent for place in new]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refused(path: Path, error: OSError) -> StoreError:
    """The system's refusal as a sentence."""
    what, hint = _SENTENCES.get(error.errno or 0, (error.strerror or str(error), ""))
    return StoreError(f"{path} cannot be written: {what}", got=f"{errno.errorcode.get(error.errno or 0, 'OSError')}", hint=hint)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
