"""Recorded samples: what policies wrote for prompts, as a run's ``samples.parquet`` has them, one row per response."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, DuelError, StoreError
from toolkit.files import table_columns, table_rows, write_row_groups
from toolkit.preferences.cells import excerpt
from toolkit.storage.integrity import refuse_changed
from toolkit.storage.lazy import LazySequence
from toolkit.storage.spilled import Spill

_log = logging.getLogger(__name__)
SAMPLES_FILE = "samples.parquet"


@dataclass(frozen=True)
class Sample:
    """One response of a policy. Columns that a file was not asked for, or does not record, have their default.

    ``kind`` of the policy: base, sft, checkpoint, round (the end of an earlier round), final or best_of_n (picked among
    samples, not drawn). ``truncated``: the response reached the length limit without an end of text. Log-probabilities
    are sums over the response in nats, ``policy_logp`` under the policy at the sampling temperature; ``kl_nats`` is
    what it exceeds the reference's by.
    """

    prompt_id: str
    policy: str = ""
    arm: str = ""
    kind: str = ""
    step: int = 0
    sample_index: int = 0
    prompt: str = ""  # as a person reads it
    response: str = ""
    response_ids: list[int] = field(default_factory=list)
    n_tokens: int = 0
    truncated: bool = False
    policy_logp: float | None = None
    kl_nats: float | None = None
    implicit_reward: float | None = None
    explicit_reward: float | None = None
    gold_reward: float | None = None
    reward_disagreement: float | None = None  # of the outputs of an ensemble, or the heads of annotators


COLUMNS = tuple(column.name for column in fields(Sample))
# Those that files of earlier versions do not have.
LATER = ("reward_disagreement",)
_TYPES = {column.name: str(column.type) for column in fields(Sample)}


def write_samples(samples: Iterable[Sample], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Write these columns of samples as a Parquet file, whole or not at all."""
    import pyarrow as pa

    kinds = {
        "str": pa.string(),
        "int": pa.int64(),
        "bool": pa.bool_(),
        "float | None": pa.float64(),
        "list[int]": pa.list_(pa.int64()),
    }
    schema = pa.schema([(column.name, kinds[str(column.type)]) for column in fields(Sample) if column.name in columns])
    write_row_groups([[vars(sample) for sample in samples]], schema, path)


def is_samples(path: Path) -> bool:
    """Whether a path is a run folder, or a table of samples in one.

    Other tables go by what they hold: ``samples.parquet`` is the name that runs give.
    """
    return path.is_dir() or path.name == SAMPLES_FILE


def stored_samples(path: Path, columns: Sequence[str] = COLUMNS) -> list[Sample] | None:
    """The samples of a file that a command stored to go on from; None where it is not there or is damaged.

    A damaged one is named in the log, and removed.
    """
    if not path.is_file():
        return None
    try:
        return read_samples(path, columns, error=StoreError)
    except StoreError as error:
        _log.warning("%s, and sampled again: %s", error.what, path)
        path.unlink(missing_ok=True)
        return None


def read_samples(
    path: Path,
    columns: Sequence[str] = COLUMNS,
    *,
    optional: Sequence[str] = (),
    error: type[DuelError] = DataError,
    fix: str = "name a run folder, or its samples.parquet",
) -> list[Sample]:
    """The samples of :func:`table_samples`."""
    return list(table_samples(path, columns, optional=optional, error=error, fix=fix))


def table_samples(
    path: Path,
    columns: Sequence[str] = COLUMNS,
    *,
    optional: Sequence[str] = (),
    error: type[DuelError] = DataError,
    fix: str = "name a run folder, or its samples.parquet",
) -> Iterator[Sample]:
    """These columns of the samples in a run folder, or in such a file, read as they are asked for.

    Raises ``error`` where it does not have them. Columns in ``optional`` are read where all of them are there, and keep
    their defaults elsewhere; so does each that files of earlier versions lack.
    """
    file = path / SAMPLES_FILE if path.is_dir() else path
    if not file.is_file():
        raise error("there are no samples: the table is missing", where=str(file), fix=fix)
    refuse_changed(file)
    there = table_columns(file, error=error, fix=fix)
    further = [*optional] if set(optional) <= there else []
    wanted = [name for name in columns if name in there or name not in LATER] + further
    for number, row in enumerate(table_rows(file, wanted, error=error, fix=fix), start=1):
        yield _sample(row, f"{file}, row {number}", error, fix)


class SampleTable(LazySequence[Sample]):
    """Samples that wait on disk."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._stored = Spill()
        for sample in samples:
            self._stored.append([getattr(sample, name) for name in COLUMNS])

    def __len__(self) -> int:
        return len(self._stored)

    def item(self, at: int) -> Sample:
        return Sample(*self._stored[at])


def _sample(row: Mapping[str, Any], where: str, error: type[DuelError], fix: str) -> Sample:
    """A row as a sample. Raises ``error`` where a value is missing or of another type."""
    for name, value in row.items():
        if not _fits(value, _TYPES[name]):
            raise error(f"{name} is {excerpt(value)}, expected {_TYPES[name]}", where=f"{where}", fix=fix)
    return Sample(**row)


def _fits(value: object, kind: str) -> bool:
    if kind == "list[int]":
        return isinstance(value, list) and all(type(item) is int for item in value)
    if kind == "float | None":
        return value is None or isinstance(value, int | float)
    return type(value).__name__ == kind


def by_policy(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples of each policy, in order of first appearance."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.policy, []).append(sample)
    return groups


def by_prompt(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples for each prompt's id, in order of first appearance."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt_id, []).append(sample)
    return groups


def places_by_policy(samples: Iterable[Sample]) -> dict[str, Sequence[int]]:
    """Where each policy's samples are, ordered by ``sample_index``; the policies in order of first appearance.

    >>> places_by_policy([Sample("p", "a", sample_index=1), Sample("q", "b"), Sample("p", "a")])
    {'a': [2, 0], 'b': [1]}
    """
    of_policy: dict[str, tuple[array[int], array[int]]] = {}
    for place, sample in enumerate(samples):
        places, indices = of_policy.setdefault(sample.policy, (array("q"), array("q")))
        places.append(place)
        indices.append(sample.sample_index)
    return {
        name: [places[k] for k in sorted(range(len(places)), key=indices.__getitem__)]
        for name, (places, indices) in of_policy.items()
    }
