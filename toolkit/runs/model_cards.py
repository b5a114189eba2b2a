"""The cards of what ``duel push`` sends: what a model or data set is, its numbers with intervals, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from toolkit.files import is_hub_id, read_json
from toolkit.models.reward_head import reward_head
from toolkit.recipe.rounds import kind_of, round_of
from toolkit.recipe.training import ModelSection
from toolkit.report.numbers import interval, number, percent

TEMPLATES = Path(__file__).parent / "cards"
POLICY_OF = {"sft": "sft", "ppo": "rm_ppo", "dpo": "dpo", "rft": "rft"}
TITLES = {
    "sft": "SFT policy",
    "ppo": "RM + PPO policy",
    "dpo": "DPO policy",
    "rft": "policy of rejection-sampling fine-tuning, a baseline",
    "reward-model": "reward model",
}


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as the cards need it."""

    folder: Path
    manifest: dict[str, Any]
    results: dict[str, Any]
    recipe_text: str

    @property
    def model_section(self) -> ModelSection:
        return ModelSection.model_validate(self.manifest["recipe"]["model"])

    def last(self, kind: str) -> Path:
        """The folder of the last stage of this kind: that of the last round."""
        names: list[str] = [name for name in self.manifest["stages"] if kind_of(name) == kind]
        return self.folder / max(names, key=round_of)


@dataclass(frozen=True)
class Measure:
    """A number of a card. ``text`` and ``interval`` are as people read them."""

    kind: str
    label: str
    value: float
    text: str
    interval: str


def model_card(
    run: FinishedRun, artifact: str, name: str | None, *, end: str, conversational: bool, pair: bool = False
) -> str:
    """The card of a model. ``name`` is USER/NAME of the repositories; ``end`` is the token that ends a response.

    ``pair``: it is an encoder, which reads prompt and response as a pair of texts.
    """
    recipe, results = run.manifest["recipe"], run.results
    repository = f"{name}-{artifact}" if name else artifact
    if artifact == "reward-model":
        measures, task, section = reward_measures(results), "text-classification", "reward_model"
    else:
        measures, task, section = policy_measures(results, POLICY_OF[artifact]), "text-generation", artifact
    data = _hub_link(recipe["data"]["source"]) or (f"{name}-preferences" if name else None)
    facts = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["rlhf", "preference-optimization", "duel", artifact],
        base_model=_base_model(recipe, artifact, name),
        datasets=[data] if data else None,
        model_name=repository,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=recipe["data"]["source"],
                dataset_name=f"{recipe['data']['source']}, held-out prompts",
                metric_type=measure.kind,
                metric_name=f"{measure.label} ({measure.interval})" if measure.interval else measure.label,
                metric_value=measure.value,
            )
            for measure in measures
        ],
    )
    return _render(
        "model.md.j2",
        facts=facts.to_yaml(),
        repository=repository,
        artifact=artifact,
        title=TITLES[artifact],
        measures=measures,
        results=results,
        recipe=recipe,
        settings=recipe[section],
        recipe_text=run.recipe_text,
        end=end,
        conversational=conversational,
        head=reward_head(run.last("reward_model") / "model"),
        pair=pair,
        manifest=run.manifest,
    )


def _base_model(recipe: Mapping[str, Any], artifact: str, name: str | None) -> str | None:
    """What a model was trained from, for the hub."""
    if artifact == "reward-model" and recipe["reward_model"].get("base"):
        return _hub_link(recipe["reward_model"]["base"])
    return f"{name}-sft" if name and artifact != "sft" else _hub_link(recipe["model"]["name"])


def data_card(run: FinishedRun, name: str | None, counts: Mapping[str, Mapping[str, int]]) -> str:
    """The card of the preferences. ``counts`` has, for each split, the numbers of prompts and pairs."""
    configs = [
        {
            "config_name": config,
            "data_files": [{"split": split, "path": f"{config}/{split}.parquet"} for split in counts],
            **({"default": True} if config == "pairs" else {}),
        }
        for config in ("pairs", "ranked")
    ]
    facts = DatasetCardData(tags=["preference", "trl", "duel"], configs=configs)
    report = read_json(run.folder / "data" / "report.json")
    repository = f"{name}-preferences" if name else "preferences"
    return _render("preferences.md.j2", facts=facts.to_yaml(), repository=repository, counts=counts, report=report)


def policy_measures(results: Mapping[str, Any], policy: str) -> list[Measure]:
    """Win rates, rewards, KL and lengths of a policy."""
    row = next(row for row in results["policies"] if row["policy"] == policy)
    measures = []
    for rate in results["win_rates"]:
        if rate["policy"] == policy and "@" not in rate["baseline"]:
            label = f"win rate over {rate['baseline']}, judge {rate['judge']}, {rate['n_judged']} prompts"
            measures += _measure("win_rate", label, rate, rate=True, value="win_rate")
    for key, label in (("gold_reward", "gold reward"), ("explicit_reward", "reward model's score")):
        measures += _measure(key, label, row[key], rate=False)
    kl = {"value": row["kl_nats"], "ci_low": row["kl_ci_low"], "ci_high": row["kl_ci_high"]}
    measures += _measure("kl_nats", "KL to SFT, nats per response", kl, rate=False)
    measures += _measure("length_tokens", "response length, tokens", row["length_tokens"], rate=False)
    return measures + _measure("eos_rate", "share that ends by itself", row["eos_rate"], rate=True)


def reward_measures(results: Mapping[str, Any]) -> list[Measure]:
    """Accuracy and calibration of the reward model on held-out comparisons."""
    quality = results["rm_quality"].get("explicit") or {}
    measures = []
    for key, label, rate in (
        ("accuracy", "accuracy on held-out comparisons", True),
        ("accuracy_preferred_longer", "accuracy where the longer one is preferred", True),
        ("accuracy_preferred_shorter", "accuracy where the shorter one is preferred", True),
        ("length_spearman", "rank correlation of score and length within prompts", False),
    ):
        measures += _measure(key, label, quality.get(key) or {}, rate=rate)
    for key, label in (("nll", "log loss, nats"), ("ece", "expected calibration error")):
        measures += _measure(key, label, {"value": quality.get(key)}, rate=False)
    return measures


def _measure(kind: str, label: str, row: Mapping[str, Any], *, rate: bool, value: str = "value") -> list[Measure]:
    """The number of a row with its interval. An empty list where the run does not have it."""
    if row.get(value) is None:
        return []
    form = percent if rate else number
    low, high = row.get("ci_low"), row.get("ci_high")
    between = interval(low, high, form) if low is not None and high is not None else ""
    return [Measure(kind, label, round(row[value], 6), form(row[value]), between)]


def _hub_link(name: str) -> str | None:
    """The name where it is one on the hub: cards can link to nothing else."""
    return name if is_hub_id(name) and not Path(name).exists() else None


def _render(template: str, **facts: Any) -> str:
    # Markdown, not HTML: what is filled in are our own names and numbers, and paths of the recipe inside code blocks.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**facts) + "\n"
