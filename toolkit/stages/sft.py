"""Supervised fine-tuning, merged into plain weights: the policy that both arms start from and refer to."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from toolkit import models, processes, training
from toolkit.locating import resolve
from toolkit.preferences import splits
from toolkit.preferences.encoding import encode, is_conversation, response_end
from toolkit.preferences.reading import from_parquet
from toolkit.preferences.rows import PreferenceRow
from toolkit.progress import Reporter
from toolkit.recipe import SftSection
from toolkit.scoring import Engine


def run(settings: Any, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``model/``, plain merged weights in ``model.dtype``. With ``sft.enabled`` off, the model as it came."""
    section: SftSection = settings.sft
    ref = resolve(settings.model.name, settings.model.revision)
    tokenizer = models.load_tokenizer(ref, settings.model.chat_template)
    dtype = models.DTYPES[settings.model.dtype]
    policy = models.load_policy(ref, settings.model, dtype=None if settings.model.lora else torch.float32)
    models.check_vocabulary(policy.get_input_embeddings().weight.shape[0], tokenizer, ref.spec)
    if ref.kind == "adapter":
        # Both arms must refer to the weights with this adapter in them, not to the base below it.
        policy = policy.merge_and_unload()
    if not section.enabled:
        if processes.main_process():
            models.merge_and_save(policy, tokenizer, out / "model", dtype)
        return {"tokens": 0, "history": []}

    rows = from_parquet(inputs["data"] / "train.parquet")
    end_id = response_end(tokenizer, is_conversation(rows[0].prompt))
    examples = []
    for row in rows:
        chosen = [row.responses[i] for i in targets(row, section.train_on)]
        limit = settings.data.max_response_tokens
        encoded = encode(tokenizer, row.prompt, chosen, end_id=end_id, max_response_tokens=limit)
        examples.append(training.Example(encoded.tree, []))

    steps = training.total_steps(section, len(examples))
    training.seed_everything(settings.seed)
    policy = models.trainable(policy, settings.model.lora, task="CAUSAL_LM").to(models.best_device())
    engine = Engine(policy, int(tokenizer.pad_token_id), dtype=dtype)
    watch = training.Watch(reporter, "sft", steps)
    arguments = training.arguments(section, out, seed=settings.seed, dtype=settings.model.dtype, steps=steps)
    trainer = training.EngineTrainer(engine, arguments, examples, partial(completion_loss, engine), [watch])
    trainer.train(resume_from_checkpoint=training.last_checkpoint(out))
    if processes.main_process():
        models.merge_and_save(policy, tokenizer, out / "model", dtype)
    tokens = training.trained_tokens(section, steps, examples)
    return {"tokens": tokens, "history": watch.history, "n_examples": len(examples), "steps": steps}


def completion_loss(engine: Engine, batch: training.PairBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean negative log-likelihood of the batch's response tokens, in nats; the prompt is not trained on."""
    logps_N, _ = engine.token_logps(batch.trees)
    return -logps_N.mean() * batch.token_share, {"nll/token": -logps_N}


def targets(row: PreferenceRow, train_on: str) -> list[int]:
    """Which responses to imitate: all, or the one that wins most of its comparisons (the first of equals)."""
    if train_on == "all":
        return list(range(len(row.responses)))
    wins = [0.0] * len(row.responses)
    for pair in splits.pairs(row):
        wins[pair.i] += pair.p * pair.weight
        wins[pair.j] += (1 - pair.p) * pair.weight
    return [max(range(len(wins)), key=lambda i: (wins[i], -i))]
