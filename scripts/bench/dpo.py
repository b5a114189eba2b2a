"""DPO training with LoRA on real pairs: ours against TRL's DPOTrainer.

Same model, ids, adapter, batch size, optimiser and precision; a pass of the reference is in both (``duel`` computes it
before training, TRL within each step; ``duel-cached`` finds it on disk, as the next run over the same data does). No
gradient checkpointing. Reading, tokenising and loading are not timed; the optimiser's steps are.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from typing import Any

import harness


def settings(args: argparse.Namespace, folder: str) -> tuple[Any, dict[str, Any]]:
    from toolkit.recipe.training import DpoSection

    return harness.training_settings(DpoSection, args, folder, batch=args.batch, steps=args.steps)


def policy_of(args: argparse.Namespace, attention: str | None = None) -> Any:
    from toolkit.models.load import load_policy
    from toolkit.models.resolve import resolve
    from toolkit.training.trainer import seed_everything

    seed_everything(0)
    return load_policy(resolve(args.model), harness.model_section(args, attention))


def duel(args: argparse.Namespace, *, cached: bool = False) -> dict[str, Any]:
    import torch

    from toolkit.engine.engine import Engine
    from toolkit.models.inspect import torch_dtype
    from toolkit.models.load import trainable
    from toolkit.recipe.training import Lora
    from toolkit.stages.dpo import dpo_loss
    from toolkit.training.trainer import EngineTrainer

    tokenizer, examples = harness.real_pairs(args, args.batch * args.steps)
    policy, pad_id, dtype = policy_of(args), int(tokenizer.pad_token_id), torch_dtype(args.dtype)
    frozen = Engine(policy, pad_id, dtype=dtype)
    trees = [example.tree for example in examples]

    def reference_logps() -> list[torch.Tensor]:
        return [torch.stack([t.sum() for t in row]) for row in frozen.logps(trees)]

    on_disk = reference_logps() if cached else None
    with tempfile.TemporaryDirectory() as folder:

        def work() -> int:
            reference = on_disk or reference_logps()
            section, arguments = settings(args, folder)
            engine = Engine(trainable(policy, Lora(), task="CAUSAL_LM"), pad_id, dtype=dtype)
            loss = partial(dpo_loss, engine, section, reference)
            EngineTrainer(engine, arguments, examples, loss).train()
            return args.batch * args.steps

        return harness.measured(work)


def trl(args: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from toolkit.models.load import lora_config
    from toolkit.recipe.training import Lora

    n = args.batch * args.steps
    tokenizer, examples = harness.real_pairs(args, n)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, (e.tree.prompt_ids, *e.tree.response_ids), strict=True)) for e in examples]
    with tempfile.TemporaryDirectory() as folder:
        section, arguments = settings(args, folder)
        trainer = DPOTrainer(
            model=policy_of(args, "sdpa"),  # transformers' own choice
            args=DPOConfig(**arguments, gradient_checkpointing=False, max_length=None, beta=section.beta),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=tokenizer,
            peft_config=lora_config(Lora(), task="CAUSAL_LM"),
        )
        trainer.train_dataset = Dataset.from_list(rows)
        return harness.measured(lambda: trainer.train() and n)


if __name__ == "__main__":
    parser = harness.parser(__doc__.splitlines()[0], "dpo")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    harness.main(
        parser.parse_args(),
        {"duel": duel, "trl": trl, "duel-cached": lambda args: duel(args, cached=True)},
        {
            "times TRL": (("duel", "pairs_per_s"), ("trl", "pairs_per_s")),
            "times TRL, reference cached": (("duel-cached", "pairs_per_s"), ("trl", "pairs_per_s")),
            "of TRL's peak memory": (("duel", "peak_gib"), ("trl", "peak_gib")),
            "of TRL's memory above the loaded model": (("duel", "above_loaded_gib"), ("trl", "above_loaded_gib")),
        },
        {"data": "hh_harmless pairs, the first of the file", "unit": "pairs/s, reference included"},
    )
