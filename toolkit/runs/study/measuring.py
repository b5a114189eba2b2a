"""Measuring a study's policies: rows of its table for the policies of a trial on dev or test prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from toolkit.errors import DataError, RecipeError
from toolkit.evals.broken import broken_policy
from toolkit.evals.judge_tests import JudgeTest
from toolkit.files import code_fingerprint, fingerprint
from toolkit.judging.held_out import examine_judges
from toolkit.judging.options import JudgeOptions
from toolkit.measure.policies import EvaluationSettings, Policy
from toolkit.measure.policy_scores import PromptScore, ScoreFiles, judge_policy, samples_with_kl
from toolkit.models.resolve import ModelRef, resolve, training_record
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.samples import Sample
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.study_conflicts import labels_of
from toolkit.runs.engines import Task
from toolkit.runs.plan import judge_fingerprints
from toolkit.runs.store import SCORES_FOLDER
from toolkit.runs.study.trials import OWN_REWARD_MODEL, SFT, StudyPlan, Trial
from toolkit.stages.contexts import EvaluateContext, context_of, settings_of

# Of `evaluate`, what a policy's samples depend on. The other settings are of judges and of a run's own tables.
SAMPLING = ("temperature", "samples_per_prompt", "max_new_tokens")


@dataclass(frozen=True)
class Held:
    """The held-out prompts of a study: a prompt is a dev prompt, which selects, or a test prompt."""

    dev: tuple[str, ...]
    test: tuple[str, ...]

    def of(self, split: str) -> tuple[str, ...]:
        return self.dev if split == "dev" else self.test


def held_out(data: Path, plan: StudyPlan) -> tuple[Held, list[PreferenceRow]]:
    """The dev and test prompts, and all held-out rows. Raises DataError where either has none."""
    rows = from_parquet(data / "eval.parquet")
    return held_of(rows, plan), rows


def held_of(rows: Sequence[PreferenceRow], plan: StudyPlan) -> Held:
    """The held-out rows as dev and test prompts. Raises DataError where either has none."""
    fraction = plan.section.dev_fraction
    test, dev = splits.split_rows(rows, fraction, plan.base.recipe.data_seed, purpose="dev")
    if not dev or not test:
        empty = "dev" if not dev else "test"
        raise DataError(
            f"{len(rows)} held-out prompts leave no {empty} prompt with study.dev_fraction = {fraction:g}",
            where="study.dev_fraction",
            fix="hold out more prompts (data.eval_fraction, data.eval_prompts), or change the share",
        )
    return Held(tuple(row.prompt_id for row in dev), tuple(row.prompt_id for row in test))


def judges_of(plan: StudyPlan, rows: Sequence[PreferenceRow]) -> list[str]:
    """The judges of the study: those of the recipe, or gold where the data has it.

    Raises RecipeError where there is none that decides, or ``select_by`` is none of them.
    """
    has_gold = all(row.gold is not None for row in rows)
    judges = list(plan.base.recipe.evaluate.judges) or (["gold"] if has_gold else [])
    if not judges:
        raise RecipeError(
            "a study needs a judge that no arm was trained on, and the data has no gold reward",
            where="evaluate.judges",
            fix="name one: rm:MODEL of other data, python:MODULE:FUNCTION, llm:MODEL or openai:MODEL@BASE_URL",
        )
    labels_gold = "online_dpo_gold" in plan.section.controls and labels_of(plan.base.recipe) == "gold"
    if ("gold" in judges or labels_gold) and not has_gold:
        raise RecipeError("the data has no gold reward", where="evaluate.judges", fix="name another judge")
    select_by = plan.section.select_by
    if select_by is not None and select_by not in judges:
        fix = f"one of {', '.join(judges)}"
        raise RecipeError(f"{select_by!r} is no judge of this study", where="study.select_by", fix=fix)
    return judges


def judge_tests(
    trial: Trial, judges: Sequence[str], rows: Sequence[PreferenceRow], reporter: Reporter
) -> dict[str, JudgeTest]:
    """Each judge against the labels of dev prompts, as in a run. The reward model of the study is none of them."""
    section, model = trial.loaded.recipe.evaluate, trial.loaded.recipe.model
    gold = [row.gold for row in rows if row.gold is not None]
    tests, _ = examine_judges(
        [judge for judge in judges if judge != OWN_REWARD_MODEL],
        rows,
        section.judge_test_pairs,
        JudgeOptions(model, section.judge, token_budget=section.token_budget),
        reporter,
        known_scores={"gold": gold} if len(gold) == len(rows) else {},
        bootstrap={"n_resamples": section.bootstrap, "confidence": section.confidence, "seed": trial.seed},
    )
    return tests


@dataclass(frozen=True)
class KeptPolicy:
    """A policy along a trial's training. ``checkpoint`` counts from 1; ``cost`` is what training had taken until it."""

    checkpoint: int
    ref: ModelRef
    cost: Mapping[str, Any]


def kept_policies(trial: Trial) -> list[KeptPolicy]:
    """The policies of a trial in the order of training, one for each checkpoint of its recipe.

    Training that ended early, at ``max_kl`` for instance, has fewer: its last policy stands for the rest.
    """
    if trial.arm == SFT:
        return [KeptPolicy(1, resolve(str(trial.folder / "sft" / "model")), {"train_tokens": 0, "wall_s": 0.0})]
    stage = trial.folder / trial.stage
    refs = [resolve(str(folder)) for folder in [*(stage / "checkpoints").glob("step-*"), stage / "model"]]
    records = sorted(((training_record(ref), ref) for ref in refs), key=lambda item: int(item[0]["step"]))
    records += [records[-1]] * (trial.n_checkpoints - len(records))
    costs = [{name: record[name] for name in ("train_tokens", "wall_s")} for record, _ in records]
    return [KeptPolicy(n, ref, cost) for n, ((_, ref), cost) in enumerate(zip(records, costs, strict=True), start=1)]


# ---------------------------------------------------------------- tasks


def tasks(
    wanted: Sequence[tuple[Trial, Sequence[int] | None]],
    split: str,
    held: Held,
    judges: Sequence[str],
    sft_trials: Sequence[Trial],
) -> list[Task]:
    """A task for each trial: its policies at these checkpoints (None: all) on a split, by every judge."""
    sft = {trial.seed: trial for trial in sft_trials}
    return [
        Task(trial.label, measure, (trial, sft[trial.seed], split, held.of(split), tuple(judges), checkpoints))
        for trial, checkpoints in wanted
    ]


def measure(
    trial: Trial,
    sft_trial: Trial,
    split: str,
    prompt_ids: Sequence[str],
    judges: Sequence[str],
    checkpoints: Sequence[int] | None,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """A task: the rows of the trial's policies at these checkpoints. What is in their files is not computed again."""
    sft, settings = _settings(trial, sft_trial, prompt_ids)
    kept = [policy for policy in kept_policies(trial) if checkpoints is None or policy.checkpoint in checkpoints]
    baseline = _samples(sft_trial, kept_policies(sft_trial)[0], split, sft, settings, reporter)[1]
    table = []
    for policy in kept:
        files, samples = _samples(trial, policy, split, sft, settings, reporter)
        broken = broken_policy([*map(vars, samples)], [*map(vars, baseline or [])]) if samples and baseline else ""
        if broken:  # what a judge says of it would be a number from garbage
            reporter.line(f"{trial.label}, checkpoint {policy.checkpoint} {broken}")
            samples = None
        length = fmean(sample.n_tokens for sample in samples) if samples else None
        for judge in judges:
            spec = judge
            if judge == OWN_REWARD_MODEL:
                spec = f"rm:{sft_trial.folder / 'reward_model' / 'model'}"
            key = fingerprint(
                [judge_fingerprints(spec, settings.section.judge), settings.section.judge.model_dump(mode="json")]
            )
            key = fingerprint([key, broken]) if broken else key
            scores = judge_policy(judge, spec, key, samples, baseline or [], settings, files, reporter)
            facts = {**policy.cost, "n_tokens": length, "broken": broken}
            table += [_row(trial, policy.checkpoint, split, facts, score) for score in scores]
    return table


def sampled(trial: Trial, sft_trial: Trial, split: str, prompt_ids: Sequence[str]) -> int:
    """How many of the policies of a trained trial have their samples on a split."""
    sft, settings = _settings(trial, sft_trial, prompt_ids)
    files = [_files(trial, policy, split, sft, settings) for policy in kept_policies(trial)]
    return sum(of_policy.samples.is_file() for of_policy in files)


def _settings(trial: Trial, sft_trial: Trial, prompt_ids: Sequence[str]) -> tuple[ModelRef, EvaluationSettings]:
    """The SFT policy of the trial's seed, and how the trial's policies are measured on these prompts."""
    context = context_of("evaluate", trial.loaded.recipe)
    assert isinstance(context, EvaluateContext)
    wanted = set(prompt_ids)
    rows = [row for row in from_parquet(trial.folder / "data" / "eval.parquet") if row.prompt_id in wanted]
    sft = resolve(str(sft_trial.folder / "sft" / "model"))
    # Every checkpoint may be chosen: none is one that a run only draws a curve with, on fewer prompts.
    context = replace(context, evaluate=context.evaluate.model_copy(update={"checkpoint_prompts": None}))
    return sft, EvaluationSettings.of(context, rows, sft)


def _samples(
    trial: Trial,
    policy: KeptPolicy,
    split: str,
    sft: ModelRef,
    settings: EvaluationSettings,
    reporter: Reporter,
) -> tuple[ScoreFiles, list[Sample] | None]:
    name = SFT if trial.arm == SFT else f"{trial.arm}@{policy.checkpoint}"
    kind = SFT if trial.arm == SFT else "checkpoint"
    to_sample = Policy(name, trial.arm, kind, policy.checkpoint, policy.ref, settings.section.samples_per_prompt)
    files = _files(trial, policy, split, sft, settings)
    return files, samples_with_kl(to_sample, sft, settings, files, reporter)


def _files(trial: Trial, policy: KeptPolicy, split: str, sft: ModelRef, settings: EvaluationSettings) -> ScoreFiles:
    return ScoreFiles(trial.folder / SCORES_FOLDER, f"{split}-{policy.checkpoint}", _key(trial, policy, settings, sft))


def _key(trial: Trial, policy: KeptPolicy, settings: EvaluationSettings, sft: ModelRef) -> str:
    """What a policy's samples depend on."""
    section = {name: getattr(settings.section, name) for name in SAMPLING}
    model = settings_of(context_of("sft", trial.loaded.recipe))
    return fingerprint(
        {
            "policy": [policy.ref.fingerprint, sft.fingerprint, policy.checkpoint, trial.arm],
            "model": {name: value for name, value in model.items() if name.startswith("model.")},
            "evaluate": section,
            "max_new_tokens": settings.max_new_tokens,
            "seed": settings.seed,
            "prompts": [row.prompt_id for row in settings.rows],
            "code": code_fingerprint("toolkit.measure.policy_scores"),
        }
    )


def failed_rows(
    trial: Trial, split: str, held: Held, judges: Sequence[str], checkpoints: Iterable[int]
) -> Iterator[dict[str, Any]]:
    """The rows of policies that there are not, or that a judge said nothing of: no score, which counts as the worst."""
    facts = {"train_tokens": None, "wall_s": None, "n_tokens": None, "broken": ""}
    for checkpoint in checkpoints:
        for judge in judges:
            for prompt_id in held.of(split):
                yield _row(trial, checkpoint, split, facts, PromptScore(prompt_id, judge, None, None, None))


def _row(trial: Trial, checkpoint: int, split: str, facts: Mapping[str, Any], score: PromptScore) -> dict[str, Any]:
    """A row of the table. ``facts`` are of the policy: its cost, its samples' mean length, what is wrong with it."""
    return {
        "arm": trial.arm,
        "setting": trial.setting,
        "seed": trial.seed,
        "checkpoint": checkpoint,
        "split": split,
        "prompt_id": score.prompt_id,
        "kl_nats": score.kl_nats,
        "train_tokens": facts["train_tokens"],
        "wall_s": facts["wall_s"],
        "n_tokens": facts["n_tokens"],
        "broken": facts["broken"],
        "judge": score.judge,
        "score": score.score,
        "baseline": SFT if score.preference is not None else None,
        "preference": score.preference,
    }
