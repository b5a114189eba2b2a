"""Supervised fine-tuning, with its adapter merged: the policy that both arms start from, and their reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from toolkit.engine import distributed
from toolkit.engine.engine import Engine
from toolkit.errors import DataError, DivergedError
from toolkit.models.config import refuse_quantised
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.inspect import torch_dtype
from toolkit.models.load import load_policy, trainable
from toolkit.models.merged import merged
from toolkit.models.resolve import resolve
from toolkit.models.save import merge_and_save
from toolkit.models.sharding import gathered, placed
from toolkit.models.tokenizer import check_vocabulary, load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.stages.contexts import SftContext
from toolkit.training.batch import Example
from toolkit.training.callbacks import StageProgress
from toolkit.training.imitation import completion_loss
from toolkit.training.length import total_steps
from toolkit.training.trainer import (
    EngineTrainer,
    seed_everything,
    train_to_end,
    trained_tokens,
    training_arguments,
)

# Whether a policy is worse than a guess shows on few tokens.
LIKELIHOOD_EXAMPLES = 16


def run(context: SftContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``model/``: all weights in ``model.dtype``. With ``sft.enabled`` off, they are those of the base model.

    Raises ModelError for a quantised base, DataError where there is nothing to imitate, DivergedError where training
    ends worse than guessing.
    """
    section = context.sft
    ref = resolve(context.model.name, context.model.revision)
    refuse_quantised(ref, "model.name")
    tokenizer = load_tokenizer(ref, context.model.chat_template)
    dtype = torch_dtype(context.model.dtype)
    policy = load_policy(ref, context.model, dtype=None if context.model.lora else torch.float32)
    check_vocabulary(policy.get_input_embeddings().weight.shape[0], tokenizer, ref.spec)
    if ref.kind == "adapter":
        # The reference of both arms is the model with this adapter, and not the base below it.
        policy = merged(policy)
    if not section.enabled:
        if distributed.main_process():
            merge_and_save(policy, tokenizer, out / "model", dtype)
        return {"tokens": 0, "history": []}

    rows = from_parquet(inputs["data"] / "train.parquet")
    encoder = text_encoder(tokenizer, rows[0].prompt, ref.spec)
    examples = imitated_examples(rows, section.train_on, encoder, context.data.max_response_tokens)
    if n_left_out := len(rows) - len(examples):
        reporter.line(f"sft: of {n_left_out} of {len(rows)} prompts no response is preferred: they are left out")
    steps = total_steps(section, len(examples))
    seed_everything(context.seed)
    policy = trainable(policy, context.model.lora, task="CAUSAL_LM")
    policy = placed(policy)
    engine = Engine(policy, int(tokenizer.pad_token_id), dtype=dtype)
    looked_at = [example.tree for example in examples[:LIKELIHOOD_EXAMPLES]]
    before = nats_per_token(engine, looked_at)
    progress = StageProgress(reporter, "sft", steps)
    arguments = training_arguments(section, out, seed=context.seed, dtype=context.model.dtype, steps=steps)
    trainer = EngineTrainer(engine, arguments, examples, partial(completion_loss, engine), [progress])
    train_to_end(trainer, progress, out)
    check_likelihood(before, nats_per_token(engine, looked_at), policy.get_input_embeddings().weight.shape[0])
    if distributed.saves_models():
        merge_and_save(policy, tokenizer, out / "model", dtype)
    tokens = trained_tokens(section, steps, examples)
    return {"tokens": tokens, "history": progress.history, "n_examples": len(examples), "steps": steps}


def imitated_examples(
    rows: Sequence[PreferenceRow], train_on: str, encoder: TextEncoder, max_response_tokens: int
) -> list[Example]:
    """The rows with the responses that SFT imitates; those without any are left out. Raises DataError for none."""
    examples = []
    for row in rows:
        if imitated := [row.responses[i] for i in splits.imitated(row, train_on)]:
            examples.append(Example(encoder.encode(row.prompt, imitated, max_response_tokens).tree, []))
    if not examples:
        raise DataError(
            "no training prompt has a comparison, so none has a preferred response",
            where="sft.train_on",
            fix="all, which imitates every response, or data with comparisons",
        )
    return examples


def nats_per_token(engine: Engine, trees: Sequence[Tree]) -> float:
    """Mean negative log-likelihood of these responses' tokens."""
    engine.model.eval()
    with gathered(engine.model):
        return -float(torch.cat([logps for of_tree in engine.logps(trees) for logps in of_tree]).mean())


def check_likelihood(before: float, after: float, n_tokens: int) -> None:
    """Raises DivergedError where training ends worse than guessing among all ``n_tokens`` tokens of the vocabulary.

    ``before`` and ``after`` it are nats per response token. Both arms would start from a policy that knows less than
    nothing, and their verdict would be about noise. A base model may begin there, on texts that are strange to it.
    """
    guess = math.log(n_tokens)
    if after <= guess + 1.0 or (after <= before and after <= 2 * guess):
        return
    bad_before = math.isnan(before) or after <= before
    raise DivergedError(
        f"training diverged: a response token of the training data had a negative log-likelihood of {before:.3g} nats "
        f"before it and has {after:.3g} after it; guessing among all tokens has {guess:.3g}",
        where="stage sft",
        fix="take another base model: model.name" if bad_before else "lower sft.learning_rate",
    )
