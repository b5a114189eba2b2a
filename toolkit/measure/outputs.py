"""Outputs of systems that are there already, for ``duel judge``: AlpacaEval's ``model_outputs.json``, duel's own
``samples.parquet``, and rows of ``prompt`` and ``response``.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DataError, nearest
from toolkit.files import table_columns
from toolkit.judging.prompt_ids import plain_prompt
from toolkit.judging.responses import PolicyResponses
from toolkit.measure.responses import prompts_of_run
from toolkit.preferences.cells import RecordError, excerpt, name_cell, prompt_cell
from toolkit.preferences.columns import PROMPTS
from toolkit.preferences.loading import SourceRecords, messages_read, read_file
from toolkit.preferences.refusals import check_unicode, in_words, prompt_texts, row_error
from toolkit.preferences.rows import Prompt, prompt_id
from toolkit.preferences.samples import SAMPLES_FILE, Sample, SampleTable, places_by_policy, table_samples
from toolkit.preferences.single_rows import RESPONSES, response_cell
from toolkit.storage.lazy import Computed
from toolkit.storage.spilled import Spill

# (system, prompt's id, response) -> its file and row, None where they are not known
SourceOfResponse = Callable[[str, str, str], tuple[str, int] | None]
_SAMPLE = ("prompt_id", "policy", "sample_index", "prompt", "response")  # what every table of samples has
# The column that names the system behind a row; AlpacaEval's is the first.
SYSTEMS = ("generator", "policy", "model", "system_name")


class Outputs:
    """The responses of one system, in the order in which they were added. Texts wait on disk, in ``stored``, which the
    systems of a file share: each of their own would take an open file.

    ``file`` and ``rows`` say where they are from. Samples have prompt ids of their own (``sampled``), and of a run's
    samples the sampled token ids and whether the response ran into the length limit are kept as well (``recorded``);
    texts alone have none of it.

    A prompt goes by a number, the 16 hex digits of the id of its text (:func:`plain_prompt`), so that files with texts
    and files with messages meet. Judges are given the prompt as it is.
    """

    def __init__(
        self, name: str, stored: Spill, file: str = "", *, sampled: bool = False, recorded: bool = False
    ) -> None:
        self.name, self.file, self.sampled, self.recorded = name, file, sampled, recorded
        self.rows = array("q")
        self._prompt_of = array("Q")
        self._stored = stored
        # Of each response: the place of its prompt, behind which are its text and what was recorded of it.
        self._at = array("q")

    def add(self, prompt: Prompt, response: str, row: int, sample: Sample | None = None) -> None:
        plain_id = prompt_id(plain_prompt(prompt))
        self._prompt_of.append(int(plain_id, 16))
        self.rows.append(row)
        self._at.append(self._stored.append((prompt, plain_id if sample is None else sample.prompt_id)))
        self._stored.append(response)
        if self.recorded and sample is not None:
            self._stored.append((sample.response_ids, sample.truncated))

    @cached_property
    def _by_prompt(self) -> tuple[array[int], array[int]]:
        """The prompts of all responses, sorted, and the place of each response. No more may be added then."""
        prompts = np.frombuffer(self._prompt_of, dtype=np.uint64)
        order = np.argsort(prompts, kind="stable")
        return array("Q", prompts[order].tobytes()), array("q", order.tobytes())

    @property
    def prompts(self) -> NDArray[np.uint64]:
        """The distinct prompts in order of first appearance, each as the number that its id writes."""
        distinct, first = np.unique(np.frombuffer(self._prompt_of, dtype=np.uint64), return_index=True)
        return distinct[np.argsort(first)]

    def places(self, prompt: int) -> array[int]:
        """Where the responses to a prompt are among those that were added."""
        prompts, places = self._by_prompt
        start = bisect_left(prompts, prompt)
        return places[start : bisect_right(prompts, prompt, lo=start)]

    def prompt(self, prompt: int) -> Prompt:
        """A prompt as the file has it."""
        as_it_is: Prompt = self._stored[self._at[self.places(prompt)[0]]][0]
        return as_it_is

    def key(self, prompt: int) -> str:
        """A prompt's id in judgements: of samples their own, else that of its text."""
        return str(self._stored[self._at[self.places(prompt)[0]]][1])

    def responses(self, prompt: int) -> list[str]:
        return [self._response(place) for place in self.places(prompt)]

    def _response(self, place: int) -> str:
        response: str = self._stored[self._at[place] + 1]
        return response

    def ids(self, prompt: int) -> list[list[int]]:
        return [self._stored[self._at[place] + 2][0] for place in self.places(prompt)]

    def truncated(self, prompt: int) -> list[bool]:
        return [self._stored[self._at[place] + 2][1] for place in self.places(prompt)]

    def source(self, prompt: int, response: str) -> tuple[str, int] | None:
        """The file and the first row of a response; None for one that is not here."""
        places = self.places(prompt)
        row = next((self.rows[place] for place in places if self._response(place) == response), None)
        return None if row is None else (self.file, row)


@dataclass(frozen=True)
class JudgedOutputs:
    """Which systems are compared on which prompts. ``notes`` say how many prompts were left out, and why.

    ``sources`` has the file and the row of a system's response to a prompt.
    """

    pairs: list[tuple[str, str]]
    responses: PolicyResponses
    notes: list[str]
    sources: SourceOfResponse


def read_outputs(files: Sequence[Path]) -> dict[str, Outputs]:
    """The systems in these files by name, in their order.

    A file of one system without a name in it goes by the name of the file. Raises DataError for a file that holds no
    outputs, and for one name in two files.
    """
    systems: dict[str, Outputs] = {}
    for file in files:
        for outputs in _of_file(file):
            if outputs.name in systems:
                fix = "rename one of the files, or the system in its rows"
                raise DataError(f"two files hold outputs of {outputs.name!r}", where=str(file), fix=fix)
            systems[outputs.name] = outputs
    return systems


def outputs_to_judge(
    files: Sequence[Path], *, policy: str | None, baseline: str | None, limit: int | None
) -> JudgedOutputs:
    """The pairs of systems to be judged, on the prompts that all of them answered.

    Every system is compared with ``baseline``; without one, each with each that comes later, in the order of the files.
    ``policy`` is the one system to be compared. Of the prompts the first ``limit`` are taken.

    Raises DataError for fewer than two systems, an unknown name, or no prompt that all have answered.
    """
    systems = read_outputs(files)
    for name in (policy, baseline):
        if name is not None and name not in systems:
            where = in_words(list(map(str, files)))
            raise DataError(f"there is no system {name!r}", where=where, fix=nearest(name, systems))
    if policy is not None and policy == baseline:
        raise DataError(f"{policy!r} would be compared with itself", where="--baseline", fix="name another system")
    pairs = _pairs(list(systems), policy, baseline)
    if not pairs:
        fix = "name a second file, or one that holds several systems"
        raise DataError(f"there is one system, {next(iter(systems))!r}", where=str(files[0]), fix=fix)
    compared = {name: systems[name] for name in systems if any(name in pair for pair in pairs)}
    first, *others = compared.values()
    shared = first.prompts[np.all([np.isin(first.prompts, outputs.prompts) for outputs in others], axis=0)]
    if not len(shared):
        example = excerpt(first.prompt(int(first.prompts[0])))
        raise DataError(
            f"no prompt has a response of {first.name!r} and of {others[0].name!r}",
            where=in_words(list(map(str, files))),
            fix=f"the systems have to answer the same prompts, with equal texts; one of {first.name!r} is {example}",
        )
    n_prompts = len(np.unique(np.concatenate([outputs.prompts for outputs in compared.values()])))
    some_left = len(shared) < n_prompts
    notes = [f"{len(shared):,} of {n_prompts:,} prompts have a response of every system"] if some_left else []
    asked: list[int] = shared[:limit].tolist()
    of_run = next((outputs for outputs in compared.values() if outputs.sampled), first)
    keys = [of_run.key(number) for number in asked]
    number_of = dict(zip(keys, asked, strict=True))
    recorded = all(outputs.recorded for outputs in compared.values())
    return JudgedOutputs(
        pairs,
        PolicyResponses(
            keys,
            Computed(asked, lambda number: _prompt([*compared.values()], number)),
            {name: Computed(asked, of.responses) for name, of in compared.items()},
            ids={name: Computed(asked, of.ids) for name, of in compared.items()} if recorded else None,
            truncated={name: Computed(asked, of.truncated) for name, of in compared.items()} if recorded else None,
        ),
        notes,
        lambda name, key, response: compared[name].source(number_of[key], response),
    )


def _prompt(systems: Sequence[Outputs], number: int) -> Prompt:
    """A prompt as a run has it, whose models were trained on that; else as messages, where a file has them.

    Which file is named first does not count.
    """
    for system in systems:
        if system.sampled:
            return system.prompt(number)
    prompts = [system.prompt(number) for system in systems]
    return next((prompt for prompt in prompts if not isinstance(prompt, str)), prompts[0])


def _pairs(names: Sequence[str], policy: str | None, baseline: str | None) -> list[tuple[str, str]]:
    """Which systems are compared.

    >>> _pairs(["a", "b", "c"], None, "b"), _pairs(["a", "b", "c"], "b", None), len(_pairs(["a", "b", "c"], None, None))
    ([('a', 'b'), ('c', 'b')], [('b', 'a'), ('b', 'c')], 3)
    """
    if policy is not None and baseline is not None:
        return [(policy, baseline)]
    if policy is not None:
        return [(policy, name) for name in names if name != policy]
    if baseline is not None:
        return [(name, baseline) for name in names if name != baseline]
    return list(combinations(names, 2))


def _of_file(file: Path) -> list[Outputs]:
    path = file / SAMPLES_FILE if file.is_dir() else file
    if path.name == SAMPLES_FILE:
        return _of_samples(path)
    if not path.is_file():
        raise DataError("no such file", where=str(path), fix="name a file of outputs, or a run folder")
    if path.suffix == ".parquet" and {*_SAMPLE} <= table_columns(path, error=DataError):
        return _of_samples(path)
    return _of_rows(messages_read(read_file(path)), path)


def _of_samples(path: Path) -> list[Outputs]:
    """The policies of a run's samples."""
    samples = SampleTable(table_samples(path, _SAMPLE, optional=("response_ids", "truncated")))
    recorded = all(sample.response_ids for sample in samples)  # a table of texts alone has none
    last = {sample.prompt_id: place for place, sample in enumerate(samples)}
    asked_of = prompts_of_run(path, last, lambda key: samples[last[key]].prompt)
    systems, stored = [], Spill()
    for name, places in places_by_policy(samples).items():
        outputs = Outputs(name, stored, file=str(path), sampled=True, recorded=recorded)
        for place in places:
            sample = samples[place]
            outputs.add(asked_of(sample.prompt_id)[0], sample.response, place + 1, sample)
        systems.append(outputs)
    return systems


def _of_rows(loaded: SourceRecords, path: Path) -> list[Outputs]:
    """The systems of rows with a prompt, a response, and maybe the system's name."""
    if not loaded.records:
        raise DataError("the file holds no outputs", where=loaded.name)
    columns = output_columns(loaded)
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    systems: dict[str, Outputs] = {}
    stored = Spill()
    for number, record in loaded.records:
        try:
            name, prompt, response = output_of(record, columns)
            for what in ("prompt", "response"):
                if record.get(str(columns[what])) is None:
                    column = str(columns[what])
                    raise RecordError(f"{column!r} is null", column=column, fix="leave the row out")
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        check_unicode(loaded, number, [*prompt_texts(prompt), response], str(columns["response"]))
        if (name := name or stem) not in systems:
            systems[name] = Outputs(name, stored, file=str(path))
        systems[name].add(prompt, response, number)
    return list(systems.values())


def output_columns(loaded: SourceRecords) -> dict[str, str | None]:
    """The columns of the prompt, the response and the system's name (None where no column has it).

    Raises DataError where no column holds a prompt or a response.
    """
    names = list(dict.fromkeys(str(name) for _, record in loaded.records[:100] for name in record))
    known = {"prompt": PROMPTS, "response": RESPONSES, "system": SYSTEMS}
    columns = {what: next((name for name in words if name in names), None) for what, words in known.items()}
    for what in ("prompt", "response"):
        if columns[what] is None:
            raise DataError(
                f"no column holds the {what}: the columns are {in_words(names)}",
                where=loaded.name,
                fix="rows need instruction and output (AlpacaEval), or prompt and response; or name a samples.parquet",
            )
    return columns


def output_of(record: Mapping[str, Any], columns: Mapping[str, str | None]) -> tuple[str, Prompt, str]:
    """(the system's name or "", the prompt, the response) of a row."""
    prompt_column, response_column = str(columns["prompt"]), str(columns["response"])
    used = [prompt_column, *(["input"] if prompt_column == "instruction" else [])]
    name = name_cell(record, columns["system"]) if columns["system"] is not None else ""
    return name, prompt_cell(record, used), response_cell(record, response_column)
