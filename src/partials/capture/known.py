"""Layouts that were measured before, so that the probe's two reverse passes run once for a course, not at every call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

LIMIT = 256


class Remembered:
    """A bounded, thread-safe map, the entry that was longest without use forgotten first."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.lock, self.entries = limit, threading.Lock(), OrderedDict[Hashable, Any]()

    def get(self, key: Hashable) -> Any:
        with self.lock:
            if key in self.entries:
                self.entries.move_to_end(key)
            return self.entries.get(key)

    def put(self, key: Hashable, value: Any) -> None:
        with self.lock:
            self.entries[key] = value
            while len(self.entries) > self.limit:
                self.entries.popitem(last=False)

    def clear(self) -> None:
        with self.lock:
            self.entries.clear()


LAYOUTS = Remembered()
