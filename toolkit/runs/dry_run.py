"""``duel run --dry-run``: what would run and why, how much of it, and one example as the models will see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.models.encoding import text_encoder
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.ppo.prompts import PromptIds
from toolkit.ppo.schedule import Schedule
from toolkit.preferences import splits
from toolkit.recipe.checks import LoadedRecipe
from toolkit.recipe.schema import Recipe
from toolkit.runs.pipeline import plan
from toolkit.runs.store import RunFolder
from toolkit.stages.data import fit, split
from toolkit.training.trainer import total_steps


def describe(loaded: LoadedRecipe, out: Path) -> dict[str, Any]:
    """Stages with their state, counts of tokens and steps, an estimate of memory, and a rendered example."""
    recipe = loaded.recipe
    plans = plan(loaded, RunFolder(out))
    section = recipe.data
    train, evaluation, report = split(section, recipe.seed)
    ref = resolve(recipe.model.name, recipe.model.revision)
    encoder = text_encoder(load_tokenizer(ref, recipe.model.chat_template), train[0].prompt, recipe.model.name)
    sides = {}
    for name, rows, limit in (("train", train, section.train_prompts), ("eval", evaluation, section.eval_prompts)):
        kept, counts = fit(splits.limit(rows, limit, recipe.seed), encoder, section)
        if not kept:
            raise DataError(
                f"no {name} prompt is left: {counts}", where=section.source, fix="raise data.max_prompt_tokens"
            )
        sides[name] = (kept, counts)
    kept, counts = sides["train"]
    compared = [pairs for row in kept if (pairs := splits.pairs(row))]
    # What one item of a step is: a prompt with all its comparisons, or for TRL's trainers a pair.
    items = {"engine": len(compared), "trl": sum(pair.p != 0.5 for pairs in compared for pair in pairs)}
    schedule = Schedule([PromptIds("", [0])], recipe.ppo, recipe.seed)
    steps = {
        "sft": total_steps(recipe.sft, counts["n_prompts"]) if recipe.sft.enabled else 0,
        "reward_model": total_steps(recipe.reward_model, items[recipe.reward_model.trainer]),
        "ppo": len(schedule),
        "dpo": total_steps(recipe.dpo, items[recipe.dpo.trainer]),
    }
    example = encoder.encode(kept[0].prompt, kept[0].responses[:1], section.max_response_tokens)
    return {
        "name": recipe.name,
        "out": str(out),
        "stages": [
            {
                "stage": item.spec.name,
                "state": item.state.status,
                "changed": [name for name in item.state.changed if not name.startswith("input ")],
                "steps": steps.get(item.spec.name),
            }
            for item in plans
        ],
        "data": {"format": report["format"], "train": counts, "eval": sides["eval"][1]},
        "ppo_rollouts": schedule.rollouts,
        "memory_gib": memory_estimate(recipe, ref, counts),
        "example": encoder.rendered(example),
    }


def memory_estimate(recipe: Recipe, ref: Any, counts: dict[str, int]) -> dict[str, float]:
    """GiB of weights, gradients, optimiser and the largest logits of the most demanding stage: a rough upper guide.

    Activations are estimated at 34 bytes per token, layer and hidden unit in bf16 (Korthikanti et al. 2022, equation 1
    without attention scores), twice that in fp32.
    """
    from transformers import AutoConfig

    path = ref.path if ref.kind != "adapter" else str(Path(ref.path))
    config = AutoConfig.from_pretrained(path, revision=ref.revision).get_text_config()
    d, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    inner = getattr(config, "intermediate_size", 4 * d)
    kv = getattr(config, "num_key_value_heads", config.num_attention_heads) / config.num_attention_heads
    per_layer = d * d * (2 + 2 * kv) + 3 * d * inner
    parameters = layers * per_layer + vocabulary * d
    width = 2 if recipe.model.dtype == "bfloat16" else 4
    lora = recipe.model.lora
    if lora is not None:
        trained = layers * lora.r * (d * 4 + d * 2 * kv + 3 * (d + inner))
        copies, weights = 1, parameters * width
    else:
        trained, copies, weights = parameters, 4, parameters * 4
    tree = counts["n_tokens"] / max(1, counts["n_prompts"])
    batch_tokens = tree * recipe.dpo.per_device_train_batch_size
    activations = 34 * (1 if width == 2 else 2) * batch_tokens * d * layers
    logits = min(1024, batch_tokens) * vocabulary * 4 * 3
    optimiser = trained * 16
    gib = 2**30
    return {
        "weights": round(weights * copies / gib, 2),
        "gradients_and_optimiser": round(optimiser * (2 if lora is None else 1) / gib, 2),
        "activations": round(activations / gib, 2),
        "logits": round(logits / gib, 2),
        "total": round(
            (weights * copies + optimiser * (2 if lora is None else 1) + activations + logits) / gib + 0.6, 2
        ),
    }


def render(plan_: dict[str, Any]) -> str:
    """The plan for people. In the example, response tokens stand in [brackets]."""
    lines = [f"{plan_['name']} -> {plan_['out']}", ""]
    for stage in plan_["stages"]:
        why = f"  changed: {', '.join(stage['changed'])}" if stage["changed"] else ""
        steps = f"  {stage['steps']} steps" if stage["steps"] is not None else ""
        lines.append(f"  {stage['stage']:13} {_STATES[stage['state']]:24}{steps}{why}")
    for side in ("train", "eval"):
        counts = plan_["data"][side]
        lines.append(
            f"\n{side}: {counts['n_prompts']} prompts, {counts['n_responses']} responses, {counts['n_comparisons']} "
            f"comparisons, {counts['n_tokens']:,} tokens; {counts['n_long_prompts']} prompts too long, "
            f"{counts['n_long_responses']} responses cut"
        )
    memory = plan_["memory_gib"]
    lines.append(
        f"\nmemory: about {memory['total']} GiB ({', '.join(f'{k} {v}' for k, v in memory.items() if k != 'total')})"
    )
    text = "".join(f"[{token['text']}]" if token["response"] else token["text"] for token in plan_["example"])
    lines.append(f"\nfirst training example, response tokens in brackets:\n{text}")
    return "\n".join(lines)


_STATES = {
    "cached": "cached",
    "shelved": "cached (shelf)",
    "partial": "continues",
    "stale": "runs again",
    "missing": "runs",
}
