"""One evaluation for every policy: the same held-out prompts, the same sampling, the same scores.

Writes ``samples.parquet``, ``rewards.parquet`` and ``judgements.parquet``. ``evals/summary.py`` computes
``evaluation.json`` from these tables: what they say, with intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.engine import distributed
from toolkit.errors import RecipeError
from toolkit.evals import summary
from toolkit.evals.beside_verdict import complete_verdict
from toolkit.evals.broken import constant_reward
from toolkit.evals.implicit_reward import defined_by
from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.result_warnings import milestones_not_reached
from toolkit.evals.reward_outputs import JudgedPair, outputs_report
from toolkit.evals.training_signals import TRAINING_SIGNALS
from toolkit.evals.verdict import ARMS
from toolkit.files import read_json, write_json, write_table
from toolkit.judging import win_rates
from toolkit.judging.deciding import judging_of
from toolkit.judging.ended import where_both_ended
from toolkit.judging.held_out import examine_judges
from toolkit.judging.independence import RunModels
from toolkit.judging.judge import name_training_signals
from toolkit.judging.records import check_recorded_names, write_judgements
from toolkit.measure.best_of_n import best_of_n_rows
from toolkit.measure.judged_policies import judge_all
from toolkit.measure.policies import EvaluationSettings, Policy, TrainedModels, find_policies, samples_of
from toolkit.measure.process import StepScoring, explicit_steps, implicit_steps, process_head, process_results
from toolkit.measure.rounds import add_rounds, rounds_of, summed_records
from toolkit.measure.scores import (
    HeldOutReward,
    ScoredPrompt,
    best_of_n,
    held_out_rewards,
    held_out_scores,
    score_everything,
    with_scores,
)
from toolkit.measure.temperatures import ComparedTemperatures, JudgedSamples, compare_temperatures, further_samples
from toolkit.models.resolve import ModelRef, resolve, training_record
from toolkit.models.reward_head import reward_head
from toolkit.preferences import splits
from toolkit.preferences.gold import gold_is_known
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.samples import write_samples
from toolkit.preferences.solutions import solutions_from_parquet
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.arms import labels_difference, trained_differences
from toolkit.recipe.schema import EvaluateSection
from toolkit.stages.contexts import EvaluateContext


def run(context: EvaluateContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes the three tables and ``evaluation.json``: the run's ``results.json`` without recipe and cost.

    Several processes share sampling and scoring. The main one goes on alone: it asks the judges, and computes.
    """
    section: EvaluateSection = context.evaluate
    models = TrainedModels(*(resolve(str(inputs[name] / "model")) for name in ("sft", "reward_model", "dpo")))
    settings = EvaluationSettings.of(context, from_parquet(inputs["data"] / "eval.parquet"), models.sft)
    has_gold, warnings = gold_is_known(settings.rows)
    judges, renamed = choose_judges(section.judges, has_gold, models)
    check_recorded_names([*section.judges, *judges])  # a signal has its short name only now
    policies = find_policies(context, inputs, models.sft)
    implicit = defined_by(training_record(models.dpo))
    bootstrap: BootstrapOptions = {
        "n_resamples": section.bootstrap,
        "confidence": section.confidence,
        "seed": context.seed,
    }
    with distributed.shared_batches():
        drawn = [sample for policy in policies for sample in samples_of(policy, settings, out / "policies", reporter)]
        further = further_samples(policies, settings, models.sft, out, has_gold, reporter)
        scored = score_everything(drawn, settings, models, reporter)
        process = process_section(inputs, models, settings, implicit.beta, bootstrap, reporter)
    if not distributed.others_leave():
        return {}

    rewards = held_out_rewards(settings.rows, scored, implicit)
    scored_samples = with_scores(drawn, settings.rows, scored, implicit, has_gold)
    samples = [sample for sample in scored_samples if sample.sample_index < section.samples_per_prompt]
    samples += best_of_n(scored_samples, section)

    asked = judge_all(judges, samples, [policy.name for policy in policies], settings, reporter)
    tests, test_usages = examine_judges(
        judges,
        settings.rows,
        section.judge_test_pairs,
        settings.judge_options,
        reporter,
        known_scores=held_out_scores(settings.rows, rewards),
        bootstrap=bootstrap,
    )
    write_samples(samples, out / "samples.parquet")
    write_table([asdict(reward) for reward in rewards], out / "rewards.parquet")
    write_json(out / "data_report.json", read_json(inputs["data"] / "report.json"))
    judgements = asked.judgements
    write_judgements(judgements, out / "judgements.parquet", bootstrap)
    judged = win_rates.report(judgements, controls=win_rates.RECORDED_CONTROLS, **bootstrap)
    write_json(out / "judging.json", {name: judged[name] for name in ("bradley_terry", "judge_agreement")})
    prompt_ids, own = [row.prompt_id for row in settings.rows], run_models(inputs, models, policies)
    judging, doubts = judging_of(judgements, judges, tests, section, prompt_ids, own, bootstrap, asked.dependent)
    judging = replace(judging, broken_arms=trained_on_a_constant(rewards, inputs))
    result = summary.summarise(
        [vars(sample) for sample in samples],
        [vars(reward) for reward in rewards],
        judged["win_rates"],
        [(p, *pair) for p, row in enumerate(settings.rows) for pair in splits.pairs(row)],
        best_of_n=section.best_of_n,
        options=bootstrap,
        judging=judging,
        warnings=[*warnings, *renamed, *asked.warnings, *doubts],
    )
    ended = where_both_ended(judgements, samples, list(result["verdict"]["judges"]), **bootstrap)
    complete_verdict(result, ended, judging)
    records = {stage: summed_records(inputs, stage) for stage in ("ppo", "dpo")}
    kl_nats = {row["policy"]: row["kl_nats"] for row in result["policies"]}
    differences = trained_differences(records, kl_nats, context.data.max_response_tokens)
    missed = {
        arm: records[stage]["metrics"].get("kl_milestones_missed", [])
        for arm, stage in zip(ARMS, ("ppo", "dpo"), strict=True)
    }
    result["warnings"] += milestones_not_reached(missed, kl_nats)
    result["reward_outputs"] = reward_outputs(models.reward_model, settings.rows, scored, bootstrap)
    result["best_of_n"] = best_of_n_rows(scored_samples, bootstrap) if section.best_of_n else []
    result["process"] = process
    if process is not None:
        report = read_json(inputs["data"] / "report.json")
        differences.insert(0, labels_difference(report["steps"]["train"]["n_labels"], report["train"]["n_comparisons"]))
    result["arm_differences"] = [difference.as_dict() for difference in differences]
    # The pipeline adds it to the cost.
    result["judge_usage"] = [asdict(usage) for usage in [*asked.usages, *test_usages]]
    add_rounds(result, inputs, judges, bootstrap)
    if further:
        main = JudgedSamples(samples, judgements)
        add_temperatures(
            result, compare_temperatures(main, further, judges, judging, settings, out, bootstrap, reporter)
        )
    write_json(out / "evaluation.json", result)
    reporter.line(result["verdict"]["sentence"])
    n_tokens = sum(sample.n_tokens for sample in samples)
    n_further = [sample.n_tokens for drawn in further.values() for sample in drawn]
    # Each token was sampled once and scored four times; at further temperatures it was scored twice.
    return {"tokens": 5 * n_tokens + 3 * sum(n_further), "n_samples": len(samples) + len(n_further)}


def process_section(
    inputs: Mapping[str, Path],
    models: TrainedModels,
    settings: EvaluationSettings,
    beta: float,
    bootstrap: BootstrapOptions,
    reporter: Reporter,
) -> dict[str, Any] | None:
    """``process`` of ``results.json``: the process reward model and DPO's implicit reward on held-out steps.

    None where the reward model is of another kind.
    """
    if reward_head(models.reward_model.path).process is None:
        return None
    solutions = solutions_from_parquet(inputs["data"] / "eval_steps.parquet")
    head = process_head(models.reward_model)
    scoring = StepScoring(settings.model, settings.max_response_tokens, settings.section.token_budget)
    explicit = explicit_steps(models.reward_model, solutions, scoring, reporter)
    implicit = implicit_steps(models.dpo, models.sft, beta, head.separator, solutions, scoring, reporter)
    return {**asdict(head), "beta": beta, **process_results(explicit, implicit, bootstrap)}


def trained_on_a_constant(rewards: Sequence[HeldOutReward], inputs: Mapping[str, Path]) -> dict[str, str]:
    """RM + PPO with a reason against it, where its reward model gives every response the same score."""
    record = training_record(resolve(str(inputs["ppo"] / "model")))
    reason = constant_reward([reward.explicit_reward for reward in rewards])
    return {"rm_ppo": reason} if reason and record.get("reward") != "length" else {}


def reward_outputs(
    reward_model: ModelRef, rows: Sequence[PreferenceRow], scored: Sequence[ScoredPrompt], options: BootstrapOptions
) -> dict[str, Any] | None:
    """What an ensemble's members or annotators' heads say of the held-out comparisons; None of one output."""
    head = reward_head(reward_model.path)
    if head.n_outputs == 1:
        return None
    outputs = [np.array([scores.outputs for scores in prompt.held_out]) for prompt in scored]
    explicit = [np.array([scores.explicit_reward for scores in prompt.held_out]) for prompt in scored]
    comparisons = [(p, *pair) for p, row in enumerate(rows) for pair in splits.pairs(row)]
    pairs = [JudgedPair(p, *pair) for p, row in enumerate(rows) for pair in splits.by_annotator(row)]
    return {
        "combine": head.annotator or head.combine,
        **outputs_report(head.outputs, outputs, explicit, comparisons, pairs, options),
    }


def add_temperatures(result: dict[str, Any], compared: ComparedTemperatures) -> None:
    """Add ``temperatures`` to ``evaluation.json``, with the warnings about them and what their judges took."""
    result["temperatures"] = compared.entries
    result["warnings"] += compared.warnings
    result["judge_usage"] += [asdict(usage) for usage in compared.usages]


def choose_judges(judges: Sequence[str], has_gold: bool, models: TrainedModels) -> tuple[list[str], list[str]]:
    """The judges of a run, and warnings about those that are training signals by another name.

    Raises RecipeError where ``gold`` shall judge and the data has none.
    """
    chosen = judges or (["gold"] if has_gold else list(TRAINING_SIGNALS))
    if "gold" in chosen and not has_gold:
        raise RecipeError("the data has no gold reward", where="evaluate.judges", fix="name another judge")
    implicit = [models.dpo.fingerprint, models.sft.fingerprint]
    return name_training_signals(chosen, {"rm": [models.reward_model.fingerprint], "implicit": implicit})


def run_models(inputs: Mapping[str, Path], models: TrainedModels, policies: Sequence[Policy]) -> RunModels:
    """What no judge of this run may be. The base model may, and so may SFT where it is the base model, untrained."""
    kinds = {"checkpoint", "round", "final"} | ({"sft"} if any(policy.kind == "base" for policy in policies) else set())
    trained = {policy.ref.fingerprint: policy.name for policy in policies if policy.kind in kinds}
    rewards = {models.reward_model.fingerprint: "its reward model"}
    for round_, folder in rounds_of(inputs, "reward_model").items():
        rewards[resolve(str(folder / "model")).fingerprint] = f"its reward model of round {round_}"
    return RunModels(inputs["sft"].parent, trained | rewards)
