"""One evaluation for every policy: the same held-out prompts, the same sampling, the same scores.

Writes tables (``samples.parquet``, ``rewards.parquet``, ``judgements.parquet``); what they say, with intervals, is
computed from them by ``evals/summary.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.errors import RecipeError
from toolkit.evals import summary
from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.training_signals import TRAINING_SIGNALS
from toolkit.files import read_json, read_table, write_json, write_table
from toolkit.judging import win_rates
from toolkit.judging.judge import ask_judges, name_training_signals
from toolkit.judging.llm import Usage
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, write_judgements
from toolkit.judging.responses import PolicyResponses
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.inspect import DTYPES, best_device
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.resolve import ModelRef, resolve, training_record
from toolkit.models.save import reward_mean
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.gold import gold_rewards
from toolkit.preferences.reading import from_parquet
from toolkit.preferences.rows import PreferenceRow, readable
from toolkit.progress import Reporter
from toolkit.recipe.schema import EvaluateSection
from toolkit.stages.contexts import EvaluateContext

Row = dict[str, Any]


@dataclass(frozen=True)
class Policy:
    """A policy to sample. ``kind`` is base, sft, checkpoint or final."""

    name: str
    arm: str
    kind: str
    step: int
    ref: ModelRef
    n_samples: int


@dataclass(frozen=True)
class Setting:
    """What all policies share."""

    rows: list[PreferenceRow]
    prompts: list[list[int]]
    encoder: TextEncoder
    section: EvaluateSection
    model: Any
    max_new_tokens: int
    max_response_tokens: int
    seed: int

    @property
    def dtype(self) -> Any:
        return DTYPES[self.model.dtype]

    def engine(self, model: Any) -> Engine:
        return Engine(
            model, int(self.encoder.tokenizer.pad_token_id), dtype=self.dtype, token_budget=self.section.token_budget
        )


def run(context: EvaluateContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes the three tables and ``evaluation.json``: the run's ``results.json`` without recipe and cost."""
    section: EvaluateSection = context.evaluate
    rows = from_parquet(inputs["data"] / "eval.parquet")
    sft = resolve(str(inputs["sft"] / "model"))
    encoder = text_encoder(load_tokenizer(sft), rows[0].prompt, sft.spec)
    setting = Setting(
        rows=rows,
        prompts=[encoder.prompt(row.prompt) for row in rows],
        encoder=encoder,
        section=section,
        model=context.model,
        max_new_tokens=section.max_new_tokens or context.data.max_response_tokens,
        max_response_tokens=context.data.max_response_tokens,
        seed=context.seed,
    )
    warnings: list[str] = []
    policies = find_policies(context, inputs, sft)
    parts = out / "policies"
    parts.mkdir(exist_ok=True)
    for policy in policies:
        path = parts / f"{policy.name}.parquet"
        if not path.is_file():  # an interrupted evaluation keeps the policies that it has sampled
            write_table(sample_policy(policy, setting, reporter), path)
    samples = [row for policy in policies for row in read_table(parts / f"{policy.name}.parquet")]

    implicit_beta = training_record(resolve(str(inputs["dpo"] / "model")))["beta"]
    scored = score_everything(samples, setting, inputs, sft, reporter)
    rewards = heldout_rewards(setting, inputs, scored["heldout"], implicit_beta)
    for row, reference, implicit, reward in zip(samples, *scored["samples"], strict=True):
        tempered = row.pop("reference_logp_t")
        if row["policy_logp"] is None:
            row["policy_logp"] = tempered if row["kind"] == "sft" else implicit
        row["kl_nats"] = row["policy_logp"] - tempered
        row["implicit_reward"] = implicit_beta * (implicit - reference)
        row["explicit_reward"] = reward
    has_gold = all(row.gold is not None for row in rows)
    if has_gold and not gold_agrees(rows):
        has_gold = False
        warnings.append("the data's gold rewards are not those of the shipped gold reward: gold is left out")
    prompt_of = {row.prompt_id: row.prompt for row in rows}
    for row in samples:
        row["gold_reward"] = gold_rewards([prompt_of[row["prompt_id"]]], [row["response"]])[0] if has_gold else None
    samples = [row for row in samples if row["sample_index"] < section.samples_per_prompt] + best_of_n(samples, section)

    chosen_judges = section.judges or (["gold"] if has_gold else list(TRAINING_SIGNALS))
    names = [policy.name for policy in policies] + sorted(
        {row["policy"] for row in samples if row["kind"] == "best_of_n"}
    )
    models = {name: resolve(str(inputs[name] / "model")).fingerprint for name in ("reward_model", "dpo", "sft")}
    signals = {"rm": [models["reward_model"]], "implicit": [models["dpo"], models["sft"]]}
    chosen_judges, renamed = name_training_signals(chosen_judges, signals)
    warnings += renamed
    if "gold" in chosen_judges and not has_gold:
        raise RecipeError("the data has no gold reward", where="evaluate.judges", fix="name another judge")
    judgements, usage = judge_all(chosen_judges, samples, names, setting, reporter)
    write_table(samples, out / "samples.parquet")
    write_table(rewards, out / "rewards.parquet")
    write_judgements(judgements, out / "judgements.parquet")
    write_json(out / "data_report.json", read_json(inputs["data"] / "report.json"))
    comparisons = [(p, pair.i, pair.j, pair.p, pair.weight) for p, row in enumerate(rows) for pair in splits.pairs(row)]
    options: BootstrapOptions = {
        "n_resamples": section.bootstrap,
        "confidence": section.confidence,
        "seed": context.seed,
    }
    judged = win_rates.report(judgements, controls=win_rates.RECORDED_CONTROLS, **options)
    write_json(out / "judging.json", {name: judged[name] for name in ("bradley_terry", "judge_agreement")})
    result = summary.summarise(
        samples,
        rewards,
        judged["win_rates"],
        comparisons,
        best_of_n=section.best_of_n,
        options=options,
        warnings=warnings,
    )
    result["judge_usage"] = [asdict(part) for part in usage]  # the pipeline adds it to the cost
    write_json(out / "evaluation.json", result)
    reporter.line(result["verdict"]["sentence"])
    scored_tokens = 4 * sum(row["n_tokens"] for row in samples)
    return {"tokens": scored_tokens + sum(row["n_tokens"] for row in samples), "n_samples": len(samples)}


def find_policies(context: EvaluateContext, inputs: dict[str, Path], sft: ModelRef) -> list[Policy]:
    """base, sft, and both arms with their checkpoints in the order of training."""
    section: EvaluateSection = context.evaluate
    n = section.samples_per_prompt
    found = []
    if context.sft.enabled:
        base = resolve(context.model.name, context.model.revision)
        found.append(Policy("base", "base", "base", 0, base, n))
    found.append(Policy("sft", "sft", "sft", 0, sft, n + section.best_of_n))
    for arm, stage in (("rm_ppo", "ppo"), ("dpo", "dpo")):
        final = resolve(str(inputs[stage] / "model"))
        kept = sorted((inputs[stage] / "checkpoints").glob("step-*")) if section.checkpoints else []
        for folder in sorted(kept, key=lambda path: int(path.name.split("-")[1])):
            ref = resolve(str(folder))
            step = training_record(ref)["step"]
            found.append(Policy(f"{arm}@{step}", arm, "checkpoint", step, ref, n))
        found.append(Policy(arm, arm, "final", training_record(final)["step"], final, n))
    return found


def sample_policy(policy: Policy, setting: Setting, reporter: Reporter) -> list[Row]:
    """Sample a policy on every held-out prompt, and score the samples under itself at the sampling temperature."""
    section = setting.section
    model = load_policy(policy.ref, setting.model).to(best_device())
    with reporter.task(f"sample {policy.name}", len(setting.rows) * policy.n_samples) as task:
        grouped = sample_responses(
            model,
            setting.encoder.tokenizer,
            setting.prompts,
            lambda i, k: (setting.seed, "evaluate", policy.name, setting.rows[i].prompt_id, k),
            SamplingParams(setting.max_new_tokens, section.temperature, policy.n_samples, section.batch_size),
            dtype=setting.dtype,
            advance=task.advance,
        )
    trees = [Tree(ids, [s.ids for s in group]) for ids, group in zip(setting.prompts, grouped, strict=True)]
    # Everything is scored under SFT, the reference, and under the DPO policy later: once is enough.
    later = policy.kind == "sft" or (policy.name == "dpo" and section.temperature == 1.0)
    logps = None if later else setting.engine(model).logps(trees, temperature=section.temperature)
    out = []
    for i, (row, group) in enumerate(zip(setting.rows, grouped, strict=True)):
        for k, sample in enumerate(group):
            out.append(
                {
                    "prompt_id": row.prompt_id,
                    "policy": policy.name,
                    "arm": policy.arm,
                    "kind": policy.kind,
                    "step": policy.step,
                    "sample_index": k,
                    "prompt": readable(row.prompt),
                    "response": setting.encoder.decode(sample.ids),
                    "response_ids": sample.ids,
                    "n_tokens": len(sample.ids),
                    "truncated": sample.truncated,
                    "policy_logp": float(logps[i][k].double().sum()) if logps is not None else None,
                }
            )
    return out


def score_everything(
    samples: list[Row], setting: Setting, inputs: dict[str, Path], sft: ModelRef, reporter: Reporter
) -> dict[str, Any]:
    """Reference log-probability, DPO log-probability and explicit reward of all samples and all held-out responses.

    One tree per prompt holds every policy's samples and the data's responses, so that a prompt is computed once.
    """
    by_prompt: dict[str, list[int]] = {row.prompt_id: [] for row in setting.rows}
    for index, row in enumerate(samples):
        by_prompt[row["prompt_id"]].append(index)
    held_out = [setting.encoder.encode(r.prompt, r.responses, setting.max_response_tokens) for r in setting.rows]
    trees = [
        Tree(ids, [*encoded.tree.response_ids, *(samples[i]["response_ids"] for i in by_prompt[row.prompt_id])])
        for ids, row, encoded in zip(setting.prompts, setting.rows, held_out, strict=True)
    ]

    n_responses = sum(len(tree.response_ids) for tree in trees)

    def sums(model: Any, label: str, temperature: float) -> list[list[float]]:
        with reporter.task(label, n_responses) as task:
            logps = setting.engine(model).logps(trees, temperature=temperature, advance=task.advance)
        return [[float(t.double().sum()) for t in responses] for responses in logps]

    columns: list[list[list[float]]] = []
    reference_model = load_policy(sft, setting.model).to(best_device())
    columns.append(sums(reference_model, "score under the reference", 1.0))
    tempered = columns[0]
    if setting.section.temperature != 1.0:
        tempered = sums(
            reference_model, "score under the reference, at the sampling temperature", setting.section.temperature
        )
    del reference_model
    gc.collect()
    dpo = load_policy(resolve(str(inputs["dpo"] / "model")), setting.model).to(best_device())
    columns.append(sums(dpo, "implicit rewards", 1.0))
    del dpo
    gc.collect()
    reward_ref = resolve(str(inputs["reward_model"] / "model"))
    reward_model = load_reward_model(reward_ref, setting.model).to(best_device())
    mean = reward_mean(reward_ref.path)
    with reporter.task("explicit rewards", n_responses) as task:
        scores = setting.engine(reward_model).scores(trees, advance=task.advance)
    columns.append([[value - mean for value in values] for values in scores])

    out: list[list[float]] = [[0.0] * len(samples) for _ in columns]
    for prompt, row in enumerate(setting.rows):
        first = len(row.responses)
        for k, index in enumerate(by_prompt[row.prompt_id]):
            for column, values in zip(out, columns, strict=True):
                column[index] = values[prompt][first + k]
            samples[index]["reference_logp_t"] = tempered[prompt][first + k]
    heldout_columns = [
        [values[prompt][: len(row.responses)] for prompt, row in enumerate(setting.rows)] for values in columns
    ]
    return {"samples": out, "heldout": (*heldout_columns, held_out)}


def heldout_rewards(setting: Setting, inputs: dict[str, Path], scored: tuple[Any, ...], beta: float) -> list[Row]:
    """One row per held-out response of the data, as ``duel rewards --rm`` writes it."""
    reference, policy, explicit, encoded = scored
    out = []
    for prompt, row in enumerate(setting.rows):
        for k, text in enumerate(row.responses):
            n_tokens = len(encoded[prompt].tree.response_ids[k])
            implicit = beta * (policy[prompt][k] - reference[prompt][k])
            out.append(
                {
                    "prompt_id": row.prompt_id,
                    "response_index": k,
                    "response": text,
                    "n_tokens": n_tokens,
                    "policy_logp": policy[prompt][k],
                    "reference_logp": reference[prompt][k],
                    "implicit_reward": implicit,
                    "implicit_reward_mean": implicit / n_tokens,
                    "explicit_reward": explicit[prompt][k],
                    "gold_reward": row.gold[k] if row.gold is not None else None,
                    "truncated": encoded[prompt].truncated[k],
                }
            )
    return out


def gold_agrees(rows: Sequence[PreferenceRow]) -> bool:
    """Whether the data's gold is the reward that we can compute for new samples."""
    for row in rows[:20]:
        assert row.gold is not None
        ours = gold_rewards([row.prompt] * len(row.responses), row.responses)
        if any(abs(a - b) > 1e-3 for a, b in zip(ours, row.gold, strict=True)):
            return False
    return True


def best_of_n(samples: Sequence[Row], section: EvaluateSection) -> list[Row]:
    """The best of n further SFT samples by the explicit and by the implicit reward, as policies of their own.

    Their samples are not those of the ``sft`` policy, so that both are independent draws.
    """
    n, first = section.best_of_n, section.samples_per_prompt
    pools: dict[str, list[Row]] = {}
    for row in samples:
        if row["policy"] == "sft" and row["sample_index"] >= first:
            pools.setdefault(row["prompt_id"], []).append(row)
    out = []
    for name, column in ((f"best_of_{n}_rm", "explicit_reward"), (f"best_of_{n}_implicit", "implicit_reward")):
        for pool in pools.values():
            best = max(pool, key=lambda row: (row[column], -row["sample_index"]))
            out.append({**best, "policy": name, "arm": name, "kind": "best_of_n", "sample_index": 0})
    return out


def judge_all(
    specs: Sequence[str], samples: Sequence[Row], names: Sequence[str], setting: Setting, reporter: Reporter
) -> tuple[list[Judgement], list[Usage]]:
    """Every policy against SFT, and the arms against each other, by every judge; and what language models took."""
    pairs = [(name, "sft") for name in names if name != "sft"] + [("rm_ppo", "dpo")]
    prompt_ids = [row.prompt_id for row in setting.rows]
    table: dict[tuple[str, str], list[Row]] = {}
    for row in samples:
        table.setdefault((row["policy"], row["prompt_id"]), []).append(row)

    def column(field: str) -> dict[str, list[list[Any]]]:
        return {name: [[row[field] for row in table[name, key]] for key in prompt_ids] for name in names}

    responses = PolicyResponses(prompt_ids, [row.prompt for row in setting.rows], column("response"))
    options = JudgeOptions(
        setting.model,
        setting.section.judge,
        max_response_tokens=max(setting.max_response_tokens, setting.max_new_tokens),
        token_budget=setting.section.token_budget,
    )
    known = {"gold": column("gold_reward"), "rm": column("explicit_reward"), "implicit": column("implicit_reward")}
    return ask_judges(specs, pairs, responses, options, reporter, known_scores=known)
