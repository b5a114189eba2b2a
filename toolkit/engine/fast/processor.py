"""The precision in which this machine multiplies matrices fastest."""

from __future__ import annotations

from typing import Any

AUTO = "auto"


def fastest_dtype() -> str:
    """What ``model.dtype: auto`` stands for on this machine: ``bfloat16`` or ``float32``.

    A GPU before Ampere, and a processor without instructions for bfloat16, convert to multiply it, at a fraction of the
    speed of float32.
    """
    return "bfloat16" if _multiplies_bfloat16() else "float32"


def _multiplies_bfloat16() -> bool:
    import torch  # takes long, and a run of another precision does not ask

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):  # of which the first had no such instructions
        return bool(torch.cpu._is_avx512_bf16_supported())
    mkldnn: Any = torch.backends.mkldnn
    return bool(mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
