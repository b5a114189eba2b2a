"""Whether shuffling the comparisons of rankings apart makes a reward model over-fit more than keeping prompts whole.

Ouyang et al. 2022 (arXiv 2203.02155, section 3.5) put all comparisons of a prompt into one batch element, since
shuffled apart they over-fitted in a single pass. Both ways train here on the same comparisons from the same start:
``prompts`` takes every prompt once in an epoch, with all its comparisons; ``pairs`` takes each comparison by itself, in
a random order. A step has the same number of comparisons, so both take as many steps. A seed decides the split, the
order and the head. Held-out figures are taken after every epoch; intervals are Student's, over seeds, of the paired
difference (pairs minus prompts).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import harness

FIGURES = ("accuracy", "nll", "train_accuracy", "train_nll")


def train(args: argparse.Namespace, seed: int, by: str) -> list[dict[str, float]]:
    """The figures after each epoch of one training."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import TrainerCallback

    from toolkit.engine.engine import Engine
    from toolkit.models.inspect import torch_dtype
    from toolkit.models.load import new_reward_model, trainable
    from toolkit.models.resolve import resolve
    from toolkit.recipe.training import Lora, RewardModelSection
    from toolkit.training.reward_model import bradley_terry
    from toolkit.training.trainer import EngineTrainer, seed_everything, training_arguments

    tokenizer, training, held_out = examples(args, seed)
    per_prompt = len(training[0].pairs)
    assert all(len(example.pairs) == per_prompt for example in training), "prompts differ in their comparisons"
    items = training if by == "prompts" else [pair for example in training for pair in apart(example)]
    batch = args.batch * (1 if by == "prompts" else per_prompt)
    steps = -(-len(items) // batch) * args.epochs
    seed_everything(seed)
    pad_id = int(tokenizer.pad_token_id)
    section = harness.model_section(args).model_copy(update={"lora": Lora() if args.lora else None})
    model = new_reward_model(resolve(args.model), section, pad_id, seed)
    model = trainable(model, section.lora, task="SEQ_CLS", modules_to_save=["score"])
    engine = Engine(model, pad_id, dtype=torch_dtype(args.dtype))

    class Shuffled(EngineTrainer):
        def get_train_dataloader(self) -> Any:
            """A random order, without regard to lengths: those of a prompt's comparisons are alike."""
            order = torch.Generator().manual_seed(seed)
            collate: Any = self.data_collator
            return DataLoader(self.numbered, batch, shuffle=True, generator=order, collate_fn=collate)

    after_epochs: list[dict[str, float]] = []

    class Measure(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            of_training = figures(engine, training[: len(held_out)])
            after_epochs.append(
                figures(engine, held_out) | {f"train_{name}": value for name, value in of_training.items()}
            )
            model.train()

    settings = RewardModelSection(
        per_device_train_batch_size=batch,
        learning_rate=args.learning_rate,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        logging_steps=1000,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(settings, Path(folder), seed=seed, dtype=args.dtype, steps=steps)
        arguments |= {"save_strategy": "no"}
        Shuffled(engine, arguments, items, partial(bradley_terry, engine, 0.0), [Measure()]).train()
    assert len(after_epochs) == args.epochs
    return after_epochs


def examples(args: argparse.Namespace, seed: int) -> tuple[Any, list[Any], list[Any]]:
    """The tokenizer, and ``args.prompts`` training and ``args.held_out`` held-out prompts of this seed."""
    from toolkit.models.encoding import text_encoder
    from toolkit.models.resolve import resolve
    from toolkit.models.tokenizer import load_tokenizer
    from toolkit.preferences import splits
    from toolkit.preferences.reading import read_preferences
    from toolkit.training.batch import examples_of

    source = "reviews" if args.data == "reviews" else str(harness.real_file(f"{args.data}/rankings.jsonl.gz"))
    tokenizer = load_tokenizer(resolve(args.model))
    rows = read_preferences(source).rows
    most = max(len(splits.pairs(row)) for row in rows)
    whole = [row for row in rows if len(splits.pairs(row)) == most]
    some = splits.limit(whole, args.prompts + args.held_out, seed)
    encoded = examples_of(some, text_encoder(tokenizer, some[0].prompt), args.max_response_tokens)
    if len(encoded) < args.prompts + args.held_out:
        sys.exit(f"{args.data} has {len(encoded)} prompts with {most} comparisons: ask for fewer")
    order = splits.limit(some, args.held_out, seed + 1_000_003)  # by another hash: which of them are held out
    names = {row.prompt_id for row in order}
    sides: tuple[list[Any], list[Any]] = ([], [])
    for row, example in zip(some, encoded, strict=True):
        sides[row.prompt_id in names].append(example)
    return tokenizer, *sides


def apart(example: Any) -> list[Any]:
    """An example for each comparison, with its two responses alone."""
    from toolkit.models.encoding import Tree
    from toolkit.training.batch import Example

    tree = example.tree
    return [
        Example(Tree(tree.prompt_ids, [tree.response_ids[i], tree.response_ids[j]]), [(0, 1, p, weight)])
        for i, j, p, weight in example.pairs
    ]


def figures(engine: Any, examples: Sequence[Any]) -> dict[str, float]:
    """Accuracy on decided comparisons and negative log-likelihood (nats) on all."""
    from toolkit.evals.rm_quality import rm_quality

    engine.model.eval()
    scores = engine.scores([example.tree for example in examples])
    comparisons = [(row, *pair) for row, example in enumerate(examples) for pair in example.pairs]
    quality: Any = rm_quality(comparisons, scores, n_resamples=1)
    return {"accuracy": quality["accuracy"]["value"], "nll": quality["nll"]}


def interval(values: Sequence[float]) -> dict[str, float]:
    """The mean over seeds and its 95% interval by Student's t."""
    import numpy as np
    from scipy import stats

    mean, error = float(np.mean(values)), float(stats.sem(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return {"value": round(mean, 4), "ci_low": round(mean - reach, 4), "ci_high": round(mean + reach, 4)}


def summary(runs: dict[str, list[list[dict[str, float]]]], epochs: int) -> list[dict[str, Any]]:
    """For each epoch, both ways' figures and their paired difference."""
    table = []
    for epoch in range(epochs):
        of_epoch: dict[str, Any] = {"epoch": epoch + 1}
        for name in FIGURES:
            values = {by: [run[epoch][name] for run in of_seeds] for by, of_seeds in runs.items()}
            differences = [a - b for a, b in zip(values["pairs"], values["prompts"], strict=True)]
            of_epoch[name] = {by: interval(each) for by, each in values.items()} | {"difference": interval(differences)}
        table.append(of_epoch)
    return table


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--data", default="finegrained_qa_k4", choices=["finegrained_qa_k4", "reviews"])
    options.add_argument("--model", default="tiny")
    options.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    options.add_argument("--lora", action="store_true", help="train adapters of the default rank, not all weights")
    options.add_argument("--learning-rate", type=float, default=3e-4)
    options.add_argument("--prompts", type=int, default=200, help="training prompts")
    options.add_argument("--held-out", type=int, default=120, help="held-out prompts")
    options.add_argument("--batch", type=int, default=8, help="prompts of a step, or as many comparisons as they have")
    options.add_argument("--epochs", type=int, default=6)
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--max-response-tokens", type=int, default=256)
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--out", type=Path, default=harness.RESULTS / "rankings.json", help="JSON file of all cases")
    args = options.parse_args()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    runs: dict[str, list[list[dict[str, float]]]] = {"prompts": [], "pairs": []}
    for seed in range(args.seeds):
        for by, of_seeds in runs.items():
            of_seeds.append(train(args, seed, by))
            print(seed, by, json.dumps(of_seeds[-1][-1]), file=sys.stderr, flush=True)
    case = {name: value for name, value in vars(args).items() if name not in ("out", "threads")}
    record = {
        "what": case,
        "command": harness.command(),
        "date": date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "threads": args.threads, "processor": harness.processor()},
        "versions": harness.versions(),
        "epochs": summary(runs, args.epochs),
    }
    # One file holds all cases, each by what it compared.
    others = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    harness.write(args.out, [*(other for other in others if other["what"] != case), record])
    for row in record["epochs"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
