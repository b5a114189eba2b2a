"""What a process computes with, as far as bits of its results depend on it, and its peak memory. Importing this loads
no torch.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# In the work folder of a launched stage: the peak memory of the process with this rank.
PEAK_FILE = "peak-{}.json"


def compute() -> dict[str, Any]:
    """What this process computes with: device, threads, the kernels of its CPU, attention, precision of fp32 products.

    Bits of a result depend on each of them. Attention is that of the models loaded since the last call. Empty in a
    process that has not loaded torch.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    facts: dict[str, Any] = {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "float32_products": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    if torch.cuda.is_available():
        facts |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    if (speedups := sys.modules.get("toolkit.engine.fast.speedups")) is not None:
        facts["attention"] = sorted(speedups.ATTENTIONS)
        speedups.ATTENTIONS.clear()
    return facts


@dataclass
class PeakMemory:
    gib: float = 0.0


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measures the peak memory of what runs inside, which is known once that has ended.

    On an accelerator it is the allocator's peak. On a CPU it is the resident set's: Linux lets a process reset its
    high-water mark; elsewhere it is the peak since the process began.
    """
    gc.collect()
    # Without a stage that imported torch there is nothing on an accelerator; importing it here would take seconds.
    cuda = "torch" in sys.modules and sys.modules["torch"].cuda.is_available()
    if cuda:
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    peak = PeakMemory()
    try:
        yield peak
    finally:
        if cuda:
            peak.gib = sys.modules["torch"].cuda.max_memory_allocated() / 2**30
        elif sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            peak.gib = int(status.split("VmHWM:")[1].split()[0]) / 2**20
        else:
            import resource

            unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on the other systems
            peak.gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
