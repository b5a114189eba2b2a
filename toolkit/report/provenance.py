"""What a run was, beside its results: progress, cost, settings of the arms, data, and what it takes to repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from toolkit.files import flat
from toolkit.preferences.reading import data_warnings
from toolkit.progress import duration
from toolkit.recipe.arms import OWN_UNITS
from toolkit.recipe.rounds import stage_words
from toolkit.report.names import ARM_NAMES
from toolkit.report.numbers import count, number
from toolkit.report.reading import ResultRow, Run


def subject(run: Run) -> str:
    """The data, the model and the seed of a run. Empty where its recipe is not recorded."""
    if not run.recipe:
        return ""
    data, model = (_short(run.recipe[section][key]) for section, key in (("data", "source"), ("model", "name")))
    return f"{data}, {model}, seed {run.recipe['seed']}"


def _short(name: str) -> str:
    """A name on the hub or a short name unchanged; of a path its last part, or its last two where that says too little.

    >>> _short("reviews"), _short("org/name"), _short("/home/me/runs/first/sft/model"), _short("data/pairs.jsonl.gz")
    ('reviews', 'org/name', 'sft/model', 'data/pairs.jsonl.gz')
    """
    return "/".join(name.rstrip("/").split("/")[-2:])


# ---------------------------------------------------------------- progress


@dataclass(frozen=True)
class StageProgress:
    """``share`` is how much of a running stage is done, where that is known. ``facts`` are said beside it."""

    label: str
    state: str
    arm: str
    share: float | None
    facts: list[str]


def progress(run: Run) -> list[StageProgress]:
    """The stages of a run that is watched. Empty for any other run."""
    return [_stage_progress(row) for row in run.progress]


def _stage_progress(row: ResultRow) -> StageProgress:
    share, facts = None, []
    if row["state"] == "done":
        facts = [duration(row["wall_s"]), f"{count(row['tokens'])} tokens", f"peak {number(row['peak_gib'], 2)} GiB"]
    elif "total" in row:
        share = row["done"] / row["total"] if row["total"] else None
        left = f"{duration(row['left_s'])} left" if row["left_s"] is not None else ""
        facts = [fact for fact in (f"{row['label']} {row['done']}/{row['total']}", left, row["note"]) if fact]
    return StageProgress(stage_words(row["stage"]), row["state"], row.get("arm", "base"), share, facts)


# ---------------------------------------------------------------- cost


@dataclass(frozen=True)
class StageCost:
    """``share`` is of the longest stage, for the bars."""

    label: str
    arm: str
    time: str
    share: float
    tokens: int
    peak_gib: float


@dataclass(frozen=True)
class ArmCost:
    """``trained`` are response tokens, once for each pass over them. The tokens of stages have no sum."""

    label: str
    arm: str
    time: str
    trained: int | None
    peak_gib: float
    stages: str


@dataclass(frozen=True)
class Cost:
    """Cost by stage, by arm and in all, what the language-model judges used, and what each arm's labels took: (arm, its
    name, counts) where there were further rounds."""

    stages: list[StageCost]
    arms: list[ArmCost]
    total: ArmCost
    judges: list[ResultRow]
    labels: list[tuple[str, str, ResultRow]]


def cost(run: Run) -> Cost | None:
    recorded = run.results.get("cost")
    if not recorded or not recorded["stages"]:
        return None
    longest = max(row["wall_s"] for row in recorded["stages"]) or 1.0
    stages = [
        StageCost(
            label=stage_words(row["stage"]),
            arm=row["arm"],
            time=duration(row["wall_s"]),
            share=row["wall_s"] / longest,
            tokens=row["tokens"],
            peak_gib=row["peak_gib"],
        )
        for row in recorded["stages"]
    ]
    arms = []
    for arm, part in recorded["arms"].items():
        label = "shared by both arms" if arm == "shared" else ARM_NAMES.get(arm, arm)
        labels = ", ".join(stage.label for stage in stages if stage.arm == arm)
        arms.append(
            ArmCost(label, arm, duration(part["wall_s"]), part.get("response_tokens_trained"), part["peak_gib"], labels)
        )
    total = ArmCost(
        label="in all",
        arm="",
        time=duration(sum(part["wall_s"] for part in recorded["arms"].values())),
        trained=None,
        peak_gib=max(arm.peak_gib for arm in arms),
        stages="",
    )
    spent = [(arm, ARM_NAMES.get(arm, arm), counts) for arm, counts in recorded.get("labels", {}).items()]
    return Cost(stages, arms, total, recorded.get("judges", []), spent)


# ---------------------------------------------------------------- settings, reproduction, data


@dataclass(frozen=True)
class SharedSetting:
    """A setting that both arms have. In ``own_unit`` its values say nothing when they differ."""

    name: str
    ppo: str
    dpo: str
    differs: bool
    own_unit: bool


@dataclass(frozen=True)
class ArmSettings:
    """The settings that both arms have, and those that only one has, as (name, value)."""

    shared: list[SharedSetting]
    ppo: list[tuple[str, str]]
    dpo: list[tuple[str, str]]

    @property
    def n_differences(self) -> int:
        return sum(setting.differs for setting in self.shared)


def settings(run: Run) -> ArmSettings | None:
    ppo, dpo = run.recipe.get("ppo"), run.recipe.get("dpo")
    if not ppo or not dpo:
        return None
    shared = [
        SharedSetting(
            name=name,
            ppo=show(ppo[name]),
            dpo=show(dpo[name]),
            differs=ppo[name] != dpo[name] and name not in OWN_UNITS,
            own_unit=name in OWN_UNITS,
        )
        for name in ppo
        if name in dpo
    ]
    return ArmSettings(
        sorted(shared, key=lambda setting: (not setting.differs, setting.ppo == setting.dpo)),
        [(name, show(value)) for name, value in ppo.items() if name not in dpo],
        [(name, show(value)) for name, value in dpo.items() if name not in ppo],
    )


@dataclass(frozen=True)
class Reproduction:
    """What it takes to repeat the run. ``stage_keys`` are the fingerprints of the stages."""

    command: str
    facts: dict[str, str]
    versions: dict[str, str]
    stage_keys: dict[str, str]
    recipe: str


def reproduction(run: Run) -> Reproduction | None:
    """None where the folder has no manifest."""
    manifest = run.manifest
    if not manifest:
        return None
    started = manifest.get("started")
    machine = {k: v for k, v in manifest.get("machine", {}).items() if v not in ("", None, [])}
    facts = {
        "recipe": manifest.get("name"),
        "seed": manifest.get("seed"),
        "started": f"{datetime.fromtimestamp(started, tz=UTC):%Y-%m-%d %H:%M} UTC" if started else None,
        "data": run.data_report.get("source"),
        "fingerprint of the data": run.data_report.get("source_fingerprint"),
        "machine": ", ".join(_machine_fact(name, value) for name, value in machine.items()),
    }
    return Reproduction(
        command=shlex.join(manifest.get("command", [])),
        facts={name: str(value) for name, value in facts.items() if value not in (None, "")},
        versions=manifest.get("versions", {}),
        stage_keys={name: key for name, key in manifest.get("keys", {}).items() if name != "report"},
        recipe=run.recipe_text,
    )


@dataclass(frozen=True)
class DataSummary:
    """Counts of the training and the held-out side, and sentences on what was left out or is odd."""

    sides: dict[str, Mapping[str, Any]]
    notes: list[str]


def data(run: Run) -> DataSummary | None:
    report = run.data_report
    if "train" not in report or "eval" not in report:
        return None
    notes = data_warnings(report)
    sides = {"training": report["train"], "held out": report["eval"]}
    for name, side in sides.items():
        if side["n_long_prompts"]:
            notes.append(f"{name}: {count(side['n_long_prompts'])} prompts were too long and left out")
        if side["n_long_responses"]:
            share = side["n_long_responses"] / max(1, side["n_responses"])
            notes.append(f"{name}: {count(side['n_long_responses'])} responses ({share:.0%}) were cut at the limit")
    return DataSummary(sides, notes)


def between_runs(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings of the recipes that are not the same in all runs: name, and each run's value."""
    recipes = [flat(run.recipe) for run in runs]
    names = dict.fromkeys(
        name for recipe in recipes for name in recipe if not name.startswith(("report.", "report_to"))
    )
    absent = object()
    return [
        (name, ["" if name not in recipe else show(recipe[name]) for recipe in recipes])
        for name in names
        if any(recipe.get(name, absent) != recipes[0].get(name, absent) for recipe in recipes)
    ]


def _machine_fact(name: str, value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value} CPUs" if name == "cpus" else str(value)


def show(value: object) -> str:
    """The value of a setting as a recipe has it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
