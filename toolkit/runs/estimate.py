"""``duel run --estimate``: what a run will do, and about how long the stages that are left take on this machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.evals.training_signals import TRAINING_SIGNALS
from toolkit.models.encoding import TextEncoder, text_encoder
from toolkit.models.remote_code import remote_code
from toolkit.models.resolve import require_policy, resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter, rough_duration
from toolkit.recipe.files import LoadedRecipe
from toolkit.recipe.rounds import kind_of
from toolkit.recipe.schema import Recipe
from toolkit.runs.calibration import calibrate
from toolkit.runs.launch import launch_of
from toolkit.runs.pipeline import RunOptions, missing
from toolkit.runs.plan import plan_stages, stages_to_run
from toolkit.runs.stage_times import TrainingRows, evaluation_seconds, training_seconds
from toolkit.runs.store import RunFolder
from toolkit.stages.data import SIDES, limited, read_sides

# What a stage does, for the first lines of a run.
WORK = {
    "data": "read the preferences, and hold prompts out",
    "sft": "fine-tune the model that both arms start from",
    "reward_model": "train the reward model on the preferences",
    "ppo": "optimise the reward with PPO",
    "dpo": "train a policy on the preferences with DPO",
    "evaluate": "sample and judge all policies on held-out prompts",
}
TRAINED = ("sft", "reward_model", "ppo", "dpo")


def estimate(
    loaded: LoadedRecipe,
    out: Path,
    reporter: Reporter | None = None,
    options: RunOptions | None = None,
) -> dict[str, Any]:
    """``seconds`` of the ``parts``: the stages that would run in ``out``. It loads the model and times a few passes.

    ``options`` are those of the run. The seconds are those of one process, also where several ``processes`` share the
    work. ``without`` names what has no estimate: stages of other kinds, further temperatures, and judges that ask a
    model of their own.

    Raises what planning the stages and reading the data raise, and ModelError where the model cannot be loaded.
    """
    recipe, folder, options = loaded.recipe, RunFolder(out), options or RunOptions()
    launch = launch_of(options.launch)
    with remote_code(recipe.model.trust_remote_code):
        planned = plan_stages(loaded, folder, launch.processes, sharded=launch.sharding is not None)
        stages = {stage.spec.name: stage.state.status for stage in planned}
        left = missing(planned, stages_to_run(planned, options.only, options.until), options)
        if not left:
            return {"seconds": 0.0, "processes": launch.processes, "parts": [], "without": []}
        if reporter is not None:
            reporter.line(f"timing {recipe.model.name} on this machine: seconds, or a minute where it is slow")
        require_policy(resolve(recipe.model.name, recipe.model.revision))
        started = time.perf_counter()
        sides, encoder = read_data(recipe, folder.stage_dir("data") if stages["data"] == "cached" else None)
        seconds = {"data": time.perf_counter() - started}
        data = TrainingRows(sides["train"], encoder, recipe.data.max_response_tokens)
        speed = calibrate(recipe, data.rows, encoder)
    gc.collect()
    by_steps = recipe.reward_model.kind == "process"  # whose data is read by its stage alone
    counted = [stage for stage in TRAINED if not (by_steps and stage == "reward_model")]
    seconds |= {stage: training_seconds(stage, recipe, data, speed) for stage in counted}
    seconds["evaluate"] = evaluation_seconds(recipe, data, len(sides["eval"]), speed)
    parts = [{"part": name, "seconds": round(seconds[name], 1)} for name in left if name in seconds]
    return {
        "seconds": round(sum(seconds[name] for name in left if name in seconds), 1),
        "processes": launch.processes,
        "parts": parts,
        "without": [
            *(name for name in left if name not in seconds and kind_of(name) != "report"),
            *(_not_counted(recipe) if "evaluate" in left else ()),
        ],
    }


def _not_counted(recipe: Recipe) -> list[str]:
    """What an evaluation does and the estimate leaves out."""
    further = ["the samples at further temperatures"] if recipe.evaluate.temperatures else []
    return further + [f"the judge {judge}" for judge in recipe.evaluate.judges if asks_a_model(judge)]


def asks_a_model(judge: str) -> bool:
    """Whether a judge asks a model of its own, or a function of the user's."""
    return judge not in (*TRAINING_SIGNALS, "gold") and not judge.startswith("file:")


def read_data(recipe: Recipe, folder: Path | None) -> tuple[dict[str, Sequence[PreferenceRow]], TextEncoder]:
    """The rows of both sides: of the data stage's ``folder``, or, without one, from the source."""
    tokenizer = load_tokenizer(resolve(recipe.model.name, recipe.model.revision), recipe.model.chat_template)
    if folder is not None:
        stored: dict[str, Sequence[PreferenceRow]] = {side: from_parquet(folder / f"{side}.parquet") for side in SIDES}
        return stored, text_encoder(tokenizer, stored["train"][0].prompt, recipe.model.name)
    sides, _ = read_sides(recipe.data, recipe.data_seed)
    encoder = text_encoder(tokenizer, sides["train"][0].prompt, recipe.model.name)
    within = {side: limited(side, sides[side], encoder, recipe.data, recipe.data_seed)[0] for side in SIDES}
    return within, encoder


def render(name: str, estimated: Mapping[str, Any]) -> str:
    """What :func:`estimate` says, for people."""
    if not estimated["parts"]:
        return f"{name}: nothing is left to run"
    lines = [f"{name}: about {rough_duration(estimated['seconds'])} on this machine, by a short timing of the model"]
    lines += [
        f"  {part['part']:13} {rough_duration(part['seconds']):>8}  {WORK[part['part']]}" for part in estimated["parts"]
    ]
    if estimated["processes"] > 1:
        lines.append(f"  by a single process: the {estimated['processes']} that share the work take less")
    return "\n".join(lines + [f"  without the time of {part}" for part in estimated["without"]])
