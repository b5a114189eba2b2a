"""The models among the judges that score: ``rm:MODEL`` and ``implicit:POLICY,REFERENCE``.

They have a file of their own, since a command that asks other judges starts without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.engine.engine import Engine
from toolkit.engine.reward_model import load_scorer
from toolkit.evals.implicit_reward import defined_by
from toolkit.judging.options import JudgeOptions
from toolkit.judging.responses import SampledIds, Scores
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.inspect import best_device, torch_dtype
from toolkit.models.load import load_policy, reads_pairs
from toolkit.models.resolve import resolve, training_record
from toolkit.models.stored import StoredTrees
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.rows import Prompt

LogpSums = list[list[tuple[float, int]]]  # for each prompt, of each response: the sum over its tokens, and their number


def reward_scorer(spec: str, prompt: Prompt, options: JudgeOptions) -> Callable[..., Scores]:
    """A reward model in memory as a :class:`toolkit.judging.scorers.Scorer`."""
    ref = resolve(spec)
    tokenizer = load_tokenizer(ref)
    encoder = text_encoder(tokenizer, prompt, ref.spec, pair=reads_pairs(ref))
    model = load_scorer(ref, options.model, tokenizer, token_budget=options.token_budget)
    return lambda prompts, responses, samples=None: model.scores(
        _trees(encoder, options.max_response_tokens, prompts, responses, samples)
    )


def implicit_scorer(policy: str, reference: str, prompt: Prompt, options: JudgeOptions) -> Callable[..., Scores]:
    """A policy and its reference in memory as a :class:`toolkit.judging.scorers.Scorer`."""
    models = [_loaded(name, prompt, options) for name in (policy, reference)]
    return lambda prompts, responses, samples=None: _implicit(
        policy, *(model.sums(prompts, responses, samples) for model in models)
    )


def implicit_scores(
    policy: str,
    reference: str,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    options: JudgeOptions,
    samples: Sequence[SampledIds | None] | None,
) -> Scores:
    """What :func:`implicit_scorer` gives, with one of the two models in memory at a time."""
    policy_sums = _loaded(policy, prompts[0], options).sums(prompts, responses, samples)
    reference_sums = _loaded(reference, prompts[0], options).sums(prompts, responses, samples)
    return _implicit(policy, policy_sums, reference_sums)


def _implicit(policy: str, policy_sums: LogpSums, reference_sums: LogpSums) -> Scores:
    reward = defined_by(training_record(resolve(policy)), beta=1.0)
    return [
        [reward(a - b, n_tokens) for (a, n_tokens), (b, _) in zip(*of_prompt, strict=True)]
        for of_prompt in zip(policy_sums, reference_sums, strict=True)
    ]


@dataclass(frozen=True)
class _Model:
    """A policy in memory with the encoder of its tokenizer."""

    engine: Engine
    encoder: TextEncoder
    max_response_tokens: int

    def sums(self, *texts: Any) -> LogpSums:
        trees = _trees(self.encoder, self.max_response_tokens, *texts)
        return self.engine.map_logps(trees, lambda logps: (float(logps.sum()), len(logps)))


def _trees(
    encoder: TextEncoder,
    max_response_tokens: int,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    samples: Sequence[SampledIds | None] | None,
) -> StoredTrees:
    return StoredTrees(
        _tree(encoder, prompt, texts, sampled, max_response_tokens)
        for prompt, texts, sampled in zip(prompts, responses, samples or [None] * len(prompts), strict=True)
    )


def _loaded(spec: str, prompt: Prompt, options: JudgeOptions) -> _Model:
    ref = resolve(spec)
    model = load_policy(ref, options.model).to(best_device())
    tokenizer = load_tokenizer(ref)
    encoder = text_encoder(tokenizer, prompt, ref.spec)
    dtype = torch_dtype(options.model.dtype)
    engine = Engine(model, int(tokenizer.pad_token_id), dtype=dtype, token_budget=options.token_budget)
    return _Model(engine, encoder, options.max_response_tokens)


def _tree(
    encoder: TextEncoder, prompt: Prompt, texts: Sequence[str], sampled: SampledIds | None, max_response_tokens: int
) -> Tree:
    if sampled is None:
        return encoder.encode(prompt, texts, max_response_tokens).tree
    if sampled.ids is None:
        return encoder.encode_samples(prompt, texts, sampled.truncated)
    return encoder.as_sampled(prompt, texts, sampled.ids, sampled.truncated)
