"""What the machine is, and how long a call takes on it and by how much memory grows."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Answer = TypeVar("Answer")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, processor and threads: what a time depends on."""
    machine: dict[str, Any] = {
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
        f"torch {machine['torch']}",
        f"Python {machine['python']}",
        machine["system"],
    ]
    return ", ".join(word for word in words if word)


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, all that it started on the device included."""
    finish(device)
    start = time.perf_counter()
    function()
    finish(device)
    return time.perf_counter() - start


def measured(function: Callable[[], Answer], device: torch.device) -> tuple[Answer, float, int | None]:
    """(answer, seconds, growth of memory at its highest) of one call; the growth is None where it cannot be measured.

    On CUDA, what torch's allocator handed out. On Linux, the resident memory of this process: the kernel's high-water mark
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


def finish(device: torch.device) -> None:
    """Wait for what was started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset(device: torch.device) -> int | None:
    """Bytes in use, from which the next peak is counted; None where peaks cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
        return _status("VmRSS")
    except (AttributeError, OSError, LookupError):  # another C library, another system, or a sandbox
        return None


def _peak(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
