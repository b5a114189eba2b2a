"""Whether a judge of a run is independent of it: whose model it is, and what that was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.errors import ModelError
from toolkit.files import read_table
from toolkit.models.resolve import ModelRef, resolve, resolve_base
from toolkit.recipe.rounds import kind_of

TRAINED_ON_FILE = Path("data") / "train.parquet"
# Judges that are models, by the kind of their name.
MODEL_JUDGES = ("rm", "implicit", "llm")
# Where a run folder has models: those of its stages, and the earlier ones on the shelf.
STAGE_FOLDERS = ("sft", "reward_model", "ppo", "dpo", "rft", ".shelf")


@dataclass(frozen=True)
class RunModels:
    """The models of a run: those in its ``folder``, earlier ones too, and copies elsewhere, as fingerprint -> name."""

    folder: Path
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def name_of(self, ref: ModelRef) -> str | None:
        """What a model is to this run; None where it is no model of the run."""
        path, folder = Path(ref.path).resolve(), self.folder.resolve()
        if path.is_relative_to(folder) and kind_of(path.relative_to(folder).parts[0]) in STAGE_FOLDERS:
            return f"a model of this run, {path.relative_to(folder)}"
        if ref.fingerprint in self.fingerprints:
            return f"a model of this run, {self.fingerprints[ref.fingerprint]}"
        return None

    def is_sft(self, ref: ModelRef) -> bool:
        """Whether a model is this run's SFT policy, or a copy of it or an earlier one."""
        path, folder = Path(ref.path).resolve(), self.folder.resolve()
        if path.is_relative_to(folder):
            places = path.relative_to(folder).parts
            return places[0] == "sft" or (places[0] == ".shelf" and places[1].startswith("sft-"))
        return self.fingerprints.get(ref.fingerprint) == "sft"


def trained_prompts(ref: ModelRef) -> set[str]:
    """Ids of the prompts that a model was trained on, where it lies in a run folder of duel or is an adapter on a model
    there; none where that is not known."""
    folders = [Path(ref.path)]
    while ref.kind == "adapter":
        ref = resolve_base(Path(ref.path))
        folders.append(Path(ref.path))
    runs = {
        parent
        for folder in folders
        for parent in folder.resolve().parents
        if (parent / "manifest.json").is_file() and (parent / TRAINED_ON_FILE).is_file()
    }
    return {str(row["prompt_id"]) for run in runs for row in read_table(run / TRAINED_ON_FILE, ["prompt_id"])}


def seen_in_training(models: Sequence[ModelRef], prompt_ids: Iterable[str]) -> int:
    """How many of the prompts these models were trained on, as far as that is known (``trained_prompts``)."""
    return len(set[str]().union(*map(trained_prompts, models)) & set(prompt_ids))


def judging_models(judge: str) -> list[ModelRef]:
    """The models behind a judge, as it is written or recorded: the one that judges first, then its reference.

    None where a model that a file's judgements name is not here.
    """
    kind, _, rest = judge.partition(":")
    if kind not in MODEL_JUDGES or not rest:
        return []
    names = rest.split(",") if kind == "implicit" else [rest]
    try:
        return [resolve(name.strip()) for name in names]
    except ModelError:  # a judge of this run has answered by now, so this one is of a file
        return []


def dependence(judges: Sequence[str], prompt_ids: Sequence[str], run: RunModels) -> dict[str, str]:
    """Judge -> the reason why it cannot decide: a model of this run, or one that was trained on prompts of this
    evaluation. An implicit reward's reference may be the run's SFT policy: other policies start there too."""
    reasons = {}
    for judge in judges:
        models = judging_models(judge)
        judging = [model for k, model in enumerate(models) if k == 0 or not run.is_sft(model)]
        name = next((name for name in map(run.name_of, judging) if name is not None), None)
        seen = seen_in_training(models, prompt_ids)
        if name is not None:
            reasons[judge] = name
        elif seen:
            reasons[judge] = f"a model that was trained on {seen} of these {len(set(prompt_ids))} prompts"
    return reasons
