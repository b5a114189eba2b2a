"""One reward model with the mean of several models' weights.

Source: Rame et al. 2024 (WARM, arXiv 2401.12187): members that start from the same weights lie in one basin, where the
mean of the weights is as good as the ensemble of the scores, at the cost of one model.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from toolkit.files import read_json, write_json
from toolkit.models.files import ADAPTER_CONFIG, CONFIG
from toolkit.models.load import load_reward_model
from toolkit.models.resolve import resolve
from toolkit.recipe.training import ModelSection

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def average_members(members: Sequence[Path], out: Path, section: ModelSection) -> None:
    """Write to ``out`` the model with the mean weights of these reward models, which have one base and configuration.

    The mean of N adapters' updates ``s B A`` is an adapter of N times the rank: their A below each other, their B / N
    side by side. A mean of the A and of the B would be another update.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in members[0].iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in (ADAPTER_CONFIG, CONFIG):
            shutil.copyfile(file, out / file.name)
    if (members[0] / ADAPTER_CONFIG).is_file():
        config = read_json(members[0] / ADAPTER_CONFIG)
        config |= {name: config[name] * len(members) for name in ("r", "lora_alpha")}
        states = [load_file(member / ADAPTER_WEIGHTS) for member in members]
        save_file({name: _mean_update(name, states) for name in states[0]}, out / ADAPTER_WEIGHTS)
        write_json(out / ADAPTER_CONFIG, config)
        return
    model: Any = load_reward_model(resolve(str(members[0])), section, dtype=torch.float32)
    total = {name: weight.clone() for name, weight in model.state_dict().items()}
    for member in members[1:]:
        of_member = load_reward_model(resolve(str(member)), section, dtype=torch.float32).state_dict()
        for name, weight in total.items():
            if weight.is_floating_point():
                weight += of_member[name]
    mean = {name: w / len(members) if w.is_floating_point() else w for name, w in total.items()}
    model.save_pretrained(out, state_dict=mean)


def _mean_update(name: str, states: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """One weight of the adapter whose update is the mean of the adapters' updates; of a head the mean."""
    weights = [state[name].float() for state in states]
    if "lora_" not in name:
        return torch.stack(weights).mean(0)
    if "lora_B" in name or "lora_embedding_B" in name:
        return torch.cat(weights, dim=1) / len(weights)
    return torch.cat(weights, dim=0)
