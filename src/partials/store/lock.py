"""One run at a time: the system's own locks on files, which vanish with the process that holds them."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .._errors import StoreError
from .durable import NO_LINK

try:
    import fcntl
except ImportError:  # not POSIX: runs there are not kept apart
    fcntl = None  # type: ignore[assignment]

FOLDER = "locks"
PATIENCE = 30.0
"""Seconds that a worker waits while another makes the store or puts a result together."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that have no locks."""


class Locks:
    """Held by a worker of a run of `world` workers: its own lock alone, and that of its world beside the other workers.

    `first` is called where no other worker is at work, before one can begin.
    """

    def __init__(self, store: Path, rank: int, world: int, first: Callable[[], None] = lambda: None) -> None:
        self.held: list[int] = []
        self.sure = fcntl is not None
        """Whether the file system has locks: else nothing tells who else is at work."""
        self.store, self.folder = store, store / FOLDER
        self.folder.mkdir(exist_ok=True)
        try:
            with self.alone():  # (else two worlds might each find that the other is not there yet)
                for other in self.folder.glob("world-*"):
                    if other.name != f"world-{world}" and not self._take(other, alone=True, keep=False):
                        raise _busy(store, f"a run of {other.name.removeprefix('world-')} workers")
                if self._take(self.folder / f"world-{world}", alone=True, keep=False) and self.sure:
                    first()
                if not self._take(self.folder / f"world-{world}", alone=world == 1) or not self._take(
                    self.folder / f"worker-{rank}-of-{world}", alone=True
                ):
                    raise _busy(store, f"worker {rank} of {world}")
        except BaseException:
            self.release()
            raise

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other worker of any run is within this at the same time: for a moment, to make what belongs to all of them."""
        end = time.monotonic() + PATIENCE
        while not self._take(self.folder / "gate", alone=True):
            if time.monotonic() > end:
                raise _busy(self.store, f"somebody for more than {PATIENCE:.0f} s")
            time.sleep(0.01)
        gate = self.held.pop()
        try:
            yield
        finally:
            os.close(gate)

    @property
    def remarks(self) -> list[str]:
        return [] if self.sure else ["this file system has no locks: runs into one store are not kept apart here"]

    def release(self) -> None:
        while self.held:
            os.close(self.held.pop())

    def _take(self, path: Path, *, alone: bool, keep: bool = True) -> bool:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                return False
            self.sure = False
        if keep:
            self.held.append(descriptor)
        else:
            os.close(descriptor)
        return True


def _busy(store: Path, who: str) -> StoreError:
    return StoreError(
        f"another run is writing to {store}",
        got=f"a lock that is held by {who}",
        expected="one run at a time",
        hint="wait for it to end, or choose another folder",
    )
