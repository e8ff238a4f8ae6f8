"""Files that are whole or not there: written aside, synced, renamed, and the folder synced."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .._errors import StoreError

PARTIAL = ".partial"

_SENTENCES = {
    errno.ENOSPC: ("the disk is full", "free space there, then resume: finished blocks are kept"),
    errno.EDQUOT: ("the disk quota is used up", "free space there, then resume: finished blocks are kept"),
    errno.EFBIG: ("the file is larger than this process may write", "raise the limit (ulimit -f), or choose smaller blocks"),
    errno.EROFS: ("the file system is read-only", "another folder"),
    errno.EACCES: ("the folder may not be written to", "another folder, or its permissions"),
    errno.EPERM: ("the folder may not be written to", "another folder, or its permissions"),
}


def write(path: Path, pieces: Iterable[Any], *, shared: bool = False) -> None:
    """Write the pieces to `path`: afterwards it holds all of them, or what it held before.

    What a killed process left aside is written over by the next that writes the file; with `shared`, several may at once.

    Raises
    ------
    StoreError
        where the system refuses: a full disk, a read-only folder, a limit on file sizes.
    """
    aside = path.with_name(f"{path.name}{f'.{os.getpid()}' if shared else ''}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for piece in pieces:
                _write_all(descriptor, memoryview(piece))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise refused(path, error) from error


def append(path: Path, line: bytes) -> None:
    """Add one line to a file, synced: after a crash it is there whole, or torn at the end, where a reader sees that."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _write_all(descriptor, memoryview(line))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new:
            sync_folder(path.parent)
    except OSError as error:
        raise refused(path, error) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, and its own name in the folder above, which may be as new."""
    for place in (folder, folder.parent):
        descriptor = os.open(place, os.O_RDONLY)
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
