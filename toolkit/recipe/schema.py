"""The recipe: everything that a user decides about one paired run, as pydantic models.

A value is the default, unless the file has one, unless ``--set`` has one. The sections of training are in
``training.py``. Field names follow TRL and transformers where the meaning is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from toolkit.recipe.section import Fraction, Section, Seed
from toolkit.recipe.training import (
    DpoSection,
    ModelSection,
    PpoSection,
    RewardModelSection,
    RftSection,
    SftSection,
)
from toolkit.recipe.yaml_values import Keys


class DataSection(Section):
    source: str = Field(
        "reviews", description="Preference data: a shipped name, a .jsonl(.gz)/.json/.csv/.parquet file, or a hub id."
    )
    config: str | None = Field(
        None,
        description="Configuration of a hub data set, or a folder in it (data_dir). A file ignores it, and so does "
        "another eval_source.",
    )
    split: str = Field("train", description="Split of a hub data set. A file ignores it.")
    revision: str | None = Field(
        None, description="Git revision of a hub data set. A file ignores it, and so does another eval_source."
    )
    eval_source: str | None = Field(
        None,
        description="Held-out data from another source, with the columns, conversational and annotators of source; "
        "null takes eval_split, or holds out eval_fraction.",
    )
    eval_split: str | None = Field(
        None,
        description="Held-out split of a hub data set or a folder with splits. A file takes eval_fraction.",
    )
    eval_fraction: Fraction = Field(
        0.1, description="Share of the prompts to hold out, chosen by a hash of the prompt."
    )
    split_seed: Seed | None = Field(
        None,
        description="Seed of the split and of the limits; null takes seed. All seeds of a study share it.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Name of a known column -> name of that column in the data."
    )
    conversational: bool | None = Field(
        None, description="Whether to read transcripts as chat messages; null decides by the data."
    )
    annotators: list[str] | None = Field(
        None, description="Use the comparisons of these annotators only; null uses all."
    )
    train_prompts: PositiveInt | None = Field(None, description="Largest number of training prompts; null takes all.")
    eval_prompts: PositiveInt | None = Field(None, description="Largest number of held-out prompts; null takes all.")
    max_responses: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Largest number of responses to a prompt; null takes all."
    )
    max_prompt_tokens: PositiveInt = Field(512, description="Rows with a longer prompt are left out, and counted.")
    max_response_tokens: PositiveInt = Field(
        256, description="Longer responses are cut, and counted. Policies sample up to this length, too."
    )


class JudgeSettings(Section):
    template: str | None = Field(
        None,
        description="What a language model is asked: choice, score, logprob, or a YAML file; null takes logprob for "
        "llm: and choice for openai:.",
    )
    concurrency: PositiveInt = Field(8, description="Requests that an endpoint gets at the same time.")
    timeout_s: PositiveFloat = Field(60.0, description="Seconds to wait for an answer before asking again.")
    prompt_price_usd: NonNegativeFloat | None = Field(
        None, description="Price of a million prompt tokens in USD; null counts no money."
    )
    completion_price_usd: NonNegativeFloat | None = Field(
        None, description="Price of a million completion tokens in USD."
    )


class EvaluateSection(Section):
    judges: list[str] = Field(
        default_factory=list,
        description="Judges: gold, rm:MODEL, implicit:POLICY,REFERENCE, llm:MODEL, openai:MODEL@BASE_URL, file:PATH, "
        "python:module:function. An empty list takes gold where the data has it, else the arms' own rewards (rm and "
        "implicit).",
    )
    judge: JudgeSettings = Field(default_factory=JudgeSettings, description="Options of the judges llm: and openai:.")
    judge_test_pairs: NonNegativeInt = Field(
        100,
        description="Most labelled held-out pairs that each judge is tested on, one of every prompt before a second of "
        "any; one that is no better than a coin on them does not decide. Judges whose scores are at hand (gold, rm, "
        "implicit) take all pairs. 0 tests none, and the verdict says so.",
    )
    primary_judge: str | None = Field(
        None,
        description="Judge that decides the verdict alone. null pools all independent judges inside each prompt, and "
        "leaves the verdict undecided where they disagree on which arm is ahead.",
    )
    smallest_effect: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.02, description="Smallest distance of a win rate from one half that counts as a difference (0.02: 2 points)."
    )
    demonstration: bool = Field(
        False, description="The recipe only shows that everything runs, and the verdict says so."
    )
    temperature: PositiveFloat = Field(1.0, description="Temperature of the samples that are judged.")
    temperatures: list[PositiveFloat] = Field(
        default_factory=list,
        description="Further temperatures at which SFT and both arms are sampled and compared by the judges that "
        "decide. The verdict stays with temperature. Each costs samples_per_prompt samples of the three policies, and "
        "their judgements.",
    )
    samples_per_prompt: PositiveInt = Field(
        1,
        description="Responses that SFT and the trained policies sample for a held-out prompt; the base policy and "
        "checkpoints, which decide nothing, sample one.",
    )
    max_new_tokens: PositiveInt | None = Field(
        None, description="Longest sample in tokens; null takes data.max_response_tokens."
    )
    best_of_n: NonNegativeInt = Field(
        4, description="Samples of SFT that a best-of-n policy picks from; 0 leaves these policies out."
    )
    checkpoints: bool = Field(True, description="Evaluate the policies along training, too.")
    checkpoint_prompts: PositiveInt | None = Field(
        None,
        description="Held-out prompts that the base policy and checkpoints, which decide nothing, are sampled on; null "
        "takes all.",
    )
    batch_size: PositiveInt = Field(64, description="Responses to sample at once.")
    token_budget: PositiveInt | None = Field(
        None, description="Tokens to score at once; null takes 1,024 on a CPU and 16,384 on a GPU."
    )
    bootstrap: PositiveInt = Field(2000, description="Bootstrap resamples of the prompts for each interval.")
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(0.95, description="Coverage of each interval.")


class RoundsSection(Section):
    """Rounds of sampling from both arms, labelling, and training further. `rounds: 3` is short for `number: 3`."""

    number: PositiveInt = Field(2, description="Rounds of training; the first is a run without this section.")
    prompts: PositiveInt | None = Field(
        None, description="Training prompts that each arm's policy answers in a round; null takes all of them."
    )
    samples_per_prompt: Annotated[int, Field(ge=2)] = Field(
        2, description="Responses that an arm's policy samples for each of these prompts; every two are compared."
    )
    temperature: PositiveFloat = Field(1.0, description="Temperature of these samples.")
    labels: str = Field(
        "gold",
        description="What compares them: gold, rm:MODEL, python:module:function, llm:MODEL or openai:MODEL@BASE_URL.",
    )
    principles: str | None = Field(
        None,
        description="Principles that a language model compares by: hhh (shipped), or a file with one on each line or a "
        "YAML list. One is drawn for each comparison.",
    )
    label_budget: PositiveInt | None = Field(
        None,
        description="Most comparisons that are labelled for each arm in a round; null labels all. Both arms get the "
        "same number.",
    )
    judge: JudgeSettings = Field(default_factory=JudgeSettings, description="Options where a language model labels.")


# Values of a setting to try: a list of them, or a range that is drawn from.
Scalar = bool | int | float | str | None
Range = dict[Literal["uniform", "log_uniform"], Annotated[list[float], Field(min_length=2, max_length=2)]]
SearchSpace = dict[str, list[Scalar] | Range]


class Budget(Section):
    """What each trial may spend on training. The reward model's training counts to RM + PPO."""

    tokens: PositiveInt | None = Field(
        None, description="Response tokens that a trial trains on; each pass over a token counts."
    )
    seconds: PositiveFloat | None = Field(None, description="Seconds of wall time that a trial trains for.")


class StudySection(Section):
    """What `duel study` does with the recipe: seeds, trials of each arm, selection, verdict."""

    seeds: PositiveInt = Field(3, description="Number of seeds of each trial: seed, seed + 1, ...")
    trials: PositiveInt = Field(4, description="Settings that each arm tries.")
    ppo: SearchSpace = Field(
        default_factory=dict,
        description="Search space of RM + PPO: setting of `ppo` (or `reward_model.NAME`) -> a list of values, "
        "{uniform: [LOW, HIGH]} or {log_uniform: [LOW, HIGH]}.",
    )
    dpo: SearchSpace = Field(default_factory=dict, description="Search space of DPO: setting of `dpo` -> values.")
    budget: Budget = Field(
        default_factory=Budget,
        description="The same for both arms. Without either, each trial is as long as its arm's section says.",
    )
    dev_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5, description="Share of the held-out prompts that are dev prompts, which select; the others test."
    )
    select_by: str | None = Field(
        None,
        description="Judge of `evaluate.judges` that ranks settings and checkpoints on dev prompts; rm ranks by the "
        "reward model. null takes all judges that no arm was trained on.",
    )
    kl_limit: PositiveFloat | None = Field(
        None, description="Only policies whose KL on dev prompts is at most this (nats per response) can be chosen."
    )
    kl_grid: list[PositiveFloat] | None = Field(
        None, description="KLs of the curve at equal KL; null takes 25 points of the range that both arms cover."
    )
    controls: list[Literal["rloo", "online_dpo", "online_dpo_gold", "length_only", "more_prompts"]] = Field(
        default_factory=list,
        description="Further arms, with the chosen settings, that say where a difference comes from: rloo (PPO without "
        "a critic), online_dpo (DPO on its own samples, labelled by the reward model), online_dpo_gold (labelled by "
        "the selecting judge), length_only (PPO for length), more_prompts (PPO on further prompts).",
    )
    more_prompts: str | None = Field(None, description="File of the further prompts of the control more_prompts.")
    retries: NonNegativeInt = Field(1, description="How often a trial that died is tried again.")


class ReportSection(Section):
    title: str | None = Field(
        None, description="Title of the page; null names data, model and seed, which stand below any other title."
    )
    max_samples: PositiveInt = Field(
        500,
        description="Largest number of held-out prompts whose samples are shown; fewer where the page would pass 6 MB.",
    )


class Recipe(Section):
    name: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its folder.")
    ]
    seed: Seed = Field(0, description="Seed of splits, new heads, the order of the data, and samples.")
    report_to: list[Literal["wandb", "trackio", "tensorboard"]] = Field(
        default_factory=list, description="Services that get the training stages' numbers, too. They change no result."
    )
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    sft: SftSection = Field(default_factory=SftSection)
    reward_model: RewardModelSection = Field(default_factory=RewardModelSection)
    ppo: PpoSection = Field(default_factory=PpoSection)
    dpo: DpoSection = Field(default_factory=DpoSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    report: ReportSection = Field(default_factory=ReportSection)
    rft: RftSection | None = Field(
        None,
        description="Rejection-sampling fine-tuning of SFT as a third policy to compare with; null leaves it out. `{}` "
        "takes the defaults.",
    )
    rounds: RoundsSection | None = Field(
        None,
        description="Further rounds of sampling, labelling and training; null trains each arm once. `rounds: 3` takes "
        "the defaults.",
    )
    study: StudySection | None = Field(None, description="For `duel study`; `duel run` leaves it out.")

    @property
    def data_seed(self) -> int:
        """The seed of the split into training and held-out prompts."""
        return self.seed if self.data.split_seed is None else self.data.split_seed


def flat(recipe: Recipe) -> dict[str, object]:
    """Dotted key -> value of every setting; a list, a mapping of columns and a null section are one value each."""
    return {".".join(keys): value for keys, value in leaves(recipe)}


def leaves(section: Section, above: Keys = ()) -> Iterator[tuple[Keys, object]]:
    """Every setting of a section and of those below it, by its key path below ``above``."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, (*above, name))
        else:
            yield (*above, name), value
