"""When the autograd functions of this room must not take the place of torch's own operations."""

from __future__ import annotations

import torch


def transforms_active() -> bool:
    """Whether torch.func transforms, or torch.jit.trace records, what is computed.

    The former ask an ``autograd.Function`` for further methods, and a trace that has one cannot be saved.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or torch._C._are_functorch_transforms_active()
