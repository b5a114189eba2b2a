"""How fast this machine is with a recipe's model: a few timed passes, which take seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.models.encoding import TextEncoder
from toolkit.models.inspect import best_device, precision, torch_dtype
from toolkit.models.load import load_policy, trainable
from toolkit.models.resolve import resolve
from toolkit.preferences.rows import PreferenceRow
from toolkit.recipe.schema import Recipe
from toolkit.training.batch import Example, examples_of

# Enough response tokens to time. A batch of a larger model would take a minute.
TIMED_TOKENS = 2048
SAMPLED_TOKENS = 16  # of each response
SAMPLED_RESPONSES = 64
TIMED_CALLS = 3
ENOUGH_S = 5.0  # of one kind of work: a slow machine is timed by fewer calls


@dataclass(frozen=True)
class Speed:
    """Seconds: to load a model, and for a response token in training, in scoring and in sampling."""

    load_s: float
    train_s: float
    score_s: float
    sample_s: float


def calibrate(recipe: Recipe, rows: Sequence[PreferenceRow], encoder: TextEncoder) -> Speed:
    """Load the recipe's model once, and time a training step, a scoring pass and a sampled batch of the recipe's shape.

    Raises ModelError where the model cannot be loaded.
    """
    section, device = recipe.model, best_device()
    started = time.perf_counter()
    loaded: Any = load_policy(
        resolve(section.name, section.revision), section, dtype=None if section.lora else torch.float32
    )
    policy = trainable(loaded.to(device), section.lora, task="CAUSAL_LM")
    load_s = time.perf_counter() - started
    engine = Engine(policy, int(encoder.tokenizer.pad_token_id), dtype=torch_dtype(section.dtype))
    size = recipe.dpo.per_device_train_batch_size
    examples = _enough(examples_of(rows[:size], encoder, recipe.data.max_response_tokens))
    trees = [example.tree for example in examples]
    n_tokens = sum(len(ids) for tree in trees for ids in tree.response_ids)
    optimizer = torch.optim.AdamW(parameter for parameter in policy.parameters() if parameter.requires_grad)

    def train() -> None:
        for indices in engine.batches(trees):
            with precision(engine.device, engine.dtype):
                logps_N, _ = engine.token_logps(engine.pack([trees[i] for i in indices]))
            (-logps_N.mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    n_responses = min(SAMPLED_RESPONSES, recipe.ppo.per_device_train_batch_size)
    prompts = [tree.prompt_ids for tree in trees]
    batch = [prompts[i % len(prompts)] for i in range(n_responses)]
    params = SamplingParams(SAMPLED_TOKENS, batch_size=n_responses, stop_token_ids=(-1,))  # none of them ends early

    def sample() -> None:
        tokenizer = encoder.tokenizer
        sample_responses(policy, tokenizer, batch, lambda i, k: ("speed", i, k), params, dtype=engine.dtype)

    return Speed(
        load_s,
        train_s=_timed(train) / n_tokens,
        score_s=_timed(lambda: engine.logps(trees)) / n_tokens,
        sample_s=_timed(sample) / (n_responses * SAMPLED_TOKENS),
    )


def _enough(examples: Sequence[Example]) -> list[Example]:
    chosen: list[Example] = []
    n_tokens = 0
    for example in examples:
        chosen.append(example)
        n_tokens += sum(map(len, example.tree.response_ids))
        if n_tokens >= TIMED_TOKENS:
            break
    return chosen


def _timed(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, behind one that has what is done once: other processes work beside it."""
    times: list[float] = []
    while len(times) <= TIMED_CALLS and sum(times) < ENOUGH_S:
        started = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - started)
    return min(times[1:] or times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
