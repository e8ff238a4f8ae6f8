"""One run at a time: the system's own locks on files, which vanish with the process that holds them."""

from __future__ import annotations

import os
from pathlib import Path

from .._errors import StoreError

try:
    import fcntl
except ImportError:  # not POSIX: runs there are not kept apart
    fcntl = None  # type: ignore[assignment]

FOLDER = "locks"


class Locks:
    """Held by a worker of a run of `world` workers: its own lock alone, and that of its world beside the other workers."""

    def __init__(self, store: Path, rank: int, world: int) -> None:
        self.held: list[int] = []
        folder = store / FOLDER
        folder.mkdir(exist_ok=True)
        try:
            for other in folder.glob("world-*"):
                if other.name != f"world-{world}" and not self._take(other, alone=True, keep=False):
                    raise _busy(store, f"a run of {other.name.removeprefix('world-')} workers")
            if not self._take(folder / f"world-{world}", alone=world == 1) or not self._take(
                folder / f"worker-{rank}-of-{world}", alone=True
            ):
                raise _busy(store, f"worker {rank} of {world}")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        while self.held:
            os.close(self.held.pop())

    def _take(self, path: Path, *, alone: bool, keep: bool = True) -> bool:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
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
