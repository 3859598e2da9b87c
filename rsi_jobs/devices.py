"""What this machine computes with, asked in a process of its own: torch is no business of the controller."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from dataclasses import dataclass

from rsi_jobs.runners import interpreter

_ASK = """
import json, torch
cuda = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
free = [torch.cuda.mem_get_info(n) for n in cuda]
print(json.dumps({"torch": torch.__version__, "cuda": [
    [torch.cuda.get_device_name(n), *free[n]] for n in cuda]}))
"""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device; memory in bytes."""

    name: str
    free: int
    total: int


@dataclass(frozen=True)
class Devices:
    """`fault` says why there is no torch; it is empty where there is one."""

    torch: str
    gpus: tuple[Gpu, ...]
    threads: int  # CPU threads this process may use
    fault: str = ""


def has_driver() -> bool:
    """Whether a CUDA or HIP driver is installed at all; tells at once that there is no device."""
    for name in ("libcuda.so.1", "libamdhip64.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def ask() -> Devices:
    """The devices that a stage started here would see; takes as long as importing torch."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    done = subprocess.run([interpreter(), "-c", _ASK], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        return Devices("", (), threads, f"torch cannot be used: {said[-1]}")
    body = json.loads(done.stdout.strip().splitlines()[-1])
    return Devices(body["torch"], tuple(Gpu(*gpu) for gpu in body["cuda"]), threads)
