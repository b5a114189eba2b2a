"""``duel push``: the models and the data of a run as repositories that stand alone, with filled cards.

A policy is whole (its adapter merged in fp32, then rounded to the run's precision: the weights that were sampled) and
loads with ``AutoModelForCausalLM``; the reward model with ``AutoModelForSequenceClassification``, in fp32, since its
scores are compared by their differences. The data is in TRL's preference format, and as it was read beside it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import DatasetCardData, EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from toolkit.errors import RecipeError, StoreError, nearest
from toolkit.files import atomic_write, copy_whole, is_hub_id, read_json, write_table, write_text
from toolkit.models.encoding import is_conversation, text_encoder
from toolkit.models.inspect import DTYPES
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.resolve import REWARD_HEAD_FILE, TRAINING_RECORD_FILE, resolve
from toolkit.models.save import merge_and_save, reward_mean
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.reading import from_parquet
from toolkit.preferences.rows import PreferenceRow, row_to_dict
from toolkit.progress import Reporter
from toolkit.recipe.schema import ModelSection
from toolkit.report.numbers import interval, number, percent
from toolkit.runs.store import MANIFEST_FILE, RESULTS_FILE, read_document

# What the hub's HTTP client raises, and the hub lets through: of httpx in huggingface_hub 1, of httpx2 in 2.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
CARDS = Path(__file__).parent / "cards"
STAGE_OF = {"sft": "sft", "ppo": "ppo", "dpo": "dpo", "reward-model": "reward_model"}
POLICY_OF = {"sft": "sft", "ppo": "rm_ppo", "dpo": "dpo"}
PARTS = (*STAGE_OF, "preferences")
TITLES = {"sft": "SFT policy", "ppo": "RM + PPO policy", "dpo": "DPO policy", "reward-model": "reward model"}


@dataclass(frozen=True)
class Source:
    """A finished run, as the cards need it."""

    folder: Path
    manifest: dict[str, Any]
    results: dict[str, Any]
    recipe_text: str

    @property
    def section(self) -> ModelSection:
        return ModelSection.model_validate(self.manifest["recipe"]["model"])


def push_run(
    folder: Path, name: str | None, *, to: Path | None, parts: Sequence[str], public: bool, reporter: Reporter
) -> dict[str, str]:
    """Part -> where it is now: a folder below ``to``, or the address of the repository ``name-part``.

    Raises RecipeError for names that cannot be, StoreError for an unfinished run, a folder that is taken, or a hub that
    refuses or cannot be reached.
    """
    if (name is None) == (to is None):
        raise RecipeError(
            "say where to push", where="duel push", fix="name USER/NAME on the hub, or a folder with --to"
        )
    if name is not None and not is_hub_id(name):
        raise RecipeError(f"{name!r} is no repository", where="NAME", fix="write it as USER/NAME")
    for part in parts:
        if part not in PARTS:
            raise RecipeError(f"a run has no part {part!r}", where="--only", fix=nearest(part, PARTS))
    source = read_source(folder)
    chosen = [part for part in PARTS if part in (parts or PARTS)]
    if to is not None:
        for part in chosen:
            if (to / part).exists():
                raise StoreError("the folder exists", where=str(to / part), fix="choose another --to, or move it away")
        return {part: str(made) for part, made in _make_all(source, chosen, to, None, reporter)}
    with tempfile.TemporaryDirectory() as scratch:
        made_parts = _make_all(source, chosen, Path(scratch), name, reporter)
        return {part: _send(made, f"{name}-{part}", part, public, reporter) for part, made in made_parts}


def read_source(folder: Path) -> Source:
    """Raises StoreError where the folder holds no finished run."""
    manifest_path, results_path = folder / MANIFEST_FILE, folder / RESULTS_FILE
    if not manifest_path.is_file() or not results_path.is_file():
        raise StoreError(
            "there is no finished run to push", where=str(folder), fix="finish it first: duel run RECIPE --out DIR"
        )
    manifest = read_document(manifest_path)
    if "evaluate" not in manifest["stages"]:
        raise StoreError("this run was not evaluated as it is now", where=str(folder), fix="run its recipe again")
    text = (folder / "recipe.resolved.yaml").read_text(encoding="utf-8")
    return Source(folder, manifest, read_document(results_path), text)


def _make_all(
    source: Source, parts: Sequence[str], root: Path, name: str | None, reporter: Reporter
) -> Iterator[tuple[str, Path]]:
    """Each part with its folder, whole: an interrupted one leaves none."""
    for part in parts:
        reporter.line(f"{part}: writing")
        with atomic_write(root / part) as partial:
            partial.mkdir(parents=True)
            make_data(source, partial, name) if part == "preferences" else make_model(source, part, partial, name)
        yield part, root / part


# ---------------------------------------------------------------- models


def make_model(source: Source, part: str, out: Path, name: str | None) -> None:
    """A whole model with its tokenizer and card in ``out``."""
    folder = source.folder / STAGE_OF[part] / "model"
    ref, section = resolve(str(folder)), source.section
    tokenizer = load_tokenizer(ref)
    if part == "reward-model":
        reward = load_reward_model(ref, section, dtype=torch.float32)
        merge_and_save(reward, tokenizer, out, torch.float32)
    elif ref.kind == "adapter":
        dtype = DTYPES[section.dtype]
        merge_and_save(load_policy(ref, section, dtype=dtype), tokenizer, out, dtype)
    else:
        shutil.copytree(folder, out, dirs_exist_ok=True)
    for file in (REWARD_HEAD_FILE, TRAINING_RECORD_FILE):
        if (folder / file).is_file():
            copy_whole(folder / file, out / file)
    rows = from_parquet(source.folder / "data" / "eval.parquet")
    encoder = text_encoder(tokenizer, rows[0].prompt, ref.spec)
    end = str(tokenizer.convert_ids_to_tokens(encoder.end_id))
    write_text(out / "README.md", model_card(source, part, name, end=end, conversational=encoder.conversational))


def model_card(source: Source, part: str, name: str | None, *, end: str, conversational: bool) -> str:
    """The card: what the model is, its numbers with intervals, how to load it, what made it."""
    recipe, results = source.manifest["recipe"], source.results
    repository = f"{name}-{part}" if name else part
    measured = _reward_measures(results) if part == "reward-model" else _policy_measures(results, POLICY_OF[part])
    section = {"reward-model": "reward_model"}.get(part, part)
    data = _hub_id(recipe["data"]["source"]) or (f"{name}-preferences" if name else None)
    facts = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification" if part == "reward-model" else "text-generation",
        tags=["rlhf", "preference-optimization", "duel", part],
        base_model=f"{name}-sft" if name and part != "sft" else _hub_id(recipe["model"]["name"]),
        datasets=[data] if data else None,
        model_name=repository,
        eval_results=[
            EvalResult(
                task_type="text-classification" if part == "reward-model" else "text-generation",
                dataset_type=recipe["data"]["source"],
                dataset_name=f"{recipe['data']['source']}, held-out prompts",
                metric_type=measure.kind,
                metric_name=f"{measure.label} ({measure.interval})" if measure.interval else measure.label,
                metric_value=measure.value,
            )
            for measure in measured
        ],
    )
    return _render(
        "model.md.j2",
        facts=facts.to_yaml(),
        repository=repository,
        part=part,
        title=TITLES[part],
        measured=measured,
        results=results,
        recipe=recipe,
        settings=recipe[section],
        recipe_text=source.recipe_text,
        end=end,
        conversational=conversational,
        mean=reward_mean(source.folder / "reward_model" / "model"),
        manifest=source.manifest,
    )


@dataclass(frozen=True)
class Measure:
    """A number of a card. ``text`` and ``interval`` are as people read them."""

    kind: str
    label: str
    value: float
    text: str
    interval: str


def _measure(kind: str, label: str, found: Mapping[str, Any], *, rate: bool, value: str = "value") -> list[Measure]:
    if found.get(value) is None:
        return []
    form = percent if rate else number
    low, high = found.get("ci_low"), found.get("ci_high")
    between = interval(low, high, form) if low is not None and high is not None else ""
    return [Measure(kind, label, round(found[value], 6), form(found[value]), between)]


def _policy_measures(results: Mapping[str, Any], policy: str) -> list[Measure]:
    row = next(row for row in results["policies"] if row["policy"] == policy)
    out = []
    for rate in results["win_rates"]:
        if rate["policy"] == policy and "@" not in rate["baseline"]:
            label = f"win rate over {rate['baseline']}, judge {rate['judge']}, {rate['n_judged']} prompts"
            out += _measure("win_rate", label, rate, rate=True, value="win_rate")
    for key, label in (("gold_reward", "gold reward"), ("explicit_reward", "reward model's score")):
        out += _measure(key, label, row[key], rate=False)
    kl = {"value": row["kl_nats"], "ci_low": row["kl_ci_low"], "ci_high": row["kl_ci_high"]}
    out += _measure("kl_nats", "KL to SFT, nats per response", kl, rate=False)
    out += _measure("length_tokens", "response length, tokens", row["length_tokens"], rate=False)
    return out + _measure("eos_rate", "share that ends by itself", row["eos_rate"], rate=True)


def _reward_measures(results: Mapping[str, Any]) -> list[Measure]:
    found = results["rm_quality"].get("explicit") or {}
    out = []
    for key, label, rate in (
        ("accuracy", "accuracy on held-out comparisons", True),
        ("accuracy_preferred_longer", "accuracy where the longer one is preferred", True),
        ("accuracy_preferred_shorter", "accuracy where the shorter one is preferred", True),
        ("length_spearman", "rank correlation of score and length within prompts", False),
    ):
        out += _measure(key, label, found.get(key) or {}, rate=rate)
    for key, label in (("nll", "log loss, nats"), ("ece", "expected calibration error")):
        out += _measure(key, label, {"value": found.get(key)}, rate=False)
    return out


def _hub_id(name: str) -> str | None:
    """The name where it is one on the hub: cards may link to nothing else."""
    return name if is_hub_id(name) and not Path(name).exists() else None


# ---------------------------------------------------------------- data


def trl_pairs(rows: Sequence[PreferenceRow]) -> list[dict[str, Any]]:
    """TRL's preference format, one row for each compared pair that has a winner.

    Text stays text; messages become messages on both sides, an explicit prompt apart. ``agreement`` is the share of
    the pair's weight that sides with chosen, above one half.
    """
    out = []
    for row in rows:
        for pair in splits.pairs(row):
            if pair.p == 0.5:
                continue
            better, worse = (pair.i, pair.j) if pair.p > 0.5 else (pair.j, pair.i)
            sides = [row.responses[k] for k in (better, worse)]
            if is_conversation(row.prompt):
                chosen, rejected = ([{"role": "assistant", "content": text}] for text in sides)
            else:
                chosen, rejected = sides  # type: ignore[assignment]
            agreement = max(pair.p, 1 - pair.p)
            out.append({"prompt": row.prompt, "chosen": chosen, "rejected": rejected, "agreement": agreement})
    return out


def make_data(source: Source, out: Path, name: str | None) -> None:
    """Both splits in TRL's preference format and in the format with K responses, with a card."""
    counts = {}
    for split, file in (("train", "train.parquet"), ("test", "eval.parquet")):
        rows = from_parquet(source.folder / "data" / file)
        pairs = trl_pairs(rows)
        if not pairs:
            raise StoreError("no comparison has a winner", where=str(source.folder / "data" / file))
        (out / "pairs").mkdir(exist_ok=True)
        (out / "ranked").mkdir(exist_ok=True)
        write_table(pairs, out / "pairs" / f"{split}.parquet")
        write_table([row_to_dict(row) for row in rows], out / "ranked" / f"{split}.parquet")
        counts[split] = {"prompts": len(rows), "pairs": len(pairs)}
    configs = [
        {
            "config_name": config,
            "data_files": [{"split": split, "path": f"{config}/{split}.parquet"} for split in counts],
            **({"default": True} if config == "pairs" else {}),
        }
        for config in ("pairs", "ranked")
    ]
    facts = DatasetCardData(tags=["preference", "trl", "duel"], configs=configs)
    report = read_json(source.folder / "data" / "report.json")
    repository = f"{name}-preferences" if name else "preferences"
    card = _render("preferences.md.j2", facts=facts.to_yaml(), repository=repository, counts=counts, report=report)
    write_text(out / "README.md", card)


# ---------------------------------------------------------------- the hub


def _send(folder: Path, repository: str, part: str, public: bool, reporter: Reporter) -> str:
    api, kind = HfApi(), "dataset" if part == "preferences" else "model"
    reporter.line(f"{part}: sending to {repository}")
    try:
        api.create_repo(repository, repo_type=kind, private=not public, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, repo_type=kind, folder_path=folder, commit_message=f"{part} of a paired run by duel"
        )
    except LocalTokenNotFoundError as error:
        raise StoreError("you are not logged in to the hub", where=repository, fix="hf auth login") from error
    except HfHubHTTPError as error:
        first = str(error).strip().splitlines()[0]
        fix = "check your token (hf auth whoami) and that you may write there"
        raise StoreError(f"the hub refused: {first}", where=repository, fix=fix) from error
    except HTTP_ERROR as error:
        raise StoreError(f"the hub cannot be reached: {error}", where=api.endpoint, fix="or write with --to") from error
    return str(done.repo_url)


def _render(template: str, **facts: Any) -> str:
    # Markdown, not HTML: what is filled in are our own names and numbers, and paths of the recipe inside code blocks.
    loader = jinja2.FileSystemLoader(CARDS)
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**facts) + "\n"
