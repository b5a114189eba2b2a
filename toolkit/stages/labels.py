"""The first stage of a further round: both arms' policies are sampled on training prompts, and a judge compares.

Both arms get the same number of labels. A label is one comparison that the judge was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from toolkit.engine import distributed
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.errors import DataError, ModelError
from toolkit.evals.verdict import ARMS
from toolkit.evals.words import ARM_NAMES, counted
from toolkit.judging.labelling import PairLabels, SamplePair, label_by_principles, label_pairs
from toolkit.judging.options import JudgeOptions
from toolkit.judging.principles import Labelling, load_principles
from toolkit.models.encoding import TextEncoder, text_encoder
from toolkit.models.inspect import best_device, torch_dtype
from toolkit.models.load import load_policy
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.rows import Comparison, PreferenceRow, soft_comparisons
from toolkit.preferences.samples import Sample, by_prompt, stored_samples
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.stages.contexts import LabelsContext
from toolkit.training.labelled import COLUMNS, samples_file, write_arm_samples, write_labelled

STAGES = dict(zip(ARMS, ("ppo", "dpo"), strict=True))


def run(context: LabelsContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes for each arm its samples and its labelled comparisons. Several processes share the sampling.

    ``inputs`` have the policies of both arms as they are now: ``ppo`` and ``dpo``. Raises DataError where a policy
    writes the same text every time, ModelError where the judge answers nothing.
    """
    rounds = context.rounds
    rows = splits.limit(from_parquet(inputs["data"] / "train.parquet"), rounds.prompts, context.seed)
    sft = resolve(str(inputs["sft"] / "model"))
    encoder = text_encoder(load_tokenizer(sft), rows[0].prompt, sft.spec)
    with distributed.shared_batches():
        sampled = {arm: samples_of(arm, context, rows, encoder, inputs, out, reporter) for arm in ARMS}
    if not distributed.others_leave():
        return {}
    pairs = {arm: in_turns(rows, samples) for arm, samples in sampled.items()}
    n = labels_for_each(pairs, rounds.label_budget, reporter)
    facts: dict[str, Any] = {}
    usages = []
    for arm in ARMS:
        labelled = labels_of(pairs[arm][:n], context, reporter)
        write_labelled(preference_rows(pairs[arm][:n], labelled, rounds.labels), out, arm)
        failed = labelled.preferences.count(None)
        if failed == n:
            raise ModelError(
                f"the judge labelled none of {counted(n, 'comparison')} of {ARM_NAMES[arm]}'s samples",
                where=f"rounds.labels: {rounds.labels}",
                fix="mend the judge and run again: samples and answers are stored",
            )
        facts[arm] = {"labels": n, "failed": failed, "tied": labelled.preferences.count(0.5)}
        facts[arm] |= {"samples": len(sampled[arm]), "tokens": sum(sample.n_tokens for sample in sampled[arm])}
        if labelled.usage is not None:
            usages.append(asdict(labelled.usage))
        reporter.line(f"{ARM_NAMES[arm]}: {counted(n, 'label')}, {failed} failed, {facts[arm]['tied']} ties")
    tokens = sum(facts[arm]["tokens"] for arm in ARMS)
    return {"tokens": tokens, "judge": rounds.labels, "n_prompts": len(rows), "arms": facts, "usages": usages}


def samples_of(
    arm: str,
    context: LabelsContext,
    rows: Sequence[PreferenceRow],
    encoder: TextEncoder,
    inputs: Mapping[str, Path],
    out: Path,
    reporter: Reporter,
) -> list[Sample]:
    """Samples of the arm's policy, from ``out`` where an interrupted stage has drawn them already."""
    stored = stored_samples(samples_file(out, arm), COLUMNS)
    if stored is None:
        ref = resolve(str(inputs[STAGES[arm]] / "model"))
        stored = sample_policy(arm, ref, context, rows, encoder, reporter)
        if distributed.main_process():
            write_arm_samples(stored, out, arm)
    return stored


def sample_policy(
    arm: str,
    ref: ModelRef,
    context: LabelsContext,
    rows: Sequence[PreferenceRow],
    encoder: TextEncoder,
    reporter: Reporter,
) -> list[Sample]:
    """``rounds.samples_per_prompt`` responses to each row's prompt. The arm is a part of their seeds."""
    rounds = context.rounds
    params = SamplingParams(context.data.max_response_tokens, rounds.temperature, rounds.samples_per_prompt)
    with reporter.task(f"sample {ARM_NAMES[arm]}", len(rows) * params.n) as task:
        responses = sample_responses(
            load_policy(ref, context.model).to(best_device()),
            encoder.tokenizer,
            [encoder.prompt(row.prompt) for row in rows],
            lambda i, k: (context.seed, "labels", arm, rows[i].prompt_id, k),
            params,
            dtype=torch_dtype(context.model.dtype),
            advance=task.advance,
        )
    return [
        Sample(
            prompt_id=row.prompt_id,
            policy=arm,
            sample_index=k,
            response=encoder.decode(response.ids),
            response_ids=response.ids,
            n_tokens=len(response.ids),
            truncated=response.truncated,
        )
        for row, of_prompt in zip(rows, responses, strict=True)
        for k, response in enumerate(of_prompt)
    ]


def in_turns(rows: Sequence[PreferenceRow], samples: Sequence[Sample]) -> list[SamplePair]:
    """All pairs of different texts: one of every prompt before a second of any, to spread a budget over prompts."""
    of_prompt = by_prompt(samples)
    pairs: list[tuple[int, SamplePair]] = []
    for row in rows:
        distinct = {sample.response: sample for sample in reversed(of_prompt[row.prompt_id])}
        ordered = sorted(distinct.values(), key=lambda sample: sample.sample_index)
        pairs += enumerate(SamplePair(row.prompt, a, b) for a, b in combinations(ordered, 2))
    return [pair for _, pair in sorted(pairs, key=lambda item: item[0])]


def labels_for_each(pairs: Mapping[str, Sequence[SamplePair]], budget: int | None, reporter: Reporter) -> int:
    """How many comparisons are labelled for each arm: the same number, which both have. Raises DataError for none."""
    fewest = min(pairs, key=lambda arm: len(pairs[arm]))
    n = len(pairs[fewest]) if budget is None else min(budget, len(pairs[fewest]))
    if n == 0:
        raise DataError(
            f"{ARM_NAMES[fewest]} writes one text for each prompt, so there is nothing to compare",
            where="stage labels",
            fix="raise rounds.temperature or rounds.samples_per_prompt, or hold the policy nearer to SFT",
        )
    counts = ", ".join(f"{len(of_arm)} of {ARM_NAMES[arm]}" for arm, of_arm in pairs.items())
    reporter.line(f"pairs of different responses: {counts}; {counted(n, 'label')} for each arm")
    return n


def labels_of(pairs: Sequence[SamplePair], context: LabelsContext, reporter: Reporter) -> PairLabels:
    """The judge's labels, or those by principles."""
    rounds = context.rounds
    longest = context.data.max_response_tokens
    options = JudgeOptions(context.model, rounds.judge, max_response_tokens=longest)
    if rounds.principles is None:
        return label_pairs(rounds.labels, pairs, options, reporter)
    principles = load_principles(rounds.principles)
    return label_by_principles(Labelling(rounds.labels, principles, options, seed=context.seed), pairs, reporter)


def preference_rows(pairs: Sequence[SamplePair], labelled: PairLabels, judge: str) -> list[PreferenceRow]:
    """A row for each prompt, with the samples that were compared. Pairs that the judge failed on are left out."""
    texts: dict[str, list[str]] = {}
    prompts = {pair.first.prompt_id: pair.prompt for pair in pairs}
    comparisons: dict[str, list[Comparison]] = {}
    for pair, preference in zip(pairs, labelled.preferences, strict=True):
        if preference is None:
            continue
        of_prompt = texts.setdefault(pair.first.prompt_id, [])
        of_prompt += [text for text in pair.texts if text not in of_prompt]
        i, j = (of_prompt.index(text) for text in pair.texts)
        comparisons.setdefault(pair.first.prompt_id, []).extend(soft_comparisons(i, j, preference, judge))
    return [PreferenceRow(name, prompts[name], of_prompt, comparisons[name]) for name, of_prompt in texts.items()]
