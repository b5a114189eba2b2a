"""About how long the rest of a study takes: from what its finished parts took, or from a few timed passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Any

from toolkit.models.encoding import TextEncoder
from toolkit.preferences.rows import PreferenceRow
from toolkit.runs.calibration import Speed, calibrate
from toolkit.runs.estimate import asks_a_model
from toolkit.runs.plan import PlannedStage
from toolkit.runs.stage_times import TrainingRows, reward_pass, training_seconds
from toolkit.runs.store import SCORES_FOLDER, RunFolder
from toolkit.runs.study.measuring import Held
from toolkit.runs.study.trials import OWN_REWARD_MODEL, StudyPlan, Trial

MEASURING = "measuring"
FROM_RECORDS, FROM_TIMING, FROM_BUDGET = "as recorded here", "as timed now", "by the budget"
# A gap between two policies' files is the time of one, if none was interrupted: few gaps may be anything.
LEAST_GAPS = 3


@dataclass(frozen=True)
class Work:
    """What a study has left to do. ``measuring`` is what ``dry_run.measurements`` counts; ``read_s``: of the data."""

    plan: StudyPlan
    stages: Sequence[tuple[Trial, PlannedStage]]
    measuring: Mapping[str, Mapping[str, int]]
    train_rows: Sequence[PreferenceRow]
    encoder: TextEncoder
    read_s: float
    judges: Sequence[str]
    held: Held

    @cached_property
    def speed(self) -> Speed:
        """The recipe's model, timed now."""
        return calibrate(self.plan.base.recipe, self.train_rows, self.encoder)

    @cached_property
    def data(self) -> TrainingRows:
        return TrainingRows(self.train_rows, self.encoder, self.plan.base.recipe.data.max_response_tokens)


def estimate(work: Work) -> dict[str, Any]:
    """``seconds`` with one worker, and the ``parts``, each with its runs and what the number rests on.

    A stage that has runs in the study's folder takes their mean time, and a policy's samples and scores the median of
    the gaps between files. Everything else is counted in response tokens, and timed for a few of them on this machine.
    ``without`` names judges whose time is not in it.
    """
    recorded = _recorded_seconds(work.plan)
    parts: list[dict[str, Any]] = []
    by_stage: dict[str, list[float]] = {}
    rests_on: dict[str, set[str]] = {}
    for trial, planned in work.stages:
        stage = planned.spec.name
        if stage in recorded:
            seconds, source = recorded[stage], FROM_RECORDS
        else:
            seconds, source = _stage_seconds(stage, trial, work)
        by_stage.setdefault(stage, []).append(seconds)
        rests_on.setdefault(stage, set()).add(source)
    for stage, each in by_stage.items():
        parts.append({"part": stage, "runs": len(each), "seconds": sum(each), "from": min(rests_on[stage])})
    n_policies = sum(row["policies"] - row["there"] for row in work.measuring.values())
    if n_policies:
        seconds, source = _policy_seconds(work)
        parts.append({"part": MEASURING, "runs": n_policies, "seconds": n_policies * seconds, "from": source})
    return {
        "seconds": round(sum(part["seconds"] for part in parts), 1),
        "workers": 1,
        "parts": [{**part, "seconds": round(part["seconds"], 1)} for part in parts],
        "without": [
            f"the judge {name}"
            for name in work.judges
            if n_policies and name != OWN_REWARD_MODEL and asks_a_model(name)
        ],
    }


def _recorded_seconds(plan: StudyPlan) -> dict[str, float]:
    """The mean time of a stage's runs in the study's folder. A stage that several trials share counts once."""
    seconds: dict[str, dict[str, float]] = {}
    for trial in [*plan.sft_trials(), *plan.trials()]:
        for stage in ("data", "sft", "reward_model", "ppo", "dpo"):
            record = RunFolder(trial.folder).record(stage)
            if record is not None:
                seconds.setdefault(stage, {})[record["key"]] = record["wall_s"]
    return {stage: fmean(of_key.values()) for stage, of_key in seconds.items()}


def _stage_seconds(stage: str, trial: Trial, work: Work) -> tuple[float, str]:
    """The time of a stage without a record."""
    if stage == "data":
        return work.read_s, FROM_TIMING
    recipe, speed = trial.loaded.recipe, work.speed
    if stage in ("ppo", "dpo") and (seconds := getattr(recipe, stage).train_seconds) is not None:
        if stage == "ppo":  # the reward model's training counts
            seconds -= (
                _recorded_seconds(work.plan).get("reward_model") or _stage_seconds("reward_model", trial, work)[0]
            )
        return max(seconds, 0.0) + speed.load_s, FROM_BUDGET
    return training_seconds(stage, recipe, work.data, speed), FROM_TIMING


def _policy_seconds(work: Work) -> tuple[float, str]:
    """The time of sampling, scoring and judging a policy on one split."""
    files = (work.plan.out / "trials").glob(f"*/{SCORES_FOLDER}/*.samples.parquet")
    written = sorted(path.stat().st_mtime for path in files)
    gaps = [later - earlier for earlier, later in zip(written, written[1:], strict=False)]
    if len(gaps) >= LEAST_GAPS:
        return median(gaps), FROM_RECORDS
    section, speed = work.plan.base.recipe.evaluate, work.speed
    n_tokens = fmean([len(work.held.dev), len(work.held.test)]) * section.samples_per_prompt * work.data.mean_length
    passes = [speed.policy, speed.policy]  # under itself and under the reference
    if OWN_REWARD_MODEL in work.judges:
        passes.append(reward_pass(work.plan.base.recipe, speed))
    seconds = n_tokens * (speed.sample_s + sum(model.score_s for model in passes))
    return sum(model.load_s for model in passes) + seconds, FROM_TIMING
