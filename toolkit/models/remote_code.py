"""Whether a model's folder may bring Python code that runs here. By default it may not, and nobody is asked.

Without a decision, transformers asks on a terminal, and runs the code on a ``y``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from toolkit.errors import ModelError, first_line

_allowed: ContextVar[bool] = ContextVar("remote_code_allowed", default=False)


def remote_code_allowed() -> bool:
    """What transformers is told as ``trust_remote_code``."""
    return _allowed.get()


@contextmanager
def remote_code(allowed: bool) -> Iterator[None]:
    """Inside, all models may bring code (``model.trust_remote_code``, ``--trust-remote-code``), or none."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def refused_code(spec: str, path: str, error: Exception) -> ModelError | None:
    """The error of a model that brings code and may not; None for other errors."""
    if "trust_remote_code" not in str(error):
        return None
    return ModelError(
        f"{spec!r} brings Python code of its own, and it was not run",
        where=path,
        fix="read that code; if you trust it, set model.trust_remote_code=true (duel compare and others: "
        "--trust-remote-code), and the manifest records it",
    )


def unreadable(what: str, spec: str, path: str, error: Exception, fix: str = "") -> ModelError:
    """The error of a model or tokenizer that cannot be loaded."""
    return refused_code(spec, path, error) or ModelError(f"{what}: {first_line(error)}", where=path, fix=fix)
