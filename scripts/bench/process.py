"""A process reward model on held-out steps of PRM800K, beside the majority class and DPO's implicit process reward.

    DUEL_REAL_DATA=DIR python scripts/bench/process.py [--model smollm2-135m] [--epochs 1] [--pairs 600]

Both start from the same model. The process reward model trains on the labelled steps of PRM800K's training problems.
DPO trains on pairs of candidates for the same step of these problems, one rated right and the other wrong, with the
steps before them. Both are tested on the labelled steps of the test problems, which are others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import harness
import torch

from toolkit.measure.options import ScoringOptions
from toolkit.measure.reading import ReadingOptions
from toolkit.measure.rm_card import CardOptions
from toolkit.measure.step_card import step_card
from toolkit.preferences.steps import read_steps
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe
from toolkit.runs.pipeline import RunOptions, run

SEPARATOR = "\n"


def pairs_of(source: Path) -> Iterator[dict[str, Any]]:
    """Two candidates for the same step, one right and one wrong, as whole beginnings of a solution."""
    siblings: dict[tuple[str, tuple[str, ...]], dict[bool, list[str]]] = defaultdict(lambda: {True: [], False: []})
    for solution in read_steps(str(source)).solutions:
        for k in solution.counted:
            label = solution.labels[k]
            assert label is not None
            siblings[str(solution.prompt), tuple(solution.steps[:k])][label].append(solution.steps[k])
    for (prompt, before), candidates in siblings.items():
        for right, wrong in zip(candidates[True], candidates[False], strict=False):
            chosen, rejected = (SEPARATOR.join([*before, step]) for step in (right, wrong))
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the labelled steps")
    parser.add_argument("--pairs", type=int, default=600, help="pairs that DPO trains on")
    parser.add_argument("--test-prompts", type=int, help="test on the solutions of so many problems; default: all")
    parser.add_argument("--tokens", type=int, default=256, help="longest solution; later steps are cut")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--work", type=Path, help="folder of the run; the default is a temporary one")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "process.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        record = measure(args, work)
    harness.write(args.out, record)
    for name, steps in record["steps"].items():
        print(name, {key: value and [round(x, 3) for x in value] for key, value in steps.items()})


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    train, test = (harness.real_file(f"prm800k/{side}.parquet") for side in ("train", "test"))
    fits = [pair for pair in pairs_of(train) if len(pair["chosen"]) < 3 * args.tokens]
    pairs = random.Random(0).sample(fits, min(args.pairs, len(fits)))
    source = work / "pairs.jsonl"
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    settings = {
        "model.name": args.model,
        "data.source": source,
        "data.conversational": "true",
        "data.eval_fraction": 0.05,
        "data.max_prompt_tokens": 256,
        "data.max_response_tokens": args.tokens,
        "sft.enabled": "false",
        "reward_model.kind": "process",
        "reward_model.steps": train,
        "reward_model.learning_rate": args.learning_rate,
        "reward_model.num_train_epochs": args.epochs,
        "reward_model.per_device_train_batch_size": 8,
        "reward_model.center": "false",
        "dpo.learning_rate": args.learning_rate,
        "dpo.per_device_train_batch_size": 8,
        "dpo.num_checkpoints": 1,
    }
    recipe = work / "recipe.yaml"
    recipe.write_text("name: process-bench\n", encoding="utf-8")
    loaded, folder, seconds = load_recipe(str(recipe), [f"{k}={v}" for k, v in settings.items()]), work / "run", {}
    for target in ("reward_model", "dpo"):
        started = time.perf_counter()
        run(loaded, folder, Reporter(), RunOptions(target=target))
        seconds[target] = round(time.perf_counter() - started, 1)
    started = time.perf_counter()
    implicit = f"{folder}/dpo/model,{folder}/sft/model"
    card = step_card(
        str(folder / "reward_model/model"),
        str(test),
        CardOptions(implicit=implicit),
        ReadingOptions(limit=args.test_prompts, max_prompt_tokens=256, max_response_tokens=args.tokens),
        ScoringOptions("bfloat16"),
        reporter=Reporter(),
    )
    seconds["test"] = round(time.perf_counter() - started, 1)
    report = json.loads((folder / "data/report.json").read_text())
    return {
        "what": {"data": "PRM800K, phase 1; test problems are no training problems", "model": args.model},
        "command": harness.command(),
        "date": date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "processor": harness.processor()},
        "versions": harness.versions(),
        "seconds": seconds,
        "trained_on": {
            "steps": report["steps"]["train"]["n_labels"],
            "epochs": args.epochs,
            "pairs": report["train"]["n_comparisons"],
        },
        "n_test": {name: card["explicit"][name] for name in ("n_steps", "n_solutions")},
        "steps": {name: summary(card[name]) for name in ("explicit", "implicit", "implicit_own")},
        "card": {name: value for name, value in card.items() if name not in ("model", "implicit_model", "steps")}
        | {"source": "prm800k/test.parquet"},
    }


def summary(figures: dict[str, Any]) -> dict[str, list[float] | None]:
    """The main figures of a reward: value, lower and upper bound."""
    rows = {**figures["steps"], "first_error": (figures["first_error"] or {}).get("accuracy")}
    return {
        name: [row["value"], row["ci_low"], row["ci_high"]] if row and row["ci_low"] is not None else None
        for name, row in rows.items()
    }


if __name__ == "__main__":
    main()
