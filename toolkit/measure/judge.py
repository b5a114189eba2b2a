"""``duel judge``: recorded samples before another judge, a model or a person."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.evals.intervals import DEFAULT_INTERVALS, BootstrapOptions
from toolkit.evals.words import counted
from toolkit.files import refuse_others_file
from toolkit.judging import alpaca_eval, human, win_rates
from toolkit.judging.answers import remembering
from toolkit.judging.judge import check_judge, judge_pairs, refuse_silence, silence
from toolkit.judging.llm import Usage
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, is_ours, response_hash, write_judgements
from toolkit.measure.outputs import JudgedOutputs, outputs_to_judge
from toolkit.preferences.rows import readable
from toolkit.progress import Reporter
from toolkit.runs.kinds import refuse_table_of_folder
from toolkit.storage.locks import holds_out


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
    """Writes a judge's judgements to ``out``, and to ``annotations`` in AlpacaEval's format.

    The table says of each response in which file and row it is; ``with_text`` adds the prompt and both responses.
    Returns :func:`toolkit.judging.win_rates.report` with ``judge_usage``.
    Raises StoreError where ``out`` is somebody else's file, unless ``force``; DataError where a file of judgements has
    none of these systems on these prompts, or where ``annotations`` cannot hold their responses; ModelError where every
    question to the judge failed; and what :func:`toolkit.measure.outputs.outputs_to_judge` raises.
    """
    refuse_others_files(out, annotations, force)
    check_judge(judge)
    outputs = files.read(reporter)
    if annotations is not None:
        alpaca_eval.check_samples(outputs.pairs, outputs.responses)
    judgements, usage = judge_pairs(judge, outputs.pairs, outputs.responses, options, reporter)
    refuse_silence(silence(judge, judgements, usage) if not judge.startswith("file:") else {})
    known = set(outputs.responses.prompt_ids)
    of_pairs = [j for j in judgements if (j.policy, j.baseline) in outputs.pairs and j.prompt_id in known]
    if not of_pairs:
        asked = ", ".join(f"{policy!r} against {baseline!r}" for policy, baseline in outputs.pairs[:3])
        fix = "name systems that it has judged, and the outputs that it is of"
        raise DataError(f"no judgement of {asked} on these prompts", where=judge, fix=fix)
    return _written(of_pairs, outputs, usage, seed, out, annotations, with_text)


@holds_out
def ask_people(
    files: JudgedFiles,
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
    """:func:`judge_outputs` with people as judges of one pair of systems, who vote on a local page until Ctrl-C.

    Votes of an earlier sitting count, and those pairs are not shown again. Stored votes on other responses are left
    out, and their number is said. ``annotator`` is who votes where the page is not told a name.
    """
    refuse_others_files(out, annotations, force)
    outputs = files.read(reporter)
    policy, baseline = _one_pair(files, outputs)
    if annotations is not None:
        alpaca_eval.check_samples(outputs.pairs, outputs.responses)
    ballots = human.Ballots(policy, baseline, outputs.responses, seed)
    memory_path = out.with_suffix(".votes.sqlite")
    with human.serving(ballots, memory_path, port, annotator=annotator) as server:
        reporter.line(f"vote at {server.address} (Ctrl-C ends and writes {out})")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            reporter.line("closing the page")
    with remembering(memory_path) as memory:
        judgements = human.votes(ballots, memory)
        n_others = human.n_other_votes(ballots, memory)
    if n_others:
        reporter.line(
            f"{memory_path} has {counted(n_others, 'vote')} on other responses or prompts: left out of {out}, and kept"
        )
    return _written(judgements, outputs, None, seed, out, annotations, with_text)


def _one_pair(files: JudgedFiles, outputs: JudgedOutputs) -> tuple[str, str]:
    """The pair that people are asked about. Raises DataError where there are more."""
    if len(outputs.pairs) > 1:
        names = ", ".join(dict.fromkeys(name for pair in outputs.pairs for name in pair))
        what = f"people vote on one pair, and the files hold {names}"
        raise DataError(what, where=str(files.files[0]), fix="name --policy and --baseline")
    return outputs.pairs[0]


def refuse_others_files(out: Path, annotations: Path | None, force: bool) -> None:
    """Raises StoreError where judgements or annotations would replace a run's, or a file that duel did not write."""
    refuse_table_of_folder(out, force)
    refuse_others_file(out, force, is_ours)
    if annotations is not None:
        refuse_others_file(annotations, force, alpaca_eval.is_ours)


def _written(
    judgements: Sequence[Judgement],
    outputs: JudgedOutputs,
    usage: Usage | None,
    seed: int,
    out: Path,
    annotations: Path | None,
    with_text: bool,
) -> dict[str, Any]:
    intervals: BootstrapOptions = {**DEFAULT_INTERVALS, "seed": seed}
    write_judgements(judgements, out, intervals, _beside(judgements, outputs, with_text))
    if annotations is not None:
        alpaca_eval.write_annotations(judgements, outputs.responses, annotations)
    report = win_rates.report(judgements, controls=win_rates.RECORDED_CONTROLS, **intervals)
    return report | {"judge_usage": [asdict(usage)] if usage is not None else []}


def _beside(judgements: Sequence[Judgement], outputs: JudgedOutputs, with_text: bool) -> dict[str, list[object]]:
    """Columns beside the judgements: the file and row of both responses, on request the prompt and both texts."""
    responses = outputs.responses
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
            file, number = (None if text is None else outputs.sources(name, j.prompt_id, text)) or (None, None)
            columns[f"{side}_file"].append(file)
            columns[f"{side}_row"].append(number)
            if with_text:
                columns[f"{side}_response"].append(text)
    return columns
