"""How fast this machine is with a recipe's models: a few timed passes, which take seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.engine.tree import TreeBatch
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.inspect import best_device, precision, torch_dtype
from toolkit.models.load import head_modules, load_policy, new_reward_model, reads_pairs, trainable
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.ppo.assembly import same_architecture
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
class Passes:
    """Seconds of one model: to load it, and for a response token in training and in scoring."""

    load_s: float
    train_s: float
    score_s: float


@dataclass(frozen=True)
class Speed:
    """Seconds of the recipe's model: to load it, and for a response token in training, in scoring and in sampling.

    ``base`` has those of ``reward_model.base``, where reward models start from it, for a token of the policy.
    ``critic_from_base`` says whether it can be PPO's critic as well.
    """

    load_s: float
    train_s: float
    score_s: float
    sample_s: float
    base: Passes | None = None
    critic_from_base: bool = False

    @property
    def policy(self) -> Passes:
        return Passes(self.load_s, self.train_s, self.score_s)

    @property
    def reward(self) -> Passes:
        """A reward model, or one member of an ensemble."""
        return self.base or self.policy


def calibrate(recipe: Recipe, rows: Sequence[PreferenceRow], encoder: TextEncoder) -> Speed:
    """Load the recipe's model, and time a training step, a scoring pass and a sampled batch of the recipe's shape.

    A ``reward_model.base`` is loaded and timed, too.

    Raises ModelError where a model cannot be loaded.
    """
    section = recipe.model
    rows = rows[: recipe.dpo.per_device_train_batch_size]
    examples = _enough(examples_of(rows, encoder, recipe.data.max_response_tokens))
    trees = [example.tree for example in examples]
    n_tokens = sum(len(ids) for tree in trees for ids in tree.response_ids)

    started = time.perf_counter()
    loaded: Any = load_policy(
        resolve(section.name, section.revision), section, dtype=None if section.lora else torch.float32
    )
    policy = trainable(loaded.to(best_device()), section.lora, task="CAUSAL_LM")
    load_s = time.perf_counter() - started
    engine = Engine(policy, int(encoder.tokenizer.pad_token_id), dtype=torch_dtype(section.dtype))
    train_s = _training_s(engine, trees, lambda batch: -engine.token_logps(batch)[0].mean()) / n_tokens
    score_s = _timed(lambda: engine.logps(trees)) / n_tokens

    n_responses = min(SAMPLED_RESPONSES, recipe.ppo.per_device_train_batch_size)
    prompts = [tree.prompt_ids for tree in trees]
    batch = [prompts[i % len(prompts)] for i in range(n_responses)]
    params = SamplingParams(SAMPLED_TOKENS, batch_size=n_responses, stop_token_ids=(-1,))  # none of them ends early

    def sample() -> None:
        tokenizer = encoder.tokenizer
        sample_responses(policy, tokenizer, batch, lambda i, k: ("speed", i, k), params, dtype=engine.dtype)

    speed = Speed(load_s, train_s, score_s, _timed(sample) / (n_responses * SAMPLED_TOKENS))
    if recipe.reward_model.base is None:
        return speed
    model, tokenizer, base = _time_base(recipe, rows, len(examples), n_tokens)
    reads_the_policy = tokenizer.get_vocab() == encoder.tokenizer.get_vocab()
    return replace(speed, base=base, critic_from_base=reads_the_policy and same_architecture(model, policy))


def _time_base(
    recipe: Recipe, rows: Sequence[PreferenceRow], n_examples: int, n_tokens: int
) -> tuple[Any, PreTrainedTokenizerBase, Passes]:
    """``reward_model.base`` with a new head, its tokenizer, and its times for ``n_tokens`` of the policy: those of the
    first ``n_examples`` of the rows.
    """
    section, base = recipe.model, resolve(str(recipe.reward_model.base))
    started = time.perf_counter()
    tokenizer = load_tokenizer(base)
    encoder = text_encoder(tokenizer, rows[0].prompt, base.spec, pair=reads_pairs(base))
    pad_id = int(tokenizer.pad_token_id)
    loaded = new_reward_model(base, section, pad_id, seed=0).to(best_device())
    model = trainable(loaded, section.lora, task="SEQ_CLS", modules_to_save=head_modules(loaded))
    load_s = time.perf_counter() - started
    engine = Engine(model, pad_id, dtype=torch_dtype(section.dtype))
    trees = [each.tree for each in examples_of(rows, encoder, recipe.data.max_response_tokens)[:n_examples]]
    train_s = _training_s(engine, trees, lambda batch: engine.branch_scores(batch).mean()) / n_tokens
    return model, tokenizer, Passes(load_s, train_s, _timed(lambda: engine.scores(trees)) / n_tokens)


def _training_s(engine: Engine, trees: Sequence[Tree], loss_of: Callable[[TreeBatch], torch.Tensor]) -> float:
    """Seconds of an optimiser step on the trees."""
    optimizer = torch.optim.AdamW(weight for weight in engine.model.parameters() if weight.requires_grad)

    def train() -> None:
        for indices in engine.batches(trees):
            with precision(engine.device, engine.dtype):
                loss = loss_of(engine.pack([trees[i] for i in indices]))
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return _timed(train)


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
