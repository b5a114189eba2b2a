"""``duel compare``: sample any policies on the same prompts, judge them, and give win rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from toolkit.engine.sampling import SamplingParams
from toolkit.errors import DataError, StoreError
from toolkit.evals.intervals import DEFAULT_INTERVALS, BootstrapOptions
from toolkit.files import fingerprint, refuse_others_file, write_json
from toolkit.judging import alpaca_eval, win_rates
from toolkit.judging.judge import ask_judges, check_judge
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import write_judgements
from toolkit.judging.responses import PolicyResponses
from toolkit.measure.options import PromptSelection
from toolkit.measure.sampling import SAMPLE_COLUMNS, PolicySampler, read_prompts, refusals_in, sample
from toolkit.preferences.rows import Prompt
from toolkit.preferences.samples import Sample, read_samples, stored_samples, write_samples
from toolkit.progress import Reporter
from toolkit.runs.kinds import refuse_others_folder
from toolkit.runs.store import JUDGEMENTS_FILE, RESULTS_FILE, RunFolder


def compare_policies(
    policies: Sequence[str],
    judges: Sequence[str],
    selection: PromptSelection,
    params: SamplingParams,
    options: JudgeOptions,
    *,
    out: Path,
    reporter: Reporter,
    annotations: Path | None = None,
) -> dict[str, Any]:
    """Writes ``samples-*.parquet``, ``judgements.parquet`` and ``results.json`` to ``out``, and returns the results.

    ``annotations`` is a further file, in AlpacaEval's format. ``sample_files`` of the results names each policy's table
    in ``out``. Rerunning continues: a policy's samples are stored under
    the fingerprint of all that they depend on. Judges read each response whole.

    Raises what reading the prompts, sampling and judging raise.
    """
    for judge in judges:
        check_judge(judge)  # before anything is sampled
    if annotations is not None and params.n > 1:
        what = f"{params.n} samples for a prompt, and AlpacaEval's annotations hold one output of each policy"
        raise DataError(what, where="--annotations", fix="sample one for a prompt, or leave --annotations out")
    samplers = [PolicySampler(policy, options.model, params) for policy in policies]
    refs = [sampler.ref for sampler in samplers]
    prompts = read_prompts(selection, refs)
    names = [_file_name(sampler, prompts, selection.seed) for sampler in samplers]
    refuse_others_folder(out, "comparison", (JUDGEMENTS_FILE, RESULTS_FILE))
    if annotations is not None:
        refuse_others_file(annotations, force=None, ours=alpaca_eval.is_ours)
    with RunFolder(out).lock(), refusals_in(selection, refs):
        samples = {
            sampler.policy: _samples(sampler, prompts, selection.seed, out / name, reporter)
            for sampler, name in zip(samplers, names, strict=True)
        }
        responses = PolicyResponses(
            [key for key, _ in prompts],
            [prompt for _, prompt in prompts],
            {name: [[s.response for s in group] for group in groups] for name, groups in samples.items()},
            ids={name: [[s.response_ids for s in group] for group in groups] for name, groups in samples.items()},
            truncated={name: [[s.truncated for s in group] for group in groups] for name, groups in samples.items()},
        )
        options = replace(options, max_response_tokens=params.max_new_tokens + 1)  # with the end of the text
        judged = ask_judges(judges, list(combinations(policies, 2)), responses, options, reporter)
        judgements = judged.judgements
        intervals: BootstrapOptions = {**DEFAULT_INTERVALS, "seed": selection.seed}
        write_judgements(judgements, out / JUDGEMENTS_FILE, intervals)
        results: dict[str, Any] = {"schema_version": 1, "policies": list(policies)}
        results |= win_rates.report(judgements, controls=win_rates.RECORDED_CONTROLS, **intervals)
        results["judge_usage"] = [asdict(usage) for usage in judged.usages]
        results["warnings"] = judged.warnings
        results["sample_files"] = {sampler.policy: name for sampler, name in zip(samplers, names, strict=True)}
        write_json(out / RESULTS_FILE, results)
        if annotations is not None:
            alpaca_eval.write_annotations(judgements, responses, annotations)
    return results


def _file_name(sampler: PolicySampler, prompts: Sequence[tuple[str, Prompt]], seed: int) -> str:
    """A name from all that the policy's samples depend on."""
    policy, params = sampler.ref.identity, sampler.params
    settings = [policy, params.n, params.temperature, params.max_new_tokens, seed, sampler.model.dtype, SAMPLE_COLUMNS]
    return f"samples-{fingerprint([*settings, [key for key, _ in prompts]])}.parquet"


def _samples(
    sampler: PolicySampler, prompts: Sequence[tuple[str, Prompt]], seed: int, path: Path, reporter: Reporter
) -> list[list[Sample]]:
    """The policy's responses to each prompt, sampled unless ``path`` has them already."""
    if stored_samples(path, SAMPLE_COLUMNS) is None:
        purpose = f"compare {sampler.ref.fingerprint}"
        groups = sample(sampler, prompts, seed=seed, purpose=purpose, reporter=reporter)
        write_samples([response for of_prompt in groups for response in of_prompt], path, SAMPLE_COLUMNS)
    samples, n = read_samples(path, SAMPLE_COLUMNS, error=StoreError, fix="remove it and run again"), sampler.params.n
    return [samples[p * n : (p + 1) * n] for p in range(len(prompts))]
