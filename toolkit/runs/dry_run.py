"""``duel run --dry-run``: what would run and why, how much of it, and one example as the models will see it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.evals.words import counted
from toolkit.judging.records import check_recorded_names
from toolkit.judging.templates import check_template_of
from toolkit.measure.check.check import CheckOptions, check_with
from toolkit.measure.check.rows import SourceOptions
from toolkit.measure.check.tokens import Limits
from toolkit.models.config import read_config, refuse_quantised
from toolkit.models.encoding import TextEncoder, text_encoder
from toolkit.models.remote_code import remote_code
from toolkit.models.resolve import ModelRef, below_adapters, require_policy, resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.schedule import Schedule
from toolkit.preferences import splits
from toolkit.preferences.reading import data_warnings
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.solutions import Solution
from toolkit.recipe.arms import ArmDifference, Measured, planned_differences
from toolkit.recipe.checks import held_out_part
from toolkit.recipe.files import LoadedRecipe
from toolkit.recipe.rounds import kind_of, most_labels, n_rounds, stage_of
from toolkit.recipe.schema import DataSection, Recipe
from toolkit.runs.kinds import RUN_FILES, refuse_others_folder
from toolkit.runs.launch import check_sharded, launch_of
from toolkit.runs.pipeline import RunOptions, forced, missing
from toolkit.runs.plan import plan_stages, stages_to_run
from toolkit.runs.reward_data import check_reward_data
from toolkit.runs.rounds import check_labelled_data, check_labelling
from toolkit.runs.store import RunFolder
from toolkit.stages.data import SIDES, check_compared, limit_notes, limited, read_sides, step_sides
from toolkit.training.length import limit_of, step_size, total_steps

GIB = 2**30
# How a state reads. A stage is on the shelf when its settings are those of an earlier result.
STATES = {
    "cached": "cached",
    "shelved": "cached (shelf)",
    "partial": "continues",
    "stale": "runs again",
    "missing": "runs",
    "damaged": "runs again (damaged)",
    "forced": "runs again (--force)",
}
# Logits are made for this many tokens at once, in fp32, with their gradient and softmax beside them.
LOGIT_TOKENS, LOGIT_COPIES = 1024, 3
# Korthikanti et al. 2022 (arXiv 2205.05198), equation 1 without attention scores: for bf16.
ACTIVATION_BYTES = 34
# Of a trained weight: the gradient and AdamW's two moments in fp32, and the weight in fp32.
OPTIMISER_BYTES = 16
# What Python, torch and the data take by themselves.
PROCESS_GIB = 0.6


def describe(loaded: LoadedRecipe, out: Path, options: RunOptions | None = None) -> dict[str, Any]:
    """Stages with their state, counts of tokens and steps, an estimate of memory, findings about the data, and a
    rendered example.

    ``options`` are those of the run: which stages it asks for, and with how many processes. ``asked`` of a stage says
    whether it is among them.

    Raises what planning the stages and reading the data raise, and StoreError where a run in this folder would refuse
    its layout or what was asked for, and what :func:`toolkit.judging.records.check_recorded_names` raises.
    """
    with remote_code(loaded.recipe.model.trust_remote_code):
        return _describe(loaded, out, options or RunOptions())


def _describe(loaded: LoadedRecipe, out: Path, options: RunOptions) -> dict[str, Any]:
    recipe, section = loaded.recipe, loaded.recipe.data
    refuse_others_folder(out, "run", RUN_FILES)
    earlier_layout = RunFolder(out).earlier_version()
    launched = launch_of(options.launch)
    processes = launched.processes
    check_recorded_names(recipe.evaluate.judges)
    check_template_of(recipe.evaluate.judges, recipe.evaluate.judge.template)
    stages = plan_stages(loaded, RunFolder(out), processes, sharded=launched.sharding is not None)
    asked = stages_to_run(stages, options.only, options.until)
    again = [name for name in asked if forced(name, options)]
    if launched.sharding is not None:
        check_sharded(recipe, missing(stages, asked, options))
    sides, report = read_sides(section, recipe.data_seed)
    ref = resolve(recipe.model.name, recipe.model.revision)
    require_policy(ref)
    refuse_quantised(ref, "model.name")
    tokenizer = load_tokenizer(ref, recipe.model.chat_template)
    encoder = text_encoder(tokenizer, sides["train"][0].prompt, recipe.model.name)
    within = {name: limited(name, sides[name], encoder, section, recipe.data_seed) for name in SIDES}
    rows, counts = within["train"]
    check_compared("train", counts, section, recipe.reward_model.kind)
    if recipe.rounds is not None and recipe.rounds.number > 1:
        check_labelling(recipe.rounds)
        check_labelled_data(recipe.rounds, rows)
    schedule = Schedule([PromptIds("", [0])], recipe.ppo, recipe.seed, processes)
    budgets = {"ppo": limit_of(recipe.ppo), "dpo": limit_of(recipe.dpo)}
    steps: dict[str, int | None] = {**training_steps(recipe, rows, processes), "ppo": len(schedule)}
    step_labels, solutions = None, list[Solution]()
    if recipe.reward_model.kind == "process":
        by_side, of_steps, _ = step_sides(str(recipe.reward_model.steps), section, recipe.data_seed, sides, encoder)
        solutions, step_labels = by_side["train"], {name: of_steps[name]["n_labels"] for name in SIDES}
        steps["reward_model"] = step_training(recipe, solutions, encoder, processes)
    check_reward_data(recipe, rows, solutions)
    steps |= {stage_of("ppo", round_): len(schedule) for round_ in range(2, n_rounds(recipe) + 1)}
    steps |= {stage: None for stage, limit in budgets.items() if limit is not None}
    labels = most_labels(recipe.rounds, len(rows)) if recipe.rounds is not None else None
    example = encoder.encode(rows[0].prompt, rows[0].responses[:1], section.max_response_tokens)
    return {
        "name": recipe.name,
        "out": str(out),
        "earlier_layout": earlier_layout,
        "processes": processes,
        "stages": [
            {
                "stage": planned.spec.name,
                "asked": planned.spec.name in asked,
                "state": "forced" if planned.spec.name in again else planned.state.status,
                "changed": [name for name in planned.state.changed if not name.startswith("input ")],
                "damage": planned.state.damage,
                "steps": steps.get(planned.spec.name),
                "labels": labels if kind_of(planned.spec.name) == "labels" else None,
                "until": limit.words(limit.amount) if (limit := budgets.get(planned.spec.name)) is not None else None,
            }
            for planned in stages
        ],
        "notes": {
            **{name: limit_notes(name, counts, section) for name, (_, counts) in within.items()},
            "source": data_warnings(report),
        },
        "data": {"format": report["format"], **{name: counts for name, (_, counts) in within.items()}},
        "step_labels": step_labels,
        "findings": [
            finding.as_dict() for finding in check_with(section.source, ref, tokenizer, check_options(section)).findings
        ],
        "ppo_rollouts": schedule.rollouts if budgets["ppo"] is None else None,
        "arm_differences": [
            difference.as_dict() for difference in differences_of_plan(recipe, schedule, rows, processes)
        ],
        "memory_gib": memory_estimate(recipe, model_config(ref), counts["n_tokens"] / counts["n_prompts"]),
        "example": encoder.rendered(example),
    }


def check_options(section: DataSection) -> CheckOptions:
    """What ``duel check`` reads for the data of a recipe."""
    names = ("split", "config", "revision", "columns", "conversational", "annotators")
    source = SourceOptions(**{name: getattr(section, name) for name in names})
    limits = Limits(section.max_prompt_tokens, section.max_response_tokens)
    held_out, split = held_out_part(section) or (None, None)
    return CheckOptions(source, limits, held_out=held_out, held_out_split=split)


def step_training(recipe: Recipe, solutions: Sequence[Solution], encoder: TextEncoder, processes: int) -> int:
    """Optimiser steps of a process reward model on these solutions."""
    from toolkit.engine.process import step_trees  # torch takes long to import, and other reward models need none here
    from toolkit.training.process import step_examples

    section = recipe.reward_model
    trees, _ = step_trees(solutions, encoder, section.step_separator, recipe.data.max_response_tokens)
    return total_steps(section, len(step_examples(trees, solutions)), processes)


def training_steps(recipe: Recipe, rows: Sequence[PreferenceRow], processes: int = 1) -> dict[str, int]:
    """Optimiser steps of the stages that go over the data.

    An item of a step is a prompt with all its comparisons; for TRL's trainers it is a pair with a winner.
    """
    compared = [pairs for row in rows if (pairs := splits.pairs(row))]
    imitated = len(compared) if recipe.sft.train_on == "preferred" else len(rows)
    items_of_dpo = recipe.dpo.trainer if recipe.dpo.online is None else "online"
    items = {
        "online": len(rows),
        "engine": len(compared),
        "trl": sum(pair.p != 0.5 for pairs in compared for pair in pairs),
    }
    baseline = {}
    if recipe.rft is not None:
        n_prompts = min(len(rows), recipe.rft.prompts or len(rows))
        baseline["rft"] = total_steps(recipe.rft, n_prompts, processes)
    return {
        **baseline,
        "sft": total_steps(recipe.sft, imitated, processes) if recipe.sft.enabled else 0,
        "reward_model": total_steps(recipe.reward_model, items[recipe.reward_model.trainer], processes),
        "dpo": total_steps(recipe.dpo, items[items_of_dpo], processes),
    }


def differences_of_plan(
    recipe: Recipe, schedule: Schedule, rows: Sequence[PreferenceRow], processes: int
) -> list[ArmDifference]:
    """What the arms will differ in: their settings, and how many of the training prompts each policy sees.

    Under a budget that is not known before training.
    """
    if limit_of(recipe.ppo) is not None or limit_of(recipe.dpo) is not None:
        return planned_differences(recipe)
    warmup = recipe.ppo.critic_warmup_rollouts
    of_ppo = (schedule.rollouts - warmup) * schedule.prompts_per_rollout
    if recipe.ppo.prompts is None:  # the stage counts those of a further file, and leaves out held-out ones
        of_ppo = min(len(rows), of_ppo)
    compared = [pairs for row in rows if (pairs := splits.pairs(row))]
    n_items = training_steps(recipe, rows, processes)["dpo"] * step_size(recipe.dpo, processes)
    return planned_differences(recipe, Measured(prompts_seen=(max(0, of_ppo), min(len(compared), n_items))))


def model_config(ref: ModelRef) -> Any:
    """The configuration of a model's text part; of an adapter, its base's."""
    return read_config(below_adapters(ref)).get_text_config()


def memory_estimate(recipe: Recipe, config: Any, prompt_tokens: float) -> dict[str, float]:
    """GiB of weights, gradients and optimiser, activations and logits of the stage that takes most: an upper guide.

    ``prompt_tokens`` are those of a prompt with all its responses, in the mean.
    """
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    inner = getattr(config, "intermediate_size", 4 * hidden)
    kv_share = getattr(config, "num_key_value_heads", config.num_attention_heads) / config.num_attention_heads
    parameters = layers * (hidden * hidden * (2 + 2 * kv_share) + 3 * hidden * inner) + vocabulary * hidden
    bf16 = recipe.model.dtype == "bfloat16"
    lora = recipe.model.lora
    if lora is not None:
        weights = parameters * (2 if bf16 else 4)
        adapters = layers * lora.r * (hidden * 4 + hidden * 2 * kv_share + 3 * (hidden + inner))
        trained = adapters * OPTIMISER_BYTES
    else:  # PPO holds policy, critic (unless rloo), reference and reward model, and trains the first two
        has_critic = recipe.ppo.advantage == "gae"
        weights = parameters * 4 * (3 + has_critic)
        trained = parameters * OPTIMISER_BYTES * (1 + has_critic)
    batch_tokens = prompt_tokens * recipe.dpo.per_device_train_batch_size
    sizes = {
        "weights": weights,
        "gradients_and_optimiser": trained,
        "activations": ACTIVATION_BYTES * (1 if bf16 else 2) * batch_tokens * hidden * layers,
        "logits": min(LOGIT_TOKENS, batch_tokens) * vocabulary * 4 * LOGIT_COPIES,
    }
    total = sum(sizes.values()) / GIB + PROCESS_GIB
    return {**{name: round(size / GIB, 2) for name, size in sizes.items()}, "total": round(total, 2)}


def render(described: dict[str, Any]) -> str:
    """What :func:`describe` says, for people. In the example, response tokens stand in [brackets]."""
    lines = [f"{described['name']} -> {described['out']}", ""]
    if described["earlier_layout"] is not None:
        lines.append(
            f"  an earlier duel wrote this run folder (layout {described['earlier_layout']}): its stages run again, "
            "and their earlier results are kept\n"
        )
    if described["processes"] > 1:
        lines.append(f"  {described['processes']} processes train, each with batches of the recipe's size\n")
    width = max(13, *(len(stage["stage"]) for stage in described["stages"]))
    for stage in described["stages"]:
        why = f"  changed: {', '.join(stage['changed'])}" if stage["changed"] else ""
        steps = f"  {stage['steps']} steps" if stage["steps"] is not None else ""
        steps = f"  until {stage['until']}" if stage["until"] is not None else steps
        steps = f"  at most {counted(stage['labels'], 'label')} for each arm" if stage["labels"] is not None else steps
        state = f"{STATES[stage['state']]:24}{steps}{why}" if stage["asked"] else "not asked for"
        lines.append(f"  {stage['stage']:{width}} {state}")
    for side in SIDES:
        counts = described["data"][side]
        lines.append(
            f"\n{side}: {counts['n_prompts']} prompts, {counts['n_responses']} responses, {counts['n_comparisons']} "
            f"comparisons, {counts['n_tokens']:,} tokens"
        )
        lines += [f"  {note}" for note in described["notes"][side]]
    if described["step_labels"] is not None:
        counts = described["step_labels"]
        lines.append(f"\nlabels of steps: {counts['train']:,} to train on, {counts['eval']:,} held out")
    lines += [f"  {note}" for note in described["notes"]["source"]]
    if described["findings"]:
        lines.append("\nfindings in the data (duel check shows rows and examples):")
    for finding in described["findings"]:
        lines.append(f"  {finding['kind']}, {counted(finding['n_rows'], 'row')}: {finding['fix']}")
    lines.append("")
    lines += [difference["sentence"] for difference in described["arm_differences"] if difference["differs"]]
    memory = described["memory_gib"]
    parts = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in memory.items() if name != "total")
    lines.append(f"\nmemory: about {memory['total']} GiB ({parts})")
    text = "".join(f"[{token['text']}]" if token["response"] else token["text"] for token in described["example"])
    lines.append(f"\nfirst training example, response tokens in brackets:\n{text}")
    return "\n".join(lines)
