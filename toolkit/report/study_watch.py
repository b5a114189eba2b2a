"""The page of a study that still goes on: what it works on, the state of every trial, and the curves so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.progress import duration
from toolkit.report.figures import Figure, Trace, axis, rounded
from toolkit.report.names import ARM_NAMES, arm_name
from toolkit.report.reading import ResultRow
from toolkit.report.render import render
from toolkit.report.study_page import build_study
from toolkit.report.study_progress import CURVES, StudyProgress, TrialProgress, history, study_progress
from toolkit.runs.store import STUDY_FILE, RunFolder

MOST_POINTS = 200  # of a line


@dataclass(frozen=True)
class SettingRow:
    """The trials of a setting of an arm, in the order of the seeds. None where a seed has none."""

    arm: str
    name: str
    setting: str
    trials: list[TrialProgress | None]


@dataclass(frozen=True)
class StepRow:
    """A step that runs now. ``share`` is how much of it is done."""

    label: str
    share: float | None
    facts: list[str]


def is_done(folder: Path) -> bool:
    """Whether the study has its verdict, and no process works on another one."""
    return (folder / STUDY_FILE).is_file() and not RunFolder(folder).busy()


def build_live_study(folder: Path, *, version: str) -> str:
    """The page of a study for the server of ``duel watch``: of the verdict where it is there, else of its progress.

    Raises StoreError where there is no study, or its files are damaged.
    """
    return build_study(folder, live=version) if is_done(folder) else progress_page(folder, version)


def progress_page(folder: Path, version: str) -> str:
    """The page of a study without its verdict."""
    study = study_progress(folder)
    figures = curves(folder, study)
    return render(
        "study_watch.html.j2",
        title=f"Study {study.name}: RM + PPO against DPO",
        sections=[("progress", "Progress"), *([("training", "Training")] if figures else [])],
        figures=figures,
        live=version,
        study=study,
        status=status_sentence(study),
        steps=[_step_row(step) for step in study.steps],
        rows=setting_rows(study),
        failed=[trial for trial in study.trials if trial.state == "failed"],
        arm_name=arm_name,
        plots=figures,
    )


def status_sentence(study: StudyProgress) -> str:
    """How many trials have what, in one sentence."""
    n = len(study.trials)
    counts = [
        f"{study.n_trained} of {n} trials are trained",
        f"{measured} of them measured on all dev prompts" if (measured := study.count("measured")) else "",
        f"{failed} failed" if (failed := study.count("failed")) else "",
    ]
    state = (
        "The study runs"
        if study.busy
        else "No process works on this study (duel study with its recipe goes on with it)"
    )
    return f"{state}: {', '.join(filter(None, counts))}."


def _step_row(step: ResultRow) -> StepRow:
    share = step["done"] / step["total"] if step["total"] else None
    left = f"{duration(step['left_s'])} left" if step["left_s"] is not None else ""
    stage = step["stage"].replace("_", " ")
    label = step["label"].removeprefix(f"{step['stage']} ").strip("()")
    facts = [f"{step['done']:,} of {step['total']:,}", left, step["note"]]
    return StepRow(": ".join(dict.fromkeys([stage, label])), share, [fact for fact in facts if fact])


def setting_rows(study: StudyProgress) -> list[SettingRow]:
    """The table of trials: a row for each setting of an arm."""
    groups: dict[tuple[str, str], dict[int, TrialProgress]] = {}
    for trial in study.trials:
        groups.setdefault((trial.arm, trial.setting), {})[trial.seed] = trial
    return [
        SettingRow(
            arm=arm if arm in ARM_NAMES else "base",
            name=arm_name(arm),
            setting="" if setting == arm else setting,
            trials=[of_seed.get(seed) for seed in study.seeds],
        )
        for (arm, setting), of_seed in groups.items()
    ]


# ---------------------------------------------------------------- curves


def curves(folder: Path, study: StudyProgress) -> list[Figure]:
    """Score and KL of the trials with PPO, accuracy and loss of those with DPO: a line for each trial.

    Every planned trial has its line from the start, so that the page need not be loaded again when a trial begins.
    """
    figures = []
    for stage, titles in CURVES.items():
        logs = [(trial, history(folder, trial)) for trial in study.trials if trial.stage == stage]
        for key, title in titles.items():
            traces = [_line(trial, log, key) for trial, log in logs]
            n_lines = sum(bool(trace["x"]) for trace in traces)
            name = "PPO" if stage == "ppo" else "DPO"
            alt = f"{title} by training step, of {n_lines} of {len(traces)} trials with {name}."
            layout = {"xaxis": axis("step"), "yaxis": axis(""), "hovermode": "closest"}
            if n_lines:  # a figure without a line would be an empty frame
                id_ = f"study-{stage}-{key.replace('/', '-')}"
                figures.append(Figure(key, f"{name}: {title}", alt, traces, layout, id=id_))
    return figures


def _line(trial: TrialProgress, log: Sequence[ResultRow], key: str) -> Trace:
    points = [(entry["step"], entry[key]) for entry in log if entry.get(key) is not None]
    points = points[:: max(1, len(points) // MOST_POINTS)]
    shade = f"@{'rm_ppo' if trial.stage == 'ppo' else 'dpo'}/{1 if trial.state == 'training' else 0.55}"
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"{arm_name(trial.arm)}, {trial.label}",
        "showlegend": False,
        "x": [step for step, _ in points],
        "y": rounded(value for _, value in points),
        "line": {"color": shade, "width": 1.8 if trial.state == "training" else 1.1},
        "hovertemplate": f"{arm_name(trial.arm)}<br>{trial.label}<br>step %{{x}}: %{{y:.4g}}<extra></extra>",
    }
