"""Whether the card of a reward model predicts what PPO makes of it.

Reward models that differ in the size of their data, in the noise and bias of its labels, and in their trainable weights
get a card on held-out prompts (``duel rm-card``). PPO then optimises each from one SFT policy with the same settings,
and the gold reward of what the policy writes for the held-out prompts is measured. For each figure of the card the file
has its rank correlation with that gold reward, with an interval over reward models. It continues where it stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import harness
import known_reward_models as known
from known_reward_models import Design, Labels

# Figures of the card by their path; a bias counts by its size, whichever its sign.
FIGURES = {
    "accuracy on the labels": ("accuracy",),
    "accuracy against gold": ("gold", "accuracy"),
    "rank correlation with gold": ("gold", "spearman"),
    "best of 4 accuracy": ("best_of_4", "accuracy"),
    "gain of best of 6, share of gold's": ("best_of_n", -1, "share_of_best_gain"),
    "NLL": ("calibration", "nll"),
    "ECE": ("calibration", "ece"),
    "mean margin": ("margins", "mean"),
    "variance within prompts": ("variance", "within_prompts"),
    "share of variance within prompts": ("variance", "share_within"),
    "size of length's excess": ("length", "excess_if_noisy"),
    "size of format's excess": ("format", "excess_if_noisy"),
    "size of sycophancy's excess": ("sycophancy", "excess_if_noisy"),
    "opinion probe's shift": ("sycophancy", "probe", "shift"),
}
# What PPO made of it: gold reward and KL of its policy, and how far the score rose, in spreads within a prompt.
OUTCOMES = ("gold", "kl", "score_rise")
PPO = ("ppo.num_checkpoints=1", "ppo.kl_coef=0.05")


def designs() -> list[Design]:
    """The reward models; each differs in one point from 200 prompts labelled with a noise of 0.2."""
    labels = {
        **{f"flipped {share:g}": Labels(flipped=share) for share in (0.15, 0.3, 0.45)},
        **{f"noise {noise:g}": Labels(noise=noise) for noise in (0.6, 1.5)},
        **{f"length {weight:g}": Labels("length", weight) for weight in (0.3, 0.8, -0.8)},
        **{f"format {weight:g}": Labels("format", weight) for weight in (0.5, -0.5)},
        "agreement 1": Labels("agreement", 1.0),
    }
    every = [Design(f"prompts {n}", prompts=n) for n in (12, 25, 50, 100, 200)]
    every += [Design(name, labels=of_design) for name, of_design in labels.items()]
    every += [Design(f"lora {rank}", lora=rank, learning_rate=3e-3) for rank in (4, 16)]
    every += [Design("epochs 1", epochs=1), Design("untrained", epochs=1, learning_rate=1e-6)]
    return [replace(design, seed=number) for number, design in enumerate(every)]


def gold_of(policy: Path, rows: Sequence[Any], samples: int) -> dict[str, Any]:
    """The mean gold reward of what a policy writes for these prompts, with an interval over prompts."""
    import numpy as np

    from toolkit.engine.sampling import SamplingParams
    from toolkit.evals.agreement import estimate_dict
    from toolkit.evals.intervals import DEFAULT_INTERVALS, bootstrap_mean
    from toolkit.measure.sampling import PolicySampler, sample
    from toolkit.preferences.gold import gold_rewards
    from toolkit.progress import Reporter

    sampler = PolicySampler(str(policy), recipe_of([]).model, SamplingParams(48, 1.0, n=samples))
    prompts = [(row.prompt_id, row.prompt) for row in rows]
    drawn = sample(sampler, prompts, seed=0, purpose="rm-card", reporter=Reporter(quiet=True))
    texts = [[response.response for response in of_prompt] for of_prompt in drawn]
    means = [np.mean(gold_rewards([row.prompt] * samples, of_row)) for row, of_row in zip(rows, texts, strict=True)]
    return dict(estimate_dict(bootstrap_mean(np.array(means), **DEFAULT_INTERVALS)))


def recipe_of(sets: Sequence[str]) -> Any:
    from toolkit.recipe.files import load_recipe

    return load_recipe("smoke", list(sets)).recipe


def figure(card: dict[str, Any], path: Sequence[str | int]) -> float | None:
    """One figure of a card, as a number; a bias's excess without its sign."""
    node: Any = card["explicit"]
    for key in path:
        node = node[key] if node is not None else None
    value = node["value"] if isinstance(node, dict) else node
    return abs(value) if value is not None and str(path[-1]).startswith("excess") else value


def measure(design: Design, sft: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train the reward model, take its card, optimise it, and measure gold."""
    from toolkit.preferences.tables import from_parquet

    folder, started = args.work / "models" / design.name.replace(" ", "-"), time.perf_counter()
    model = known.train(design, sft, folder)
    card = known.card_of(model, folder, args.held_out)
    rows = from_parquet(sft.parent / "data" / "eval.parquet")[: args.held_out]
    sets = [*PPO, f"ppo.total_episodes={64 * args.rollouts}"]
    inputs = {"data": sft.parent / "data", "sft": sft, "reward_model": folder / "reward_model"}
    took = known.run_stage("ppo", recipe_of(sets), inputs, folder / "ppo")
    first, *_, last = [entry for entry in took["history"] if "objective/kl" in entry]
    spread = card["explicit"]["variance"]["within_prompts"]["value"] ** 0.5
    return {
        "design": asdict(design),
        "figures": {name: figure(card, path) for name, path in FIGURES.items()},
        "flags": [[flag["topic"], flag["direction"]] for flag in card["flags"]],
        "gold": gold_of(folder / "ppo/model", rows, args.samples),
        "kl": last["objective/kl"],
        "score_rise": (last["objective/score"] - first["objective/score"]) / spread,
        "seconds": round(time.perf_counter() - started, 1),
    }


def spearman(x: Any, y: Any) -> Any:
    """Spearman's correlation along the last axis; nan where one side is constant."""
    import numpy as np
    from scipy.stats import rankdata

    a, b = (rankdata(values, axis=-1) - (np.shape(values)[-1] + 1) / 2 for values in (x, y))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def rank_correlation(x: Any, y: Any, n_resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Spearman's correlation over reward models with its 95% BCa bootstrap interval."""
    import numpy as np

    from toolkit.evals.intervals import bca_interval, resample_indices

    value, n = float(spearman(x, y)), len(x)
    draws = np.concatenate([spearman(x[index], y[index]) for index in resample_indices(n, n_resamples, seed)])
    left_out = np.array([spearman(np.delete(x, k), np.delete(y, k)) for k in range(n)])
    low, high = bca_interval(value, draws[np.isfinite(draws)], left_out, 0.95)
    return {"value": value, "ci_low": low, "ci_high": high, "n": n}


def permutation_p(x: Any, y: Any, n_permutations: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of Spearman's correlation: the share of permutations that are as far from 0."""
    import numpy as np

    rng = np.random.default_rng(seed)
    orders = rng.permuted(np.tile(np.arange(len(y)), (n_permutations, 1)), axis=1)
    as_far = np.abs(spearman(x[None], y[orders])) >= abs(float(spearman(x, y))) - 1e-12
    return float((1 + as_far.sum()) / (1 + n_permutations))


def outcome(record: dict[str, Any], name: str) -> float:
    value = record[name]["value"] if isinstance(record[name], dict) else record[name]
    return float("nan") if value is None else float(value)


def advantage_over_accuracy(x: Any, accuracy: Any, y: Any, n_resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """How much larger a figure's rank correlation is than that of the accuracy, both without their signs.

    The percentile interval resamples reward models for both at once.
    """
    import numpy as np

    from toolkit.evals.intervals import resample_indices

    def difference(index: Any) -> Any:
        return np.abs(spearman(x[index], y[index])) - np.abs(spearman(accuracy[index], y[index]))

    draws = np.concatenate([difference(index) for index in resample_indices(len(x), n_resamples, seed)])
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {"value": float(difference(np.arange(len(x)))), "ci_low": float(low), "ci_high": float(high)}


def predictions(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each figure its rank correlation with each outcome, the strongest with gold first."""
    import numpy as np

    from toolkit.evals.winrate import holm

    columns = {name: np.array([r["figures"].get(name) for r in records], dtype=float) for name in FIGURES}
    columns = {name: x for name, x in columns.items() if np.all(np.isfinite(x)) and np.ptp(x) > 0.0}
    truth = {name: np.array([outcome(record, name) for record in records]) for name in OUTCOMES}
    p_values = {name: permutation_p(x, truth["gold"]) for name, x in columns.items()}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    accuracy = columns["accuracy on the labels"]
    rows = [
        {
            "figure": name,
            **{f"with_{target}": rank_correlation(x, y) for target, y in truth.items() if np.all(np.isfinite(y))},
            "p": p_values[name],
            "p_holm": adjusted[name],
            "over_accuracy": advantage_over_accuracy(x, accuracy, truth["gold"]),
        }
        for name, x in columns.items()
    ]
    return sorted(rows, key=lambda row: -abs(row["with_gold"]["value"]))


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--models", type=int, default=len(designs()), help="how many reward models")
    options.add_argument("--prompts", type=int, default=400, help="most training prompts of a reward model")
    options.add_argument("--rollouts", type=int, default=5, help="PPO's rollouts of 64 responses")
    options.add_argument("--held-out", type=int, default=120, help="most held-out prompts, for cards and policies")
    options.add_argument("--samples", type=int, default=3, help="responses to each of them")
    options.add_argument("--work", type=Path, default=Path("rm-card-bench"), help="folder of the models")
    options.add_argument("--out", type=Path, default=harness.RESULTS / "rm_card.json")
    args = options.parse_args()
    known.quiet()
    sft, records_file = known.start(args.work / "start", True), args.work / "records.jsonl"
    records = known.done(records_file)
    wanted = [known.smaller(design, args.prompts) for design in known.spread(designs(), args.models)]
    for design in wanted:
        if design.name not in records:
            records[design.name] = known.add(records_file, measure(design, sft, args))
    from toolkit.preferences.tables import from_parquet

    of_sft = gold_of(sft / "model", from_parquet(sft.parent / "data/eval.parquet")[: args.held_out], args.samples)
    chosen = [records[design.name] for design in wanted]
    table = predictions(chosen)
    about = {"rollouts": args.rollouts, "held_out": args.held_out, "samples": args.samples}
    harness.write(args.out, {**known.provenance(about), "gold_of_sft": of_sft, "figures": table, "models": chosen})
    for row in table:
        print(f"{row['figure']:<36} {known.words(row['with_gold'])}  Holm p {row['p_holm']:.3f}")


if __name__ == "__main__":
    main()
