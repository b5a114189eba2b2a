"""The recipe: everything a user decides about one paired run, as pydantic models.

Precedence is default < file < ``--set``. :func:`load_recipe` remembers where each value came from.
Field names follow TRL and transformers where the meaning is the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from toolkit.errors import nearest
from toolkit.recipe_loading import (
    SHORTHAND,
    Keys,
    Problem,
    Tree,
    apply_set,
    combined,
    copy_recipe,
    find_recipe,
    one_line,
    read_tree,
    schema_error,
    shipped_recipes,
)

__all__ = [
    "DpoSection",
    "LoadedRecipe",
    "PpoSection",
    "Recipe",
    "arm_differences",
    "check",
    "copy_recipe",
    "flat",
    "json_schema",
    "load_recipe",
    "resolved_yaml",
    "shipped_recipes",
]

# Losses of a pair that the tree batch computes; the others are TRL's own.
ENGINE_LOSSES = ("sigmoid", "sigmoid_norm", "ipo", "hinge", "robust")
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        # Python's True is 1, so that `seed: yes` would silently become 1.
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("true and false are not allowed here")
        return value


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021), shared by SFT, RM, PPO and DPO."""

    r: PositiveInt = Field(16, description="Rank of the adapters.")
    alpha: PositiveFloat = Field(32, description="Scale: the update is multiplied by alpha / r.")
    target_modules: str | list[str] = Field("all-linear", description="Which layers get an adapter (peft's names).")


class ModelSection(Section):
    name: str = Field("smollm2-135m", description="tiny, smollm2-135m, a hub id, a local folder, or gguf:FILE.")
    revision: str | None = Field(None, description="Git revision, for hub ids.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Precision of the forward passes.")
    lora: Lora | None = Field(default_factory=Lora, description="null trains all weights.")
    chat_template: str | None = Field(None, description="A Jinja file that replaces the tokenizer's template.")
    attn_implementation: str | None = Field(
        None,
        description="sdpa, eager or grouped: all take a tree batch's mask. null takes grouped, which sees no padding, "
        "on a CPU, and sdpa elsewhere; grouped keeps heads x tokens^2 of a row in training: sdpa for long rows.",
    )


class DataSection(Section):
    source: str = Field("reviews", description="A shipped name, a .jsonl(.gz)/.json/.csv/.parquet file, or a hub id.")
    config: str | None = Field(
        None, description="Configuration of a hub data set, or a folder of it (data_dir); a file ignores it."
    )
    split: str = Field("train", description="Split of a hub data set; a file ignores it.")
    revision: str | None = Field(None, description="Git revision of a hub data set; a file ignores it.")
    eval_source: str | None = Field(None, description="Held-out data; without it a share of the prompts is held out.")
    eval_split: str | None = Field(
        None, description="Held-out split of a hub data set. A file has no splits: eval_fraction holds."
    )
    eval_fraction: Fraction = Field(0.1, description="Share of the prompts that is held out, by hash of the prompt.")
    columns: dict[str, str] = Field(default_factory=dict, description="Our column name -> the data's column name.")
    conversational: bool | None = Field(
        None, description="Read transcripts as chat messages; null decides by the data."
    )
    annotators: list[str] | None = Field(None, description="Use these annotators' comparisons only.")
    train_prompts: PositiveInt | None = Field(None, description="At most so many training prompts.")
    eval_prompts: PositiveInt | None = Field(None, description="At most so many held-out prompts.")
    max_responses: Annotated[int, Field(ge=2)] | None = Field(None, description="At most so many responses per prompt.")
    max_prompt_tokens: PositiveInt = Field(512, description="A longer prompt's row is left out, and counted.")
    max_response_tokens: PositiveInt = Field(
        256, description="Longer responses are cut, and counted; also the sampling length."
    )


class Training(Section):
    """What every training stage has. Names follow transformers.TrainingArguments."""

    learning_rate: PositiveFloat = Field(1e-4, description="Of AdamW, at its peak.")
    num_train_epochs: PositiveFloat = Field(1.0, description="Passes over the training prompts.")
    max_steps: int = Field(-1, description="If positive, overrides num_train_epochs.")
    per_device_train_batch_size: PositiveInt = Field(8, description="Prompts per step (PPO: responses per rollout).")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Batches behind one step.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="How the rate falls."
    )
    warmup_ratio: Fraction = Field(0.05, description="Share of the steps in which the rate rises.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Of AdamW.")
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradients are clipped to this norm.")
    adam_epsilon: PositiveFloat = Field(1e-8, description="Of AdamW.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, more time."
    )
    logging_steps: PositiveInt = Field(5, description="Steps between two entries of the log.")


class SftSection(Training):
    enabled: bool = Field(True, description="false starts both arms from the model as it is.")
    train_on: Literal["preferred", "all"] = Field(
        "preferred", description="The most preferred response of a prompt, or all."
    )
    learning_rate: PositiveFloat = Field(2e-4, description="Of AdamW, at its peak.")


class RewardModelSection(Training):
    trainer: Literal["engine", "trl"] = Field(
        "engine", description="engine: all comparisons of a prompt at once. trl: TRL's RewardTrainer, on pairs."
    )
    center: bool = Field(True, description="Shift the score so that SFT samples of training prompts average 0.")
    center_rewards_coefficient: NonNegativeFloat = Field(0.0, description="Auxiliary loss on (r_i + r_j)^2.")


class Arm(Training):
    """What the two arms share by construction: schedule, clipping, checkpoints."""

    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="How the rate falls."
    )
    warmup_ratio: Fraction = Field(0.1, description="Share of the steps in which the rate rises.")
    num_checkpoints: PositiveInt = Field(
        3, description="Checkpoints along training that are evaluated, the last included."
    )
    kl_milestones: list[PositiveFloat] | None = Field(
        None,
        description="Keep the policy for evaluation when its KL to SFT first passes each of these (nats per response). "
        "PPO has the KL of each rollout; DPO samples for it every logging_steps.",
    )


class PpoSection(Arm):
    learning_rate: PositiveFloat = Field(
        1e-4, description="Of the policy. 1e-6..3e-6 for full weights, about 10x and more for LoRA."
    )
    value_learning_rate: PositiveFloat | None = Field(None, description="Of the critic; null takes learning_rate.")
    per_device_train_batch_size: PositiveInt = Field(64, description="Responses per rollout.")
    samples_per_prompt: PositiveInt = Field(4, description="Responses sampled for each prompt of a rollout.")
    total_episodes: PositiveInt = Field(1024, description="Responses sampled in all.")
    num_ppo_epochs: PositiveInt = Field(2, description="Passes over each rollout.")
    num_mini_batches: PositiveInt = Field(2, description="Optimiser steps in a pass over a rollout.")
    kl_coef: NonNegativeFloat = Field(0.05, description="beta of the per-token KL penalty in the reward.")
    kl_estimator: Literal["k1", "k3"] = Field("k1", description="k1 is unbiased, k3 never negative (Schulman 2020).")
    adaptive_kl: bool = Field(False, description="Ziegler 2019 controller.")
    adaptive_kl_target: PositiveFloat = Field(6.0, description="Nats per response.")
    adaptive_kl_horizon: PositiveInt = Field(10_000, description="Responses.")
    gamma: Fraction = Field(1.0, description="Discount of later rewards.")
    lam: Fraction = Field(0.95, description="lambda of generalised advantage estimation.")
    cliprange: PositiveFloat = Field(0.2, description="Ratios are clipped to 1 +- this.")
    cliprange_value: PositiveFloat = Field(0.2, description="The critic's change is clipped to +- this.")
    vf_coef: NonNegativeFloat = Field(0.1, description="Weight of the critic's loss.")
    whiten_rewards: bool = Field(False, description="Divide rewards by their standard deviation, the mean kept.")
    whiten_advantages: bool = Field(True, description="Advantages of a rollout get mean 0 and standard deviation 1.")
    reward_clip: PositiveFloat | None = Field(10.0, description="Scores are clipped to +-this; null does not clip.")
    missing_eos_penalty: float | None = Field(
        -1.0, le=0.0, description="Replaces the score of a truncated response; null keeps it."
    )
    response_length: PositiveInt | None = Field(None, description="Tokens; null takes data.max_response_tokens.")
    temperature: PositiveFloat = Field(
        1.0, description="Of rollouts; the logits of policy and reference are divided by it in training too."
    )
    value_head_init: Literal["reward_model", "zero"] = Field(
        "zero", description="The trunk of the critic is the reward model's in either case."
    )
    share_trunk: bool = Field(False, description="The critic is a head on the policy's own states, not a model.")
    target_kl: PositiveFloat | None = Field(
        None, description="Skip a rollout's further updates when approx_kl passes this (nats per token)."
    )
    max_kl: PositiveFloat | None = Field(
        None, description="Stop when KL to the reference passes this many nats per response."
    )
    dual_clip: PositiveFloat | None = Field(None, description="c > 1 of the dual clip; null: off.")
    critic_warmup_rollouts: NonNegativeInt = Field(0, description="First rollouts that train the critic alone.")
    ema_decay: Fraction | None = Field(None, description="Average the policy's weights, and keep the average.")
    adam_epsilon: PositiveFloat = Field(
        1e-5, description="Of AdamW (N+: larger than usual, so that early updates are calm)."
    )


class DpoSection(Arm):
    learning_rate: PositiveFloat = Field(1e-4, description="Of AdamW, at its peak.")
    trainer: Literal["engine", "trl"] = Field(
        "engine", description="engine: all comparisons of a prompt at once. trl: TRL's DPOTrainer, on pairs."
    )
    beta: PositiveFloat = Field(0.1, description="Of the implicit reward beta * log(pi / pi_ref).")
    loss_type: Literal[
        "sigmoid",
        "sigmoid_norm",
        "ipo",
        "hinge",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "sft",
    ] = Field("sigmoid", description="TRL's names; those after robust need `trainer: trl`.")
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.0, description="Share of wrong labels: of conservative DPO (sigmoid), of robust, and of exo_pair."
    )


class JudgeSettings(Section):
    template: str | None = Field(
        None, description="choice, score, logprob, or a YAML file; null: logprob for llm:, choice for openai:."
    )
    concurrency: PositiveInt = Field(8, description="Requests to an endpoint at once.")
    timeout_s: PositiveFloat = Field(60.0, description="Seconds until a request is tried again.")
    prompt_price_usd: NonNegativeFloat | None = Field(None, description="USD per million prompt tokens; null: no sum.")
    completion_price_usd: NonNegativeFloat | None = Field(None, description="USD per million completion tokens.")


class EvaluateSection(Section):
    judges: list[str] = Field(
        default_factory=list,
        description="gold, rm:MODEL, implicit:POLICY,REFERENCE, llm:MODEL, openai:MODEL@BASE_URL, file:PATH, "
        "python:module:function; empty picks gold where the data has it, and the run's own reward signals otherwise.",
    )
    judge: JudgeSettings = Field(default_factory=JudgeSettings, description="Of the judges llm: and openai:.")
    temperature: PositiveFloat = Field(1.0, description="Of the samples that are judged.")
    samples_per_prompt: PositiveInt = Field(1, description="Responses per held-out prompt and policy.")
    max_new_tokens: PositiveInt | None = Field(None, description="null takes data.max_response_tokens.")
    best_of_n: NonNegativeInt = Field(4, description="n of the best-of-n policies; 0 leaves them out.")
    checkpoints: bool = Field(True, description="Evaluate intermediate checkpoints as well.")
    batch_size: PositiveInt = Field(64, description="Responses sampled at once.")
    token_budget: PositiveInt | None = Field(
        None, description="Tokens scored at once; null: 1,024 on a CPU, 16,384 on a GPU."
    )
    bootstrap: PositiveInt = Field(2000, description="Resamples of the prompts for every interval.")
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(0.95, description="Coverage of every interval.")


class ReportSection(Section):
    title: str | None = Field(None, description="Of the page; null makes one of the name.")
    max_samples: PositiveInt = Field(500, description="Held-out prompts shown side by side.")


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Of the run, and of its folder.")]
    seed: NonNegativeInt = Field(0, description="Of splits, initial heads, orders and samples.")
    report_to: list[Literal["wandb", "trackio", "tensorboard"]] = Field(
        default_factory=list, description="Who else hears of the training stages' numbers; changes no result."
    )
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    sft: SftSection = Field(default_factory=SftSection)
    reward_model: RewardModelSection = Field(default_factory=RewardModelSection)
    ppo: PpoSection = Field(default_factory=PpoSection)
    dpo: DpoSection = Field(default_factory=DpoSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    report: ReportSection = Field(default_factory=ReportSection)


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe. ``origins``: dotted leaf -> "default", "file:NAME.yaml:LINE" or "--set"."""

    recipe: Recipe
    origins: dict[str, str]
    path: Path | None


def load_recipe(name_or_path: str, sets: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe file, or the shipped recipe of that name, apply ``sets`` ("a.b=value") in order, and check it.

    Raises RecipeError, with every wrong key and value in one message, each with its line.
    """
    path = find_recipe(name_or_path)
    tree = read_tree(path)
    for setting in sets:
        apply_set(tree, setting)
    try:
        recipe = Recipe.model_validate(tree.values)
    except ValidationError as error:
        raise schema_error(error, Recipe, tree, path) from None
    origins = {".".join(keys): _origin(keys, tree) for keys, _ in _leaves(recipe)}
    check(recipe, origins)
    return LoadedRecipe(recipe, origins, path)


def flat(recipe: Recipe) -> dict[str, object]:
    """Dotted key -> value of every setting; a list, a mapping of columns and a null section are one value each."""
    return {".".join(keys): value for keys, value in _leaves(recipe)}


def resolved_yaml(loaded: LoadedRecipe) -> str:
    """The complete recipe as YAML, every value with its origin behind it. Loading it gives the same Recipe."""
    lines = ["# Every setting of this run, and where its value comes from."]
    opened: Keys = ()
    for keys, value in _leaves(loaded.recipe):
        for depth in range(len(keys) - 1):
            if opened[: depth + 1] != keys[: depth + 1]:
                lines.append(f"{'  ' * depth}{keys[depth]}:")
        opened = keys[:-1]
        text = f"{'  ' * len(opened)}{keys[-1]}: {one_line(value)}"
        lines.append(f"{text:<48}  # {loaded.origins['.'.join(keys)]}")
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors; the short forms ``model: tiny`` and ``data: FILE`` included."""
    schema = Recipe.model_json_schema()
    for section, key in SHORTHAND.items():
        short = {"type": "string", "description": f"Short for {section}.{key}."}
        schema["properties"][section] = {"anyOf": [schema["properties"][section], short]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


# An arm counts these in its own unit (PPO: responses of a rollout, DPO: prompts of the data), or they only log or keep.
_OWN_UNITS = {
    "kl_milestones",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "logging_steps",
}


def arm_differences(recipe: Recipe) -> dict[str, tuple[object, object]]:
    """Setting -> (PPO's value, DPO's value) where the arms differ in what they share: worth a warning, no error."""
    pairs = {
        name: (getattr(recipe.ppo, name), getattr(recipe.dpo, name))
        for name in Arm.model_fields
        if name not in _OWN_UNITS
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check(recipe: Recipe, origins: Mapping[str, str] | None = None) -> None:
    """Check the settings against each other. Raises one RecipeError that names every conflict and its lines."""
    problems: list[Problem] = []
    values = flat(recipe)

    def conflict(what: str, fix: str, *keys: str) -> None:
        where = (f"{key} = {one_line(values[key])}{_line((origins or {}).get(key, ''))}" for key in keys)
        problems.append(Problem(what, ", ".join(where), fix))

    data, ppo, dpo, evaluate = recipe.data, recipe.ppo, recipe.dpo, recipe.evaluate
    batch = ppo.per_device_train_batch_size
    for name in ("samples_per_prompt", "num_mini_batches"):
        part = getattr(ppo, name)
        if batch % part:
            what = f"a rollout of {batch} responses does not divide by ppo.{name} = {part}"
            conflict(what, f"take a multiple of {part}", "ppo.per_device_train_batch_size", f"ppo.{name}")
    if batch // ppo.samples_per_prompt < ppo.num_mini_batches:
        prompts = batch // ppo.samples_per_prompt
        what = f"{prompts} prompts in a rollout do not fill {ppo.num_mini_batches} mini-batches of whole prompts"
        keys = ("ppo.per_device_train_batch_size", "ppo.samples_per_prompt", "ppo.num_mini_batches")
        conflict(what, f"at most {prompts} mini-batches", *keys)
    for name in ("max_steps", "num_train_epochs"):
        if getattr(ppo, name) != Training.model_fields[name].default:
            conflict("PPO is as long as ppo.total_episodes says", "leave it out", f"ppo.{name}")
    if ppo.total_episodes < batch:
        what = f"{ppo.total_episodes} episodes do not fill one rollout of {batch} responses"
        conflict(what, f"at least {batch} episodes", "ppo.total_episodes", "ppo.per_device_train_batch_size")
    if ppo.adaptive_kl and ppo.kl_coef == 0:
        fix = "start above 0 (Ziegler 2019: 0.2)"
        conflict("the adaptive controller multiplies a KL coefficient of 0", fix, "ppo.adaptive_kl", "ppo.kl_coef")
    if dpo.trainer == "trl" and dpo.kl_milestones:
        fix = "trainer: engine, or num_checkpoints alone"
        conflict("TRL's trainer does not measure the KL", fix, "dpo.trainer", "dpo.kl_milestones")
    if dpo.trainer == "engine" and dpo.loss_type not in ENGINE_LOSSES:
        what = f"the engine has no loss {dpo.loss_type}"
        conflict(what, f"trainer: trl, or one of {', '.join(ENGINE_LOSSES)}", "dpo.loss_type", "dpo.trainer")
    # TRL's sigmoid loss has no smoothing, and its exo_pair none of 0.
    smoothed = ("sigmoid", "robust") if dpo.trainer == "engine" else ("robust", "exo_pair")
    if dpo.label_smoothing and dpo.loss_type not in smoothed:
        what = f"dpo.label_smoothing belongs to the losses {' and '.join(smoothed)} of trainer: {dpo.trainer}"
        keys = ("dpo.label_smoothing", "dpo.loss_type", "dpo.trainer")
        conflict(what, f"0, or loss_type: {smoothed[0]}", *keys)
    if dpo.loss_type == "exo_pair" and not dpo.label_smoothing:
        conflict("exo_pair needs label smoothing", "1e-3 (arXiv 2402.00856)", "dpo.label_smoothing", "dpo.loss_type")
    splits_itself = data.eval_source is None and (data.eval_split is None or not _on_the_hub(data.source))
    if splits_itself and not 0 < data.eval_fraction < 1:
        what = "data.eval_fraction must lie between 0 and 1 where the data has no held-out part of its own"
        conflict(what, "0.1, or name an eval_source or an eval_split", "data.eval_fraction")
    if data.eval_split == data.split and data.eval_source is None and _on_the_hub(data.source):
        conflict("training and evaluation take the same split", "another split", "data.split", "data.eval_split")
    if data.eval_source == data.source and data.eval_split in (None, data.split):
        fix = "another file or split, or null to hold out a share"
        conflict("training and evaluation take the same data", fix, "data.source", "data.eval_source")
    if data.annotators == []:
        conflict("no annotator is left", "null takes all of them", "data.annotators")
    lora = recipe.model.lora
    if lora is not None and not lora.target_modules:
        conflict("no layer gets an adapter", "all-linear, or `lora: null`", "model.lora.target_modules")
    if evaluate.best_of_n == 1:
        conflict("best of 1 is the policy itself", "2 or more; 0 leaves it out", "evaluate.best_of_n")
    for index, spec in enumerate(evaluate.judges):
        wrong = _judge_problem(spec)
        if wrong:
            conflict(f"evaluate.judges: {spec!r} {wrong[0]}", wrong[1], "evaluate.judges")
        if spec in evaluate.judges[:index]:
            conflict(f"evaluate.judges: {spec!r} is there twice", "keep one of them", "evaluate.judges")
    if problems:
        raise combined(problems, recipe.name)


_JUDGES = {
    "gold": "",
    "rm": "[:MODEL]",
    "implicit": "[:POLICY,REFERENCE]",
    "file": ":PATH",
    "python": ":module:function",
    "llm": ":MODEL",
    "openai": ":MODEL@BASE_URL",
}
_JUDGE_PATTERN = re.compile(
    r"gold|rm(:.+)?|implicit(:[^,]+,[^,]+)?|file:.+|python:[\w.]+:\w+|llm:.+|openai:[^@]+@https?://.+"
)


def _judge_problem(spec: str) -> tuple[str, str] | None:
    """What is wrong with a judge, and the fix; None for a sound one. Whether its model exists shows later."""
    kind = spec.partition(":")[0]
    if kind not in _JUDGES:
        return "is no judge", nearest(kind, _JUDGES)
    if _JUDGE_PATTERN.fullmatch(spec):
        return None
    quote = "; inside [ ] quote it, or its comma ends the list item" if kind == "implicit" else ""
    return "is incomplete", f"{kind}{_JUDGES[kind]}{quote}"


def _on_the_hub(source: str) -> bool:
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    has_ending = re.search(r"\.(jsonl?|csv)(\.gz)?$|\.parquet$", source) is not None
    return is_id and not has_ending and not Path(source).exists()


def _line(origin: str) -> str:
    return f" ({origin.removeprefix('file:')})" if origin else ""


def _leaves(section: Section, above: Keys = ()) -> Iterator[tuple[Keys, object]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _leaves(value, (*above, name))
        else:
            yield (*above, name), value


def _origin(keys: Keys, tree: Tree) -> str:
    """The leaf's own mark; ``--set`` too where only a part of it (a column, a list item) was set there."""
    origins = [mark.origin for path, mark in tree.marks.items() if path[: len(keys)] == keys]
    if "--set" in origins:
        return "--set"
    return tree.marks[keys].origin if keys in tree.marks else "default"
