"""Rounding to a precision that keeps a sum of small changes."""

from __future__ import annotations

import hashlib
import math

import torch

DRAWN_AT_ONCE = 4  # values of 16 bits that one number of 64 bits gives


def stochastically_rounded(exact: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """fp32 weights in ``dtype``: of the two neighbours in it each with the probability that keeps the mean.

    Rounding to nearest drops a change of a weight that is smaller than half of the distance to its neighbour, and so
    most of what an adapter adds to weights in bf16. Values that ``dtype`` has stay as they are. The random numbers are
    of the weight's ``name`` and its device, so that the same weights are rounded equally again. Other precisions than
    fp32, and a ``dtype`` that is not narrower, are converted. Source: Gupta et al. 2015 (arXiv 1502.02551), section 3.
    """
    if exact.dtype != torch.float32 or torch.finfo(dtype).bits >= torch.finfo(torch.float32).bits:
        return exact.to(dtype)
    low = round(math.log2(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps))  # bits that dtype lacks
    mask = (1 << low) - 1
    generator = torch.Generator(exact.device).manual_seed(_seed(name))
    drawn = torch.empty(-(-exact.numel() // DRAWN_AT_ONCE), dtype=torch.int64, device=exact.device)
    drawn.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    bits = drawn.view(torch.int16)[: exact.numel()].view(exact.shape).to(torch.int32)
    # A random number below the lowest bit that stays carries into it as often as the bits there say; they leave then.
    bits.bitwise_and_(mask).add_(exact.contiguous().view(torch.int32)).bitwise_and_(~mask)
    return bits.view(torch.float32).to(dtype)


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
