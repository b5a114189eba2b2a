"""Reward model training with LoRA on real data: ours against TRL's RewardTrainer, on pairs and on rankings of K = 6.

Same model, ids, adapter, batch size, optimiser and precision, no gradient checkpointing. A ranking of 6 responses is
15 comparisons: one element of our batch, 15 rows of TRL's. The rankings are the shipped ``reviews``.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from functools import partial
from typing import Any

import harness


def rankings(args: argparse.Namespace, n: int) -> tuple[Any, list[Any]]:
    from toolkit.training.batch import Example

    tokenizer, examples = harness.examples(args, "reviews", n)
    every_pair = [(i, j, 1.0, 1.0) for i, j in itertools.combinations(range(6), 2)]
    return tokenizer, [Example(example.tree, every_pair) for example in examples]


def data(args: argparse.Namespace, kind: str) -> tuple[Any, list[Any], int]:
    """The tokenizer, the examples of all steps, and how many are in a step."""
    batch = args.batch if kind == "pairs" else args.rankings
    return *(harness.real_pairs if kind == "pairs" else rankings)(args, batch * args.steps), batch


def settings(args: argparse.Namespace, folder: str, batch: int) -> tuple[Any, dict[str, Any]]:
    from toolkit.recipe.training import RewardModelSection

    return harness.training_settings(RewardModelSection, args, folder, batch=batch, steps=args.steps)


def model_of(args: argparse.Namespace, tokenizer: Any, attention: str | None = None) -> Any:
    from toolkit.models.load import new_reward_model
    from toolkit.models.resolve import resolve
    from toolkit.training.trainer import seed_everything

    seed_everything(0)
    section = harness.model_section(args, attention)
    return new_reward_model(resolve(args.model), section, int(tokenizer.pad_token_id), 0)


def duel(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    from toolkit.engine.engine import Engine
    from toolkit.models.inspect import torch_dtype
    from toolkit.models.load import trainable
    from toolkit.recipe.training import Lora
    from toolkit.training.reward_model import bradley_terry
    from toolkit.training.trainer import EngineTrainer

    tokenizer, examples, batch = data(args, kind)
    model = trainable(model_of(args, tokenizer), Lora(), task="SEQ_CLS", modules_to_save=["score"])
    with tempfile.TemporaryDirectory() as folder:
        section, arguments = settings(args, folder, batch)
        engine = Engine(model, int(tokenizer.pad_token_id), dtype=torch_dtype(args.dtype))
        loss = partial(bradley_terry, engine, section.center_rewards_coefficient)
        trainer = EngineTrainer(engine, arguments, examples, loss)
        return harness.measured(lambda: trainer.train() and sum(len(e.pairs) for e in examples))


def trl(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from toolkit.models.load import lora_config
    from toolkit.recipe.training import Lora

    tokenizer, examples, _ = data(args, kind)
    names = ("chosen_ids", "rejected_ids")
    rows = [
        {name: e.tree.prompt_ids + e.tree.response_ids[k] for name, k in zip(names, pair[:2], strict=True)}
        for e in examples
        for pair in e.pairs
    ]
    with tempfile.TemporaryDirectory() as folder:
        # The same comparisons in a step: all 15 of each ranking.
        _, arguments = settings(args, folder, len(rows) // args.steps)
        trainer = RewardTrainer(
            model=model_of(args, tokenizer, "sdpa"),  # transformers' own choice
            args=RewardConfig(**arguments, gradient_checkpointing=False, max_length=None),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora_config(Lora(), task="SEQ_CLS", modules_to_save=["score"]),
        )
        return harness.measured(lambda: trainer.train() and len(rows))


if __name__ == "__main__":
    parser = harness.parser(__doc__.splitlines()[0], "reward_model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rankings", type=int, default=2, help="rankings in a batch")
    harness.main(
        parser.parse_args(),
        {
            "duel-pairs": lambda args: duel(args, "pairs"),
            "trl-pairs": lambda args: trl(args, "pairs"),
            "duel-rankings": lambda args: duel(args, "rankings"),
            "trl-rankings": lambda args: trl(args, "rankings"),
        },
        {
            "times TRL on pairs": (("duel-pairs", "pairs_per_s"), ("trl-pairs", "pairs_per_s")),
            "times TRL on rankings of 6": (("duel-rankings", "pairs_per_s"), ("trl-rankings", "pairs_per_s")),
            "of TRL's peak memory on pairs": (("duel-pairs", "peak_gib"), ("trl-pairs", "peak_gib")),
            "of TRL's peak memory on rankings": (("duel-rankings", "peak_gib"), ("trl-rankings", "peak_gib")),
        },
        {"data": "hh_harmless pairs, the first of the file; reviews, 6 responses each", "unit": "comparisons/s"},
    )
