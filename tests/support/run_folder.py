"""A synthetic run folder as the pipeline leaves it: the real summary and the real publishing over made-up tables."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.evals.beside_verdict import complete_verdict
from toolkit.evals.best_of_n import best_of_n_kl
from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.summary import summarise
from toolkit.evals.verdict import BY_DEFAULT
from toolkit.files import read_json, write_json, write_table, write_text
from toolkit.judging import records, scorers, win_rates
from toolkit.judging.ended import where_both_ended
from toolkit.judging.responses import PolicyResponses
from toolkit.preferences.samples import Sample
from toolkit.recipe.arms import Measured, planned_differences
from toolkit.recipe.files import LoadedRecipe, load_recipe, resolved_yaml
from toolkit.runs.pipeline import new_manifest, publish
from toolkit.runs.store import STAGE_FILE, RunFolder

HOSTILE = [
    "<script>window.harmed = 'script'</script>",
    "</script><script>window.harmed = 'closing'</script><!-- <script>",
    "<img src=x onerror=\"window.harmed = 'image'\"> <svg onload=\"window.harmed='svg'\">",
    "{{ 7 * 7 }} {% for x in range(9) %}{{ x }}{% endfor %} {# hidden #} ${7*7}",
    "שלום עולם \u202eמימין לשמאל\u202c and السلام عليكم",
    "w" * 10_000,
    "a\u2028b\u2029c\x00d\u200b]]>&lt;b&gt;&amp;quot; ' \" ` \\u003c/script> İstanbul",
    "",
]
BEST_OF = 4


def write_run(
    folder: Path,
    *,
    gold: bool = True,
    hostile: bool = False,
    n_prompts: int = 24,
    checkpoints: int = 2,
    judge_names: tuple[str, ...] | None = None,
    manifest: bool = True,
    histories: bool = True,
    sets: tuple[str, ...] = (),
    words: int = 12,
    seed: int = 0,
) -> Path:
    """Write a finished run into ``folder`` and return it. Without ``gold`` the judges are the arms' own signals."""
    generator = np.random.default_rng(seed)
    loaded = load_recipe("smoke", [f"evaluate.best_of_n={BEST_OF}", f"seed={seed}", *sets])
    prompt_ids = [f"{k:016x}" for k in range(n_prompts)]
    samples = _samples(generator, prompt_ids, gold, hostile, checkpoints, words)
    rewards, comparisons = _held_out(generator, prompt_ids, gold)
    judged = _judge(samples, prompt_ids, judge_names or (("gold", "rm") if gold else ("rm", "implicit")))
    options: BootstrapOptions = {"n_resamples": 100, "confidence": 0.95, "seed": seed}
    # Hostile texts are alike over all policies: there is no length to control for.
    rates = [asdict(row) for row in win_rates.win_rates(judged, win_rates.Controls(length=not hostile), **options)]
    evaluate = folder / "evaluate"
    evaluate.mkdir(parents=True)
    write_table(samples, evaluate / "samples.parquet")
    write_table(rewards, evaluate / "rewards.parquet")
    write_table([asdict(row) for row in judged], evaluate / "judgements.parquet")
    result = summarise(
        samples, rewards, rates, comparisons, best_of_n=BEST_OF, options=options, warnings=["a <b>warning</b>"]
    )
    drawn = [Sample(**row) for row in samples]
    complete_verdict(result, where_both_ended(judged, drawn, list(result["verdict"]["judges"]), **options), BY_DEFAULT)
    kl_nats = {row["policy"]: row["kl_nats"] for row in result["policies"]}
    measured = Measured((kl_nats["rm_ppo"], kl_nats["dpo"]), (112, 200), (20_000, 24_000))
    result["arm_differences"] = [row.as_dict() for row in planned_differences(loaded.recipe, measured)]
    write_json(evaluate / "evaluation.json", result)
    _publish(folder, loaded, manifest)
    if histories:
        for stage, history in _histories(generator).items():
            (folder / stage).mkdir(exist_ok=True)
            write_json(folder / stage / STAGE_FILE, {"stage": stage, "key": "0" * 16, "metrics": {"history": history}})
    counts = {"n_prompts": n_prompts, "n_responses": 4 * n_prompts, "n_comparisons": 6 * n_prompts}
    counts |= {"n_tokens": 999, "n_long_prompts": 2, "n_long_responses": 7, "n_left_out_responses": 0}
    report = {"source": "reviews", "source_fingerprint": "ab" * 32, "n_empty": 3, "train": counts, "eval": counts}
    write_json(folder / "data" / "report.json", report)
    return folder


def _publish(folder: Path, loaded: LoadedRecipe, manifest: bool) -> None:
    stages = {
        name: {"arm": arm, "wall_s": wall, "tokens": 1000 * int(wall), "peak_gib": 0.5}
        for name, arm, wall in (
            *(("data", "shared", 1.0), ("sft", "shared", 8.5), ("reward_model", "rm_ppo", 30.0)),
            *(("ppo", "rm_ppo", 200.0), ("dpo", "dpo", 40.0), ("evaluate", "shared", 60.0)),
        )
    }
    for name, tokens in {"reward_model": 13_000, "ppo": 20_000, "dpo": 24_000}.items():
        stages[name]["response_tokens_trained"] = tokens
    made = new_manifest(loaded, [], ["duel", "run", "smoke", "--out", "a folder"]) | {"stages": stages}
    publish(RunFolder(folder), loaded, made)
    results = read_json(folder / "results.json")
    results["cost"]["judges"] = [
        {
            **{"judge": "openai:judge", "template": "0" * 16, "n_questions": 96, "n_remembered": 40},
            **{"n_failed": 2, "prompt_tokens": 52_000, "completion_tokens": 1_200, "new_prompt_tokens": 30_000},
            **{"new_completion_tokens": 700, "wall_s": 12.5, "cost_usd": 0.1452, "new_cost_usd": 0.08},
        }
    ]
    write_json(folder / "results.json", results)
    if manifest:
        write_json(folder / "manifest.json", made | {"keys": {name: f"{k:016x}" for k, name in enumerate(stages)}})
        write_text(folder / "recipe.resolved.yaml", resolved_yaml(loaded))


def _samples(
    generator: np.random.Generator, prompt_ids: list[str], gold: bool, hostile: bool, checkpoints: int, words: int
) -> list[dict[str, Any]]:
    policies = [("base", "base", "base", 0, 0.4, -0.2), ("sft", "sft", "sft", 0, 0.0, 0.0)]
    for arm, reach, gain in (("rm_ppo", 9.0, 1.2), ("dpo", 6.0, 0.8)):
        for k in range(1, checkpoints + 1):
            final = k == checkpoints
            share = k / checkpoints
            name = arm if final else f"{arm}@{10 * k}"
            kind = "final" if final else "checkpoint"
            policies.append((name, arm, kind, 10 * k, reach * share, gain * share))
    for by in ("rm", "implicit"):
        name = f"best_of_{BEST_OF}_{by}"
        policies.append((name, name, "best_of_n", 0, best_of_n_kl(BEST_OF), 0.4))
    lexicon = ["the", "film", "was", "slow", "bright", "honest", "and", "a", "little", "odd", "but", "kind"]
    out = []
    for name, arm, kind, step, kl, gain in policies:
        for k, prompt_id in enumerate(prompt_ids):
            text = " ".join(generator.choice(lexicon, size=int(generator.integers(3, words + 3))))
            prompt = f"Review {k}: I thought that"
            if hostile and k < len(HOSTILE):
                text, prompt = HOSTILE[k], f"{HOSTILE[k]} prompt {k}"
            explicit, implicit = gain + generator.normal(0, 0.6), 0.7 * gain + generator.normal(0, 0.5)
            out.append(
                {
                    "prompt_id": prompt_id,
                    "policy": name,
                    "arm": arm,
                    "kind": kind,
                    "step": step,
                    "sample_index": 0,
                    "prompt": prompt,
                    "response": text,
                    "response_ids": [1] * (len(text.split()) + 1),
                    "n_tokens": len(text.split()) + 1,
                    "truncated": bool(generator.random() < 0.2),
                    "policy_logp": -20.0,
                    "kl_nats": max(0.0, kl + generator.normal(0, 0.3)) if kl else 0.0,
                    "implicit_reward": implicit,
                    "explicit_reward": explicit,
                    "gold_reward": 0.5 * gain - 0.02 * kl**1.5 + generator.normal(0, 0.6) if gold else None,
                    "reward_disagreement": None,
                }
            )
    return out


def _held_out(
    generator: np.random.Generator, prompt_ids: list[str], gold: bool
) -> tuple[list[dict[str, Any]], list[tuple[int, int, int, float, float]]]:
    rows, comparisons = [], []
    for p, prompt_id in enumerate(prompt_ids):
        truth = generator.normal(0, 1, size=4)
        for k in range(4):
            rows.append(
                {
                    "prompt_id": prompt_id,
                    "response_index": k,
                    "response": f"held out {k}",
                    "n_tokens": int(generator.integers(5, 20)),
                    "policy_logp": -10.0,
                    "reference_logp": -11.0,
                    "implicit_reward": float(0.4 * truth[k] + generator.normal(0, 0.4)),
                    "implicit_reward_mean": 0.0,
                    "explicit_reward": float(0.8 * truth[k] + generator.normal(0, 0.6)),
                    "gold_reward": float(truth[k]) if gold else None,
                    "truncated": False,
                }
            )
        comparisons += [(p, i, j, float(truth[i] > truth[j]), 1.0) for i in range(4) for j in range(i + 1, 4)]
    return rows, comparisons


def _judge(samples: list[dict[str, Any]], prompt_ids: list[str], names: tuple[str, ...]) -> list[records.Judgement]:
    columns = {"gold": "gold_reward", "rm": "explicit_reward", "implicit": "implicit_reward"}
    table = {(row["policy"], row["prompt_id"]): row for row in samples}
    policies = list(dict.fromkeys(row["policy"] for row in samples))

    def column(name: str) -> dict[str, list[list[Any]]]:
        return {policy: [[table[policy, prompt][name]] for prompt in prompt_ids] for policy in policies}

    responses = PolicyResponses(prompt_ids, prompt_ids, column("response"))
    pairs = [(name, "sft") for name in policies if name != "sft"] + [("rm_ppo", "dpo")]
    out: list[records.Judgement] = []
    for judge in names:
        scores = column(columns.get(judge, "gold_reward"))
        for policy, baseline in pairs:
            made = scorers.compare(judge, policy, baseline, responses, scores)
            # One judgement failed: it is no tie, and shows as such.
            out += [replace(made[0], preference=None, error="no answer"), *made[1:]]
    return out


def _histories(generator: np.random.Generator) -> dict[str, list[dict[str, float]]]:
    def noisy(value: float) -> float:
        return float(value + generator.normal(0, 0.03))

    ppo = [
        {
            "step": step,
            "loss": noisy(0.1),
            "objective/score": noisy(step / 40),
            "objective/kl": noisy(step / 5),
            "objective/entropy": noisy(3 - step / 40),
            "length/mean": noisy(14),
            "eos_rate": min(1.0, noisy(0.8)),
            "value/explained_variance": noisy(0.3),
            "policy/clip_fraction": abs(noisy(0.05)),
            "loss/policy": noisy(0.0),
            "value/loss": noisy(0.2),
        }
        for step in range(1, 41)
    ]
    dpo = [
        {
            "step": step,
            "loss": noisy(0.69 - step / 100),
            "rewards/accuracies": noisy(0.5 + step / 100),
            "rewards/margins": noisy(step / 30),
            "rewards/chosen": noisy(0.0),
            "rewards/rejected": noisy(-step / 30),
            "logps/chosen": noisy(-20),
            "logps/rejected": noisy(-22),
        }
        for step in range(1, 21)
    ]
    reward_model = [{"step": s, "loss": noisy(0.6), "rewards/accuracies": noisy(0.65)} for s in (5, 10)]
    return {"ppo": ppo, "dpo": dpo, "reward_model": reward_model, "sft": [{"step": 5, "loss": 2.0}]}
