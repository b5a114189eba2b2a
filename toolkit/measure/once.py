"""Commands that write one file: run again with equal arguments, they give what they gave, and compute nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from toolkit.files import (
    UNFINISHED,
    file_hash,
    fingerprint,
    module_fingerprint,
    read_json,
    refuse_existing,
    write_json,
)
from toolkit.progress import Reporter
from toolkit.storage.locks import holds_out

Summary = dict[str, Any]


class WritesOnce(Protocol):
    """A function that writes the file ``out``, as :func:`once` returns it."""

    def __call__(self, *args: Any, out: Path, force: bool = False, reporter: Reporter, **options: Any) -> Summary: ...


def once(*beside: Callable[[Path], Path]) -> Callable[[Callable[..., Summary]], WritesOnce]:
    """Decorates a function that writes the file ``out`` and returns a summary in JSON's types.

    It holds ``out`` meanwhile. A second call with equal arguments returns the first one's summary: equal values, and
    files that hold the same. The first one's record is beside ``out``, under a hidden name. ``beside`` give the further
    files that it writes, or may write, before ``out``; a call that fails leaves none of them. ``force`` is not handed
    on.

    The decorated function raises StoreError where a file exists that another call wrote, or that was changed since; not
    with ``force``.
    """

    def decorate(function: Callable[..., Summary]) -> WritesOnce:
        @wraps(function)
        def writing(*args: Any, out: Path, force: bool = False, reporter: Reporter, **options: Any) -> Summary:
            further = [path(out) for path in beside]
            call = fingerprint([function.__name__, *_identity([list(args), options])])
            main = os.environ.get("RANK", "0") == "0"  # of launched processes the first one writes
            if not force and (summary := _finished([out, *further], call)) is not None:
                if main:
                    reporter.line(f"{out} is done already, by the same command (--force computes it again)")
                return summary if main else {}
            refuse_existing(out, force)
            if not main:
                return function(*args, out=out, reporter=reporter, **options)
            if out not in UNFINISHED:
                _refuse_others(out, further, force)
            with _gone_after_failure(out, further):
                summary = function(*args, out=out, reporter=reporter, **options)
            hashes = [_hash(path) for path in (out, *further)]
            write_json(_record(out), {"call": call, "files": hashes, "summary": summary})
            return summary

        return holds_out(writing)

    return decorate


def _record(out: Path) -> Path:
    return out.with_name(f".{out.name}.done.json")


def _recorded(out: Path) -> dict[str, Any]:
    """What the last call that finished recorded."""
    return read_json(_record(out)) if _record(out).is_file() else {}


def _refuse_others(out: Path, further: Sequence[Path], force: bool) -> None:
    """Raises StoreError for a file beside ``out`` that is not as the last call left it that wrote ``out``.

    Not with ``force``.
    """
    hashes = dict(zip(further, _recorded(out).get("files", [])[1:], strict=False))
    for path in further:
        if not (path.is_file() and hashes.get(path) == file_hash(path)):
            refuse_existing(path, force)


@contextmanager
def _gone_after_failure(out: Path, further: Sequence[Path]) -> Iterator[None]:
    """Where a call fails before ``out`` is there, what it wrote beside it goes: the same call can then go on."""
    new = [path for path in further if out in UNFINISHED or not path.exists()]
    try:
        yield
    except BaseException:
        if not out.exists():
            for path in new:
                path.unlink(missing_ok=True)
        raise


def _hash(path: Path) -> str | None:
    """The hash of a file; None where it was not written."""
    return file_hash(path) if path.is_file() else None


def _finished(files: Sequence[Path], call: str) -> Summary | None:
    """The summary of an equal call that finished. None where there was none, or a file is another now."""
    if not files[0].is_file():
        return None
    record = _recorded(files[0])
    hashes = record.get("files") or [""]
    # An earlier duel recorded fewer of the files that stand beside.
    equal = record.get("call") == call and hashes == [_hash(path) for path in files[: len(hashes)]]
    return dict(record["summary"]) if equal else None


def _identity(value: object) -> Iterator[object]:
    """Arguments as JSON's types, and the state of every file, folder and module that a text among them names."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        for key, item in sorted(value.items()):
            yield key
            yield from _identity(item)
    elif isinstance(value, list | tuple):
        yield len(value)
        for item in value:
            yield from _identity(item)
    elif isinstance(value, str | Path):
        yield from _named_by(str(value))
    elif isinstance(value, bool | int | float | None):
        yield value
    else:
        raise TypeError(f"{type(value).__name__} is no argument that two calls can be compared by")


def _named_by(text: str) -> Iterator[object]:
    """The text, and the state of what it may name. A judge names models behind a colon: implicit:POLICY,REFERENCE."""
    yield text
    yield from (_state(name) for name in sorted({text, *re.split("[:,]", text)}))
    if text.startswith("python:"):
        yield module_fingerprint(text.split(":")[1])


def _files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those in it, as a data set's loader finds them: it leaves out hidden folders."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (file for name in sorted(names) if (file := Path(place, name)).is_file())


def _state(name: str) -> object:
    """What a file holds, or what the files below a folder are; None where there is neither."""
    try:
        path = Path(name).expanduser()
        if not name or not path.exists():
            return None
        if path.is_file():
            return file_hash(path)
        stats = [(str(file.relative_to(path)), file.stat()) for file in _files_below(path)]
    except (OSError, ValueError, RuntimeError):  # a text too long for a name, with a null character, or ~NOBODY
        return None
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
