"""``duel judge``: recorded samples before another judge, a model or a person."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, nearest
from toolkit.evals.intervals import DEFAULT_INTERVALS, BootstrapOptions
from toolkit.files import refuse_others_file
from toolkit.judging import alpaca_eval, human, win_rates
from toolkit.judging.answers import remembering
from toolkit.judging.judge import check_judge, judge_pairs, refuse_silence, silence
from toolkit.judging.llm import Usage
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, is_ours, response_hash, write_judgements
from toolkit.judging.responses import PolicyResponses
from toolkit.measure.outputs import JudgedOutputs, SourceOfResponse, outputs_to_judge
from toolkit.preferences.rows import readable
from toolkit.preferences.samples import SAMPLES_FILE, SampleTable, places_by_policy, table_samples
from toolkit.progress import Reporter
from toolkit.runs.kinds import refuse_table_of_folder
from toolkit.storage.lazy import Computed
from toolkit.storage.locks import holds_out


@dataclass(frozen=True)
class SampledPair:
    """Whose responses are judged against whose: ``samples`` is a run folder, or its ``samples.parquet``."""

    samples: Path
    policy: str
    baseline: str
    limit: int | None = None

    def responses(self) -> PolicyResponses:
        """The responses to the first ``limit`` prompts, without those that only one of the two has answered.

        They wait on disk. Raises DataError where there are no samples, or none of a policy.
        """
        of_policy = places_by_policy(self._samples)
        for name in self._pair:
            if name not in of_policy:
                raise DataError(f"there is no policy {name!r}", where=str(self.samples), fix=nearest(name, of_policy))
        samples, of_prompt = self._samples, self._of_prompt
        last = {sample.prompt_id: place for place, sample in enumerate(samples)}
        ids = [key for key in list(last)[: self.limit] if all((name, key) in of_prompt for name in self._pair)]
        if not ids:
            what = f"no prompt has a response of {self.policy!r} and of {self.baseline!r}"
            raise DataError(what, where=str(self.samples), fix="judge policies that answered the same prompts")

        recorded = all(sample.response_ids for sample in samples)  # a table of texts alone has none

        def column(field: str) -> dict[str, Sequence[list[Any]]]:
            return {name: Computed(ids, partial(self._values, field, name)) for name in self._pair}

        return PolicyResponses(
            ids,
            Computed(ids, lambda key: samples[last[key]].prompt),
            column("response"),
            ids=column("response_ids") if recorded else None,
            truncated=column("truncated") if recorded else None,
        )

    @property
    def _pair(self) -> tuple[str, str]:
        return self.policy, self.baseline

    @cached_property
    def _samples(self) -> SampleTable:
        columns = ["prompt_id", "policy", "sample_index", "prompt", "response"]
        return SampleTable(table_samples(self.samples, columns, optional=("response_ids", "truncated")))

    @cached_property
    def _of_prompt(self) -> dict[tuple[str, str], list[int]]:
        """The places of the samples of one of the two policies to a prompt, ordered by their index."""
        of_policy, groups = places_by_policy(self._samples), dict[tuple[str, str], list[int]]()
        for name in dict.fromkeys(self._pair):
            for place in of_policy[name]:
                groups.setdefault((name, self._samples[place].prompt_id), []).append(place)
        return groups

    def _values(self, field: str, name: str, key: str) -> list[Any]:
        return [getattr(self._samples[place], field) for place in self._of_prompt[name, key]]

    def sources(self) -> SourceOfResponse:
        """The row of the table of each response, the first one of equal responses."""
        file = self.samples / SAMPLES_FILE if self.samples.is_dir() else self.samples

        def source(name: str, key: str, response: str) -> tuple[str, int] | None:
            places = sorted(self._of_prompt.get((name, key), ()))
            row = next((place + 1 for place in places if self._samples[place].response == response), None)
            return None if row is None else (str(file), row)

        return source


@holds_out
def judge_samples(
    pair: SampledPair,
    judge: str,
    options: JudgeOptions,
    *,
    seed: int,
    out: Path,
    reporter: Reporter,
    annotations: Path | None = None,
    with_text: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Writes a judge's judgements to ``out``, and to ``annotations`` in AlpacaEval's format.

    The table says of each response in which file and row it is; ``with_text`` adds the prompt and both responses.
    Returns :func:`toolkit.judging.win_rates.report` with ``judge_usage``.
    Raises StoreError where ``out`` is somebody else's file, unless ``force``; DataError where a file of judgements has
    none of this pair on these prompts, ModelError where every question
    to the judge failed.
    """
    refuse_others_files(out, annotations, force)
    check_judge(judge)
    responses = pair.responses()
    judgements, usage = judge_pairs(judge, [(pair.policy, pair.baseline)], responses, options, reporter)
    refuse_silence(silence(judge, judgements, usage) if not judge.startswith("file:") else {})
    of_pair = [j for j in judgements if (j.policy, j.baseline) == (pair.policy, pair.baseline)]
    if not of_pair:
        raise DataError(
            f"no judgement of {pair.policy!r} against {pair.baseline!r} on these prompts",
            where=judge,
            fix="name two policies that it has judged, and the samples that it is of",
        )
    beside = _beside(of_pair, pair.sources(), responses, with_text)
    return _written(of_pair, responses, usage, seed, out, annotations, beside)


@dataclass(frozen=True)
class JudgedFiles:
    """Outputs of systems in ``files``: which systems are compared, on the first ``limit`` prompts that all answered."""

    files: Sequence[Path]
    policy: str | None = None
    baseline: str | None = None
    limit: int | None = None

    def read(self, reporter: Reporter) -> JudgedOutputs:
        """The outputs, as :func:`toolkit.measure.outputs.outputs_to_judge` reads them; what is left out is said."""
        outputs = outputs_to_judge(self.files, policy=self.policy, baseline=self.baseline, limit=self.limit)
        for note in outputs.notes:
            reporter.line(note)
        return outputs


@dataclass(frozen=True)
class OutputPair:
    """The one pair of systems of some files."""

    policy: str
    baseline: str
    outputs: JudgedOutputs

    def responses(self) -> PolicyResponses:
        return self.outputs.responses

    def sources(self) -> SourceOfResponse:
        return self.outputs.sources


def one_pair(files: JudgedFiles, reporter: Reporter) -> OutputPair:
    """The pair that people are asked about. Raises DataError where the files hold more than two systems."""
    outputs = files.read(reporter)
    if len(outputs.pairs) > 1:
        names = ", ".join(dict.fromkeys(name for pair in outputs.pairs for name in pair))
        what = f"people vote on one pair, and the files hold {names}"
        raise DataError(what, where=str(files.files[0]), fix="name --policy and --baseline")
    return OutputPair(*outputs.pairs[0], outputs)


@holds_out
def judge_outputs(
    files: JudgedFiles,
    judge: str,
    options: JudgeOptions,
    *,
    seed: int,
    out: Path,
    reporter: Reporter,
    annotations: Path | None = None,
    with_text: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """:func:`judge_samples` of outputs in files, of two or more systems.

    Raises what :func:`judge_samples` and :func:`toolkit.measure.outputs.outputs_to_judge` raise.
    """
    refuse_others_files(out, annotations, force)
    check_judge(judge)
    outputs = files.read(reporter)
    judgements, usage = judge_pairs(judge, outputs.pairs, outputs.responses, options, reporter)
    refuse_silence(silence(judge, judgements, usage) if not judge.startswith("file:") else {})
    known = set(outputs.responses.prompt_ids)
    of_pairs = [j for j in judgements if (j.policy, j.baseline) in outputs.pairs and j.prompt_id in known]
    if not of_pairs:
        raise DataError("no judgement of these systems on these prompts", where=judge)
    beside = _beside(of_pairs, outputs.sources, outputs.responses, with_text)
    return _written(of_pairs, outputs.responses, usage, seed, out, annotations, beside)


@holds_out
def ask_people(
    pair: SampledPair | OutputPair,
    *,
    annotator: str,
    port: int,
    seed: int,
    out: Path,
    reporter: Reporter,
    annotations: Path | None = None,
    with_text: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """The same with people as judges, who vote on a local page until Ctrl-C.

    Votes of an earlier sitting count, and those pairs are not shown again. ``annotator`` is who votes where the page is
    not told a name.
    """
    refuse_others_files(out, annotations, force)
    responses = pair.responses()
    ballots = human.Ballots(pair.policy, pair.baseline, responses, seed)
    memory_path = out.with_suffix(".votes.sqlite")
    with human.serving(ballots, memory_path, port, annotator=annotator) as server:
        reporter.line(f"vote at {server.address} (Ctrl-C ends and writes {out})")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            reporter.line("closing the page")
    with remembering(memory_path) as memory:
        judgements = human.votes(ballots, memory)
        beside = _beside(judgements, pair.sources(), responses, with_text)
        return _written(judgements, responses, None, seed, out, annotations, beside)


def refuse_others_files(out: Path, annotations: Path | None, force: bool) -> None:
    """Raises StoreError where judgements or annotations would replace a run's, or a file that duel did not write."""
    refuse_table_of_folder(out, force)
    refuse_others_file(out, force, is_ours)
    if annotations is not None:
        refuse_others_file(annotations, force, alpaca_eval.is_ours)


def _written(
    judgements: Sequence[Judgement],
    responses: PolicyResponses,
    usage: Usage | None,
    seed: int,
    out: Path,
    annotations: Path | None,
    beside: Mapping[str, Sequence[object]],
) -> dict[str, Any]:
    if annotations is not None:
        alpaca_eval.write_annotations(judgements, responses, annotations)
    intervals: BootstrapOptions = {**DEFAULT_INTERVALS, "seed": seed}
    write_judgements(judgements, out, intervals, beside)
    report = win_rates.report(judgements, controls=win_rates.RECORDED_CONTROLS, **intervals)
    return report | {"judge_usage": [asdict(usage)] if usage is not None else []}


def _beside(
    judgements: Sequence[Judgement], sources: SourceOfResponse, responses: PolicyResponses, with_text: bool
) -> dict[str, list[object]]:
    """Columns beside the judgements: the file and row of both responses, on request the prompt and both texts."""
    places = {key: place for place, key in enumerate(responses.prompt_ids)}

    def text_of(name: str, key: str, hashed: str) -> str | None:
        texts = responses.texts[name][places[key]] if name in responses.texts else ()
        return next((text for text in texts if response_hash(text) == hashed), None)

    columns: dict[str, list[object]] = defaultdict(list)
    for j in judgements:
        if with_text:
            columns["prompt"].append(readable(responses.prompts[places[j.prompt_id]]))
        for side, name, hashed in (("policy", j.policy, j.policy_hash), ("baseline", j.baseline, j.baseline_hash)):
            text = text_of(name, j.prompt_id, hashed)
            file, number = (None if text is None else sources(name, j.prompt_id, text)) or (None, None)
            columns[f"{side}_file"].append(file)
            columns[f"{side}_row"].append(number)
            if with_text:
                columns[f"{side}_response"].append(text)
    return columns
