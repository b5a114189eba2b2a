"""Reward models whose labels are known: trained on ``reviews`` by an annotator of known noise and bias."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import harness


@dataclass(frozen=True)
class Labels:
    """Who labels the training data. ``noise`` and ``weight`` are in units of the gold reward."""

    bias: str = "none"
    weight: float = 0.0
    noise: float = 0.2
    flipped: float = 0.0


@dataclass(frozen=True)
class Design:
    """A reward model: its labels, its training ``prompts``, and its size. ``lora`` is a rank; None trains all weights.

    ``seed`` decides the noise of the labels, the order of the data and the head; with ``split`` as well which prompts
    are held out.
    """

    name: str
    labels: Labels = Labels()
    prompts: int = 200
    epochs: int = 2
    lora: int | None = None
    learning_rate: float = 1e-3
    seed: int = 0
    split: int = 0

    def settings(self) -> list[str]:
        """What it changes of the recipe smoke."""
        lora = "model.lora=null" if self.lora is None else f'model.lora={{"r": {self.lora}, "alpha": {2 * self.lora}}}'
        return [
            f"seed={self.seed}",
            lora,
            "reward_model.per_device_train_batch_size=8",
            "reward_model.center=false",
            f"reward_model.num_train_epochs={self.epochs}",
            f"reward_model.learning_rate={self.learning_rate}",
        ]


def sides(split: int, held_out: float = 0.35) -> tuple[list[Any], list[Any]]:
    """The prompts of ``reviews`` for training, and those held out, of other templates."""
    from toolkit.preferences import splits
    from toolkit.preferences.reading import read_preferences

    return splits.split_rows(read_preferences("reviews").rows, held_out, split)


def labelled(rows: Sequence[Any], labels: Labels, seed: int) -> list[Any]:
    """The rows with the labels of one annotator in the place of theirs."""
    from toolkit.preferences.simulate import Annotator, annotate

    annotator = Annotator("known", labels.noise, labels.bias, labels.weight, labels.flipped)  # type: ignore[arg-type]
    return [replace(row, comparisons=annotate(row.prompt, row.responses, row.gold, [annotator], seed)) for row in rows]


def write_data(design: Design, folder: Path) -> None:
    """The stage ``data`` of this design: its training data, and the held-out prompts with labels of gold with noise."""
    from toolkit.preferences import splits
    from toolkit.preferences.tables import to_parquet

    training, held_out = sides(design.split)
    some = splits.limit(training, design.prompts, design.seed)
    folder.mkdir(parents=True, exist_ok=True)
    to_parquet(labelled(some, design.labels, design.seed), folder / "train.parquet")
    to_parquet(labelled(held_out, Labels(), design.seed + 1_000_003), folder / "eval.parquet")


def run_stage(name: str, recipe: Any, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Run a stage anew in ``out``."""
    import importlib

    from toolkit.progress import Reporter
    from toolkit.stages.contexts import context_of

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    stage: Any = importlib.import_module(f"toolkit.stages.{name}")
    return dict(stage.run(context_of(name, recipe), inputs, out, Reporter(quiet=True)))


def start(folder: Path, enabled: bool) -> Path:
    """The stage ``sft`` that every reward model starts from, trained once; not ``enabled``: the model as shipped."""
    from toolkit.recipe.files import load_recipe

    out = folder / "sft"
    if not (out / "done").is_file():
        write_data(Design("start"), folder / "data")
        recipe = load_recipe("smoke", [f"sft.enabled={str(enabled).lower()}"]).recipe
        run_stage("sft", recipe, {"data": folder / "data"}, out)
        (out / "done").touch()
    return out


def train(design: Design, sft: Path, folder: Path) -> Path:
    """Train the reward model in ``folder``, and return where it lies."""
    from toolkit.recipe.files import load_recipe

    write_data(design, folder / "data")
    recipe = load_recipe("smoke", design.settings()).recipe
    run_stage("reward_model", recipe, {"data": folder / "data", "sft": sft}, folder / "reward_model")
    return folder / "reward_model" / "model"


def card_of(model: Path, folder: Path, held_out: int) -> dict[str, Any]:
    """Its card on (at most ``held_out`` of) the held-out prompts, which have gold."""
    from toolkit import rm_card

    data = str(folder / "data" / "eval.parquet")
    return dict(rm_card(str(model), data, limit=held_out, out=folder / "card", force=True))


def done(file: Path) -> dict[str, dict[str, Any]]:
    """What a file of one JSON line for each reward model has, by the design's name. A torn last line does not count."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    records: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["design"]["name"]] = record
    return records


def add(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Append the record of a reward model to such a file."""
    torn = file.is_file() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" * torn + json.dumps(record) + "\n")
    print(json.dumps(record), file=sys.stderr, flush=True)
    return record


def spread(designs: Sequence[Design], n: int) -> list[Design]:
    """``n`` of the designs, from all parts of the list."""
    return [designs[k * len(designs) // n] for k in range(min(n, len(designs)))]


def smaller(design: Design, prompts: int) -> Design:
    """The design with at most this many training prompts."""
    return replace(design, prompts=min(design.prompts, prompts))


def quiet() -> None:
    """One thread, and none of the libraries' own progress."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)


def provenance(about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "what": dict(about),
        "command": harness.command(),
        "date": date.today().isoformat(),
        "machine": {"threads": 1, "processor": harness.processor()},
        "versions": harness.versions(),
    }


def words(estimate: Mapping[str, Any]) -> str:
    """A value with its interval."""
    low, high = (estimate[end] for end in ("ci_low", "ci_high"))
    return f"{estimate['value']:+.2f}" + ("" if low is None else f" ({low:+.2f} to {high:+.2f})")
