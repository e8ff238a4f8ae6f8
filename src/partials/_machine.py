"""What the machine is, and how long a call takes on it and by how much memory grows."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

Answer = TypeVar("Answer")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, processor and threads: what a time depends on."""
    from . import __version__

    machine: dict[str, Any] = {
        "partials": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def sentence(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    words = [
        machine.get("gpu"),
        f"{machine['cpu']}, {threads}",
        f"partials {machine['partials']}" if "partials" in machine else "",
        f"torch {machine['torch']}",
        f"Python {machine['python']}",
        machine["system"],
    ]
    return ", ".join(word for word in words if word)


def free(device: torch.device) -> int:
    """Bytes that this process can still take: of an accelerator with memory of its own, else the least of the system's and the limits'."""
    if _has_memory(device):
        memory = torch.accelerator.memory
        kept = max(memory.memory_reserved(device) - memory.memory_allocated(device), 0)
        with suppress(NotImplementedError):  # (of a device that does not say)
            return memory.get_memory_info(device)[0] + kept
    return max(0, min((amount for amount in (_available(), _left_in_cgroup(), _left_of_limit()) if amount is not None), default=2**33))


def share(device: torch.device) -> int:
    """The budget of a call that names none: half of what is free."""
    return free(device) // 2


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch's own error on CUDA, its text on a CPU, or Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("can't allocate memory", "out of memory"))


def trim() -> None:
    """Give back to the system what the C library keeps of memory that was freed; without one that can, nothing."""
    if (release := _release()) is not None:
        release(0)


@functools.cache
def _release() -> Callable[[int], Any] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, all that it started on the device included."""
    finish(device)
    start = time.perf_counter()
    function()
    finish(device)
    return time.perf_counter() - start


def measured(function: Callable[[], Answer], device: torch.device) -> tuple[Answer, float, int | None]:
    """(answer, seconds, growth of memory at its highest) of one call; the growth is None where it cannot be measured.

    On an accelerator, what torch's allocator handed out. On Linux, the resident memory of this process: the kernel's high-water mark
    is set back just before, after the C library has returned the memory that it kept of earlier calls.
    """
    gc.collect()
    before = _reset(device)
    finish(device)
    start = time.perf_counter()
    answer = function()
    finish(device)
    seconds = time.perf_counter() - start
    return answer, seconds, None if before is None else max(_peak(device) - before, 0)


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        return _status("VmRSS")
    except (OSError, LookupError):
        return 0


def finish(device: torch.device) -> None:
    """Wait for what was started on the device."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def _has_memory(device: torch.device) -> bool:
    """Whether torch counts the bytes of the device's own memory (Apple's is the system's)."""
    return device.type not in ("cpu", "meta", "mps")


def _reset(device: torch.device) -> int | None:
    """Bytes in use, from which the next peak is counted; None where peaks cannot be measured."""
    if _has_memory(device):
        torch.accelerator.memory.reset_peak_memory_stats(device)
        return torch.accelerator.memory.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
        return _status("VmRSS")
    except (AttributeError, OSError, LookupError):  # another C library, another system, or a sandbox
        return None


def _peak(device: torch.device) -> int:
    return torch.accelerator.memory.max_memory_allocated(device) if _has_memory(device) else _status("VmHWM")


def _status(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_cgroup(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the control groups above this process leave of their memory; pages of files that can be dropped are not counted as used."""
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    found: list[int] = []
    for _, controllers, path in groups:
        version2 = not controllers
        if not version2 and "memory" not in controllers.split(","):
            continue
        base = root if version2 else root / "memory"
        limit, used = ("memory.max", "memory.current") if version2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        place = base / path.lstrip("/")
        for folder in (place, *place.parents):
            if (left := _left_in(folder, limit, used)) is not None:
                found.append(left)
            if folder == base:
                break
    return min(found, default=None)


def _left_in(folder: Path, limit: str, used: str) -> int | None:
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not most.isdigit() or int(most) >= 2**60:
        return None
    return int(most) - now + int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))


def _left_of_limit() -> int | None:
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        return None if most == resource.RLIM_INFINITY else most - _status("VmSize")
    except (ImportError, OSError, LookupError):
        return None


@functools.cache
def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
