"""``duel study RECIPE --dry-run``: the trials and their state, what they share, and about how long the rest takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.evals.verdict import ARMS
from toolkit.files import read_json
from toolkit.judging.records import check_recorded_names
from toolkit.models.remote_code import remote_code
from toolkit.progress import rough_duration
from toolkit.report.names import arm_name
from toolkit.runs.estimate import read_data
from toolkit.runs.kinds import STUDY_FILES, refuse_others_folder
from toolkit.runs.plan import STAGE_NAMES, PlannedStage, plan_stages, with_inputs
from toolkit.runs.store import STUDY_FILE, TRIALS_FILE, RunFolder
from toolkit.runs.study.estimate import Work, estimate
from toolkit.runs.study.measuring import Held, held_of, judges_of, sampled
from toolkit.runs.study.training import Failure, recorded_failure
from toolkit.runs.study.trials import SFT, StudyPlan, Trial

STATES = {
    "done": "trained",
    "failed": "failed",
    "running": "in training",
    "partial": "continues",
    "waiting": "to run",
}


@dataclass(frozen=True)
class PlannedTrial:
    """A trial with the stages that it needs, and what is on disk of it."""

    trial: Trial
    stages: list[PlannedStage]
    state: str  # a key of STATES
    failure: Failure | None


def describe(plan: StudyPlan) -> dict[str, Any]:
    """Trials with their state, counts of stage runs, splits, judges, controls, and an estimate of the time.

    Nothing is written. The estimate is of one worker: :func:`toolkit.runs.study.estimate.estimate` says how it is made.

    Raises what planning the stages and reading the data raise, and RecipeError or DataError where the study would.
    """
    with remote_code(plan.base.recipe.model.trust_remote_code):
        return _describe(plan)


def _describe(plan: StudyPlan) -> dict[str, Any]:
    recipe, sft_trials = plan.base.recipe, plan.sft_trials()
    refuse_others_folder(plan.out, "study", STUDY_FILES)
    check_recorded_names(recipe.evaluate.judges)
    trials = plan.trials()
    controls = control_trials(plan, trials)
    planned = [planned_trial(trial) for trial in [*sft_trials, *trials, *controls]]
    started = time.perf_counter()
    data_is_there = planned[0].stages[0].state.status == "cached"
    sides, encoder = read_data(recipe, sft_trials[0].folder / "data" if data_is_there else None)
    read_s = time.perf_counter() - started
    held = held_of(sides["eval"], plan)
    judges = judges_of(plan, sides["eval"])
    stages = stage_runs(planned)
    measuring = measurements(plan, planned, held, unfinished=any(row["to_run"] for row in stages))
    work = Work(plan, planned_stages_to_run(planned), measuring, sides["train"], encoder, read_s, judges, held)
    budget = plan.section.budget
    return {
        "name": recipe.name,
        "out": str(plan.out),
        "seeds": list(plan.seeds),
        "trials": [
            {
                "arm": item.trial.arm,
                "setting": item.trial.setting,
                "seed": item.trial.seed,
                "state": item.state,
                "reason": str(item.failure) if item.failure is not None else None,
            }
            for item in planned
        ],
        "stages": stages,
        "budget": {"tokens": budget.tokens, "seconds": budget.seconds},
        "splits": {
            "train": {"n_prompts": len(sides["train"])},
            "dev": {"n_prompts": len(held.dev)},
            "test": {"n_prompts": len(held.test)},
        },
        "judges": judges,
        "select_by": plan.section.select_by,
        "controls": list(plan.section.controls),
        "measuring": measuring,
        "time": estimate(work),
    }


def control_trials(plan: StudyPlan, trials: Sequence[Trial]) -> list[Trial]:
    """The controls, of each arm's chosen setting. Before there is one they stand with the first setting."""
    path = plan.out / TRIALS_FILE
    recorded = read_json(path) if path.is_file() else {}
    parents = {}
    for arm in ARMS:
        of_arm = [trial for trial in trials if trial.arm == arm]
        named = [trial for trial in of_arm if trial.setting == recorded.get("chosen", {}).get(arm)]
        parents[arm] = (named or of_arm)[0]
    return plan.control_trials(parents, recorded.get("length"))


def planned_trial(trial: Trial) -> PlannedTrial:
    """The stages that a trial needs, and its state."""
    folder = RunFolder(trial.folder)
    every = plan_stages(trial.loaded, folder)
    needed = {name for target in trial.targets for name in with_inputs(every, target)}
    stages = [stage for stage in every if stage.spec.name in needed]
    failures = [failure for stage in stages if (failure := recorded_failure(trial, stage.key)) is not None]
    states = {stage.spec.name: stage.state.status for stage in stages}
    if all(states[target] == "cached" for target in trial.targets):
        state = "done"
    elif any(failure.kind == "diverged" for failure in failures):
        state = "failed"
    elif folder.busy():
        state = "running"
    elif any(status in ("cached", "partial") for status in states.values()):
        state = "partial"
    else:
        state = "waiting"
    return PlannedTrial(trial, stages, state, failures[0] if state == "failed" else None)


# ---------------------------------------------------------------- counts


def _by_key(planned: Sequence[PlannedTrial]) -> dict[str, list[tuple[PlannedTrial, PlannedStage]]]:
    """Every distinct stage run, in the order of a study, with the trials that need it."""
    users: dict[str, list[tuple[PlannedTrial, PlannedStage]]] = {}
    for item in planned:
        for stage in item.stages:
            users.setdefault(stage.key, []).append((item, stage))
    return users


def _is_there(users: Sequence[tuple[PlannedTrial, PlannedStage]]) -> bool:
    return any(stage.state.status in ("cached", "shelved") for _, stage in users)


def _diverged(users: Sequence[tuple[PlannedTrial, PlannedStage]]) -> bool:
    return any(item.failure is not None and item.failure.key == stage.key for item, stage in users)


def stage_runs(planned: Sequence[PlannedTrial]) -> list[dict[str, Any]]:
    """For each stage: how many trials need it, and how many runs that makes; of these, how many there are already.

    ``failed`` counts runs that diverged, and those that are not run since a stage before them diverged.
    """
    counts = {name: dict.fromkeys(("runs", "distinct", "there", "failed"), 0) for name in STAGE_NAMES}
    for users in _by_key(planned).values():
        row = counts[users[0][1].spec.name]
        row["runs"] += len(users)
        row["distinct"] += 1
        if _is_there(users):
            row["there"] += 1
        elif _diverged(users) or all(item.state == "failed" for item, _ in users):
            row["failed"] += 1
    return [
        {"stage": name, **row, "to_run": row["distinct"] - row["there"] - row["failed"]}
        for name, row in counts.items()
        if row["runs"]
    ]


def planned_stages_to_run(planned: Sequence[PlannedTrial]) -> list[tuple[Trial, PlannedStage]]:
    """The distinct stage runs that a study would run now, each with one trial that needs it."""
    return [
        next((item.trial, stage) for item, stage in users if item.state != "failed")
        for users in _by_key(planned).values()
        if not _is_there(users) and not _diverged(users) and any(item.state != "failed" for item, _ in users)
    ]


def measurements(
    plan: StudyPlan, planned: Sequence[PlannedTrial], held: Held, *, unfinished: bool
) -> dict[str, dict[str, int]]:
    """For each split: how many policies there are to sample and judge (``policies``), and how many have been.

    Dev prompts measure every policy. Test prompts measure those that the frontiers need, at most all: how many is known
    when the study is done.
    """
    sft = {item.trial.seed: item for item in planned if item.trial.arm == SFT}
    alive = [item for item in planned if item.state != "failed"]
    n_policies = sum(item.trial.n_checkpoints for item in alive)
    counts = {split: {"policies": n_policies, "there": 0} for split in ("dev", "test")}
    for item in alive:
        of_seed = sft[item.trial.seed]
        if item.state == of_seed.state == "done":
            for split, row in counts.items():
                row["there"] += sampled(item.trial, of_seed.trial, split, held.of(split))
    document = read_json(plan.out / STUDY_FILE) if (plan.out / STUDY_FILE).is_file() else {}
    is_same = document.get("recipe") == plan.base.recipe.model_dump(mode="json")
    if is_same and not unfinished and counts["dev"]["there"] == n_policies:
        counts["test"]["policies"] = counts["test"]["there"]
    return counts


# ---------------------------------------------------------------- for people


def render(described: Mapping[str, Any]) -> str:
    """What :func:`describe` says, for people."""
    stages, lines = described["stages"], [f"{described['name']} -> {described['out']}", ""]
    runs, distinct, there = (sum(row[name] for row in stages) for name in ("runs", "distinct", "there"))
    failed = sum(row["failed"] for row in stages)
    lines.append(
        f"study: {runs} stage runs, {distinct} of them distinct, {there} are there"
        + (f", {failed} cannot run since training diverged" if failed else "")
    )
    lines += [
        f"  {row['stage']:13}{row['distinct']:4} for {row['runs']:4} trials, {row['to_run']:4} to run" for row in stages
    ]
    lines += ["", *_trial_lines(described["trials"], len(described["seeds"])), ""]
    splits = ", ".join(f"{row['n_prompts']} {split}" for split, row in described["splits"].items())
    lines += [f"budget of a trial: {_budget(described['budget'])}", f"prompts: {splits}"]
    select_by = described["select_by"] or "all of them that no arm was trained on"
    lines += [f"judges: {', '.join(described['judges'])}; settings are chosen by {select_by}"]
    lines += [f"controls: {', '.join(described['controls']) or 'none'}", "", *_time_lines(described["time"])]
    return "\n".join(lines)


def _trial_lines(trials: Sequence[Mapping[str, Any]], n_seeds: int) -> list[str]:
    """A line for each setting of an arm, with the states of its seeds."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for trial in trials:
        groups.setdefault((trial["arm"], trial["setting"]), []).append(trial)
    lines = []
    for (arm, setting), of_setting in groups.items():
        states = Counter(STATES[trial["state"]] for trial in of_setting)
        seeds = f"{n_seeds} seeds" if len(states) == 1 and n_seeds > 1 else ""
        counts = "".join(f" {state}" if seeds else f" {n} {state}" for state, n in states.items())
        name = "" if arm == setting else f"  {setting}"
        lines.append(f"  {arm_name(arm):9}{name}  {seeds}{counts}")
        lines += [f"    seed {trial['seed']}: {trial['reason']}" for trial in of_setting if trial["reason"]]
    return lines


def _budget(budget: Mapping[str, Any]) -> str:
    if budget["tokens"] is not None:
        return f"{budget['tokens']:,} response tokens"
    if budget["seconds"] is not None:
        return f"{budget['seconds']:,g} seconds"
    return "none, each arm trains as long as its section says"


def _time_lines(time_left: Mapping[str, Any]) -> list[str]:
    if not time_left["parts"]:
        return ["time: nothing is left to run"]
    lines = [f"time: about {rough_duration(time_left['seconds'])} with one worker"]
    for part in time_left["parts"]:
        each = f"{part['runs']} x {rough_duration(part['seconds'] / part['runs'])}"
        lines.append(f"  {part['part']:13}{rough_duration(part['seconds']):12}{each}, {part['from']}")
    return lines + [f"  without the time of {judge}" for judge in time_left["without"]]
