"""Training curves: small figures of what the stages logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.recipe.rounds import kind_of, round_of
from toolkit.report.figures import Figure, Trace, axis
from toolkit.report.reading import Run

# Stage -> its figures: the keys of the log with their names, and a title. Several keys share one figure.
CURVES: dict[str, list[tuple[dict[str, str], str]]] = {
    "ppo": [
        ({"objective/score": "score"}, "PPO's reward: the score"),
        ({"objective/kl": "KL"}, "KL to SFT, nats per response"),
        ({"length/mean": "length"}, "response length, tokens"),
        ({"eos_rate": "share"}, "share that ends by itself"),
        ({"objective/entropy": "entropy"}, "entropy, nats"),
        ({"value/explained_variance": "share"}, "explained variance of the critic"),
        ({"policy/clip_fraction": "share"}, "clipped share of ratios"),
        ({"loss/policy": "policy", "value/loss": "critic"}, "losses"),
    ],
    "dpo": [
        ({"rewards/accuracies": "accuracy"}, "accuracy of the implicit reward"),
        ({"rewards/margins": "margin"}, "margin of the implicit reward"),
        ({"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, "implicit reward"),
        ({"logps/chosen": "chosen", "logps/rejected": "rejected"}, "log-probability, nats"),
        ({"loss": "loss"}, "loss"),
    ],
    "reward_model": [({"rewards/accuracies": "accuracy"}, "accuracy of the reward model"), ({"loss": "loss"}, "loss")],
    "sft": [({"loss": "loss"}, "loss"), ({"mean_token_accuracy": "accuracy"}, "token accuracy")],
    "rft": [({"loss": "loss"}, "loss")],
}
STAGE_NAMES = {"ppo": "PPO", "dpo": "DPO", "reward_model": "Reward model", "sft": "SFT", "rft": "Rejection sampling"}
_COLOR = {"ppo": "@rm_ppo", "reward_model": "@rm_ppo", "dpo": "@dpo", "sft": "@sft", "rft": "@rft"}


@dataclass(frozen=True)
class StageCurves:
    """The figures of one stage. ``kind`` is its name without the round."""

    kind: str
    title: str
    figures: list[Figure]


def training(run: Run) -> list[StageCurves]:
    """The curves of each stage, both arms first. A stage or quantity that was not logged is left out."""
    stages = []
    for kind, wanted in CURVES.items():
        for stage in sorted((stage for stage in run.histories if kind_of(stage) == kind), key=round_of):
            figures = [_curve(stage, run.histories[stage], keys, title) for keys, title in wanted]
            drawn = [figure for figure in figures if figure is not None]
            if drawn:
                stages.append(StageCurves(kind, _name(stage), drawn))
    return stages


def _name(stage: str) -> str:
    name = STAGE_NAMES[kind_of(stage)]
    return name if round_of(stage) == 1 else f"{name}, round {round_of(stage)}"


def _curve(stage: str, history: Sequence[Mapping[str, Any]], keys: Mapping[str, str], title: str) -> Figure | None:
    traces: list[Trace] = []
    for number, (key, label) in enumerate(keys.items()):
        points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
        if not points:
            continue
        shade = _COLOR[kind_of(stage)] if number == 0 else "@muted"
        traces.append(
            {
                "type": "scatter",
                # A line through a single logged step would be invisible.
                "mode": "lines" if len(points) > 30 else "lines+markers",
                "name": label,
                "x": [step for step, _ in points],
                "y": [float(f"{value:.5g}") for _, value in points],
                "line": {"color": shade, "width": 1.6, "dash": "solid" if number == 0 else "dot"},
                "marker": {"color": shade, "size": 4},
                "hovertemplate": "step %{x}: %{y:.4g}<extra></extra>",
            }
        )
    if not traces:
        return None
    last = ", ".join(f"{trace['name']} {trace['y'][-1]:.4g}" for trace in traces)
    alt = f"{title} of {_name(stage)} by training step; last: {last}."
    layout = {"xaxis": axis(""), "yaxis": axis(""), "hovermode": "closest"}
    return Figure(f"{stage.replace('@', '-')}-{next(iter(keys)).replace('/', '-')}", title, alt, traces, layout)
