"""Does an ensemble of reward models hold up where a quarter of the labels are wrong? PPO against one, and against four.

    python scripts/bench/ensembles.py [--seeds 5] [--noise 0.25] [--kl 0.01] [--episodes 640] [--out FILE.json]

Coste et al. 2024 (arXiv 2310.02743) report that uncertainty-weighted optimisation with a small KL penalty removes the
over-optimisation that PPO against one reward model shows under label noise. Here every pair of responses of `reviews`
is labelled by its gold reward and flipped with this probability. Both kinds train on the same rows from the same SFT
policy. What counts is the gold reward of PPO's policy on held-out prompts. Differences are paired by seed, with a
t-interval.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS
from scipy import stats

from toolkit.api import run
from toolkit.files import write_json
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import Comparison, PreferenceRow, write_native

KINDS: dict[str, dict[str, Any]] = {
    "one": {"reward_model.members": 1},
    "mean": {"reward_model.members": 4, "reward_model.combine": "mean"},
    "uwo": {"reward_model.members": 4, "reward_model.combine": "uwo"},
}


def noisy_rows(noise: float, seed: int) -> list[PreferenceRow]:
    """The rows of `reviews` with new labels: by gold, flipped with this probability."""
    rng, rows = random.Random(f"noise:{seed}"), []
    for row in read_preferences("reviews").rows:
        assert row.gold is not None
        comparisons = []
        for i, j in combinations(range(len(row.responses)), 2):
            if row.gold[i] != row.gold[j]:
                first = (row.gold[i] > row.gold[j]) != (rng.random() < noise)
                comparisons.append(Comparison(*((i, j) if first else (j, i))))
        rows.append(PreferenceRow(row.prompt_id, row.prompt, row.responses, comparisons, row.gold))
    return rows


def measure(kind: str, data: Path, seed: int, args: argparse.Namespace, out: Path) -> dict[str, float]:
    """Gold reward of SFT and of PPO's policy, its KL, its explicit reward, and the reward model's accuracy."""
    settings = {
        "seed": seed,
        "data.source": str(data),
        "data.train_prompts": args.prompts,
        "data.eval_prompts": 100,
        "data.max_responses": 4,
        "ppo.total_episodes": args.episodes,
        "ppo.kl_coef": args.kl,
        "ppo.num_checkpoints": 1,
        "dpo.max_steps": 1,
        "dpo.num_checkpoints": 1,
        "evaluate.best_of_n": 0,
        "evaluate.checkpoints": False,
        "evaluate.samples_per_prompt": 2,
        "evaluate.judges": ["gold"],
        "evaluate.bootstrap": 200,
    }
    results = run("smoke", out=out, settings=settings | KINDS[kind])
    by_policy = {row["policy"]: row for row in results["policies"]}
    ppo = by_policy["rm_ppo"]
    return {
        "gold": ppo["gold_reward"]["value"],
        "gold_of_sft": by_policy["sft"]["gold_reward"]["value"],
        "kl_nats": ppo["kl_nats"],
        "explicit": ppo["explicit_reward"]["value"],
        "accuracy": results["rm_quality"]["explicit"]["accuracy"]["value"],
        "accuracy_against_gold": results["rm_quality"]["explicit"]["accuracy_against_gold"]["value"],
    }


def paired(rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """The difference of this kind's gold from that of one reward model, over seeds; its 95% t-interval."""
    differences = np.array([row[kind]["gold"] - row["one"]["gold"] for row in rows])
    mean, error = float(differences.mean()), float(stats.sem(differences)) if len(rows) > 1 else float("nan")
    half = float(stats.t.ppf(0.975, len(rows) - 1)) * error if len(rows) > 1 else float("nan")
    gain = float(np.mean([row["one"]["gold"] - row["one"]["gold_of_sft"] for row in rows]))
    return {"difference": mean, "ci_low": mean - half, "ci_high": mean + half, "gain_of_one_over_sft": gain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.25)
    parser.add_argument("--kl", type=float, default=0.01)
    parser.add_argument("--episodes", type=int, default=640)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--kinds", nargs="*", default=["one", "uwo"], choices=sorted(KINDS))
    parser.add_argument("--out", type=Path, default=RESULTS / "ensembles.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            data, out = Path(folder) / f"noisy-{seed}.jsonl.gz", Path(folder) / f"run-{seed}"
            write_native(noisy_rows(args.noise, seed), data)
            # The same folder: data, SFT and DPO are there already for the second kind.
            rows.append({"seed": seed} | {kind: measure(kind, data, seed, args, out) for kind in args.kinds})
            print(json.dumps(rows[-1]), flush=True)
    facts = {"date": date.today().isoformat(), "processor": platform.processor() or platform.machine()}
    settings = {name: getattr(args, name) for name in ("noise", "kl", "episodes", "prompts")}
    comparisons = {kind: paired(rows, kind) for kind in args.kinds if kind != "one"}
    write_json(
        args.out, {**facts, **settings, "threads": torch.get_num_threads(), "against_one": comparisons, "seeds": rows}
    )
    print(json.dumps(comparisons))


if __name__ == "__main__":
    main()
