"""What each stage may read of a recipe: a frozen dataclass of its settings and no others.

A stage's key is made from the fields of its context, so that a setting outside the key cannot be read. A context is
shaped like the recipe, with the other settings left out: ``context.data.max_response_tokens`` is the recipe's
``data.max_response_tokens``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter

from toolkit.recipe.rounds import kind_of, round_of, seed_of_round
from toolkit.recipe.schema import DataSection, EvaluateSection, JudgeSettings, Recipe, ReportSection, leaves
from toolkit.recipe.section import Section
from toolkit.recipe.training import DpoSection, ModelSection, PpoSection, RewardModelSection, RftSection, SftSection


@dataclass(frozen=True)
class TokenizerSettings:
    """Of ``model``, what turns text into ids."""

    name: str
    revision: str | None
    chat_template: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class ResponseLimit:
    """Of ``data``, how long a response may be."""

    max_response_tokens: int


@dataclass(frozen=True)
class TextLimits(ResponseLimit):
    """Of ``data``, how long prompts and responses may be."""

    max_prompt_tokens: int


@dataclass(frozen=True)
class SftSwitch:
    """Of ``sft``, whether the arms start from a policy that was fine-tuned here."""

    enabled: bool


@dataclass(frozen=True)
class ImitatedResponses:
    """Of ``sft``, which responses it imitates."""

    train_on: str


@dataclass(frozen=True)
class StepSource:
    """Of ``reward_model``, whether it learns from labelled steps, and from which."""

    kind: str
    steps: str | None


@dataclass(frozen=True)
class LabelSettings:
    """Of ``rounds``, how one round labels: their number is no part of it, so that a further one changes no other."""

    prompts: int | None
    samples_per_prompt: int
    temperature: float
    labels: str
    principles: str | None
    label_budget: int | None
    judge: JudgeSettings


@dataclass(frozen=True)
class DataContext:
    data_seed: int
    data: DataSection
    model: TokenizerSettings
    reward_model: StepSource


@dataclass(frozen=True)
class ModelContext:
    """What every stage that loads a model reads."""

    seed: int
    model: ModelSection
    data: ResponseLimit


@dataclass(frozen=True)
class SftContext(ModelContext):
    sft: SftSection


@dataclass(frozen=True)
class RewardModelContext(ModelContext):
    reward_model: RewardModelSection


@dataclass(frozen=True)
class PpoContext(ModelContext):
    data: TextLimits  # further prompts have the same limit as those of the data
    sft: ImitatedResponses
    ppo: PpoSection


@dataclass(frozen=True)
class DpoContext(ModelContext):
    dpo: DpoSection


@dataclass(frozen=True)
class RftContext(ModelContext):
    rft: RftSection


@dataclass(frozen=True)
class LabelsContext(ModelContext):
    rounds: LabelSettings


@dataclass(frozen=True)
class EvaluateContext(ModelContext):
    sft: SftSwitch
    evaluate: EvaluateSection


@dataclass(frozen=True)
class ReportContext:
    name: str
    report: ReportSection


Context = DataContext | ModelContext | ReportContext
CONTEXTS: dict[str, type[Context]] = {
    "data": DataContext,
    "sft": SftContext,
    "reward_model": RewardModelContext,
    "ppo": PpoContext,
    "dpo": DpoContext,
    "labels": LabelsContext,
    "rft": RftContext,
    "evaluate": EvaluateContext,
    "report": ReportContext,
}
T = TypeVar("T")


def context_of(stage: str, recipe: Recipe) -> Context:
    """The context of a stage, from the settings of a recipe. Each round has its own seed."""
    seed = seed_of_round(recipe.seed, round_of(stage))
    return _narrowed(CONTEXTS[kind_of(stage)], recipe.model_copy(update={"seed": seed}))


def _narrowed(kind: type[T], settings: Any) -> T:
    """A ``kind`` with those values of ``settings`` that its fields name."""
    values = {}
    for name, hint in get_type_hints(kind).items():
        value = getattr(settings, name)
        values[name] = _narrowed(hint, value) if isinstance(hint, type) and is_dataclass(hint) else value
    return kind(**values)


def settings_of(context: Any) -> dict[str, object]:
    """Dotted name of the recipe -> value, of every setting that a context holds.

    >>> limit = ResponseLimit(max_response_tokens=40)
    >>> settings_of(ModelContext(seed=3, model=ModelSection(name="tiny", lora=None), data=limit))["model.name"]
    'tiny'
    """
    settings: dict[str, object] = {}
    for field in fields(context):
        value = getattr(context, field.name)
        if isinstance(value, Section):
            settings |= {".".join(keys): leaf for keys, leaf in leaves(value, (field.name,))}
        elif is_dataclass(value):
            settings |= {f"{field.name}.{name}": leaf for name, leaf in settings_of(value).items()}
        else:
            settings[field.name] = value
    return settings


def to_json(context: Context) -> dict[str, Any]:
    """The context as JSON's types."""
    return dict(TypeAdapter(type(context)).dump_python(context, mode="json"))


def from_json(stage: str, values: Mapping[str, Any]) -> Context:
    """The context of a stage, as :func:`to_json` wrote it."""
    return TypeAdapter(CONTEXTS[kind_of(stage)]).validate_python(values)
