"""Facts about a run that its numbers may depend on: versions and machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from toolkit.errors import ModelError

PACKAGES = ("rlhf-duel", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "scipy")
# Products in bfloat16 and fp32 take other kernels, and round otherwise, where a processor has these.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def versions() -> dict[str, str]:
    """Python's version, and those of the packages that the numbers depend on."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def machine() -> dict[str, Any]:
    """The system, the processor with the matrix instructions that it has, and the number of CPUs."""
    described: dict[str, Any] = {
        "system": platform.platform(),
        "processor": platform.processor(),
        "cpus": os.cpu_count(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(re.findall(r"^(\S[^\t:]*?)\s*: (.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE))
        described["processor"] = fields.get("model name") or described["processor"]
        has = set(fields.get("flags", "").split())
        described["instructions"] = [flag for flag in INSTRUCTIONS if flag in has]
    return described


def environment() -> dict[str, Any]:
    """What a bug report needs: versions, machine, devices, and the short names of models that are here."""
    import torch

    from toolkit.models.resolve import SHORT_NAMES, resolve

    models = {}
    for name in SHORT_NAMES:
        try:
            models[name] = resolve(name).path
        except ModelError as error:
            models[name] = f"not here: {error.what}"
    return {
        "versions": versions(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "models": models,
    }
