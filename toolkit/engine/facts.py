"""What a process computes with, as far as bits of its results depend on it. Importing this loads no torch."""

from __future__ import annotations

import sys
from typing import Any


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
