"""What PPO adds to the Trainer's files in a checkpoint: trained weights, their average, and the controls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from toolkit.files import read_json, write_json
from toolkit.ppo.averaging import WeightAverage
from toolkit.ppo.models import PPOModels

WEIGHTS_FILE = "actors.safetensors"
AVERAGE_FILE = "average.safetensors"
REFERENCE_FILE = "averaged_reference.safetensors"
CONTROLS_FILE = "ppo_state.json"


@dataclass(frozen=True)
class Controls:
    """Numbers that one rollout hands to the next.

    ``score_mean`` centres the scores; ``unlogged`` are the metrics since the last entry of the log, by name.
    """

    kl_coef: float
    score_mean: float | None
    unlogged: dict[str, list[float]]


def save_checkpoint(folder: Path, models: PPOModels, average: WeightAverage | None, controls: Controls) -> None:
    """Write what training changes, in full precision. The weights of shards are with the optimiser's state."""
    folder.mkdir(parents=True, exist_ok=True)
    if not models.sharded:
        weights = {name: weight.contiguous().cpu() for name, weight in models.trained_state().items()}
        save_file(weights, folder / WEIGHTS_FILE)
        if average is not None:
            average.save(folder / AVERAGE_FILE)
        if models.averaged_reference is not None:
            models.averaged_reference.save(folder / REFERENCE_FILE)
    saved = {
        "kl_coef": controls.kl_coef,
        "centre": controls.score_mean,
        "sums": controls.unlogged,
    }
    write_json(folder / CONTROLS_FILE, saved)


def load_checkpoint(folder: Path, models: PPOModels, average: WeightAverage | None) -> Controls:
    """Put weights and their averages back in place. Raises RuntimeError where the weights are another model's."""
    if not models.sharded:
        models.load_trained_state(load_file(folder / WEIGHTS_FILE))
        if average is not None:
            average.load(folder / AVERAGE_FILE)
        if models.averaged_reference is not None:
            models.averaged_reference.load(folder / REFERENCE_FILE)
    saved = read_json(folder / CONTROLS_FILE)
    return Controls(saved["kl_coef"], saved["centre"], saved["sums"])
