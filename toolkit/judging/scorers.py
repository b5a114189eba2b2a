"""Judges that score one response at a time. A comparison of two responses is the comparison of their scores.

``gold`` is the known gold reward, ``rm:MODEL`` a sequence classifier, ``implicit:POLICY,REFERENCE`` an implicit reward,
``python:MODULE:FUNCTION`` a function with TRL's signature of a reward, ``f(prompts, completions, **columns)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from toolkit.engine.engine import Engine
from toolkit.engine.reward_model import load_scorer
from toolkit.errors import RecipeError
from toolkit.evals.implicit_reward import defined_by
from toolkit.files import module_fingerprint
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, preference_by_score, text_measures
from toolkit.judging.responses import Computed, PolicyResponses, SampledIds
from toolkit.judging.user_code import function_scores
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.inspect import best_device, torch_dtype
from toolkit.models.load import load_policy, reads_pairs
from toolkit.models.resolve import resolve, training_record
from toolkit.models.stored import StoredTrees
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.gold import gold_rewards
from toolkit.preferences.rows import Prompt

Scores = list[list[float]]  # for each prompt, one score for each of its responses
LogpSums = list[list[tuple[float, int]]]  # for each prompt, of each response: the sum over its tokens, and their number


def judge_identity(judge: str) -> list[Any]:
    """A judge that scores, by what it is and not by its name alone: its models' weights, its function's source."""
    kind, _, rest = judge.partition(":")
    if kind in ("rm", "implicit"):
        return [kind, *(resolve(name.strip()).fingerprint for name in rest.split(",", 1))]
    return [judge, module_fingerprint(rest.partition(":")[0]) if kind == "python" else None]


class Scorer(Protocol):
    """The scores of responses to prompts, as :func:`score` gives them."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[str]],
        samples: Sequence[SampledIds | None] | None = None,
    ) -> Scores: ...


def score(
    spec: str,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    options: JudgeOptions,
    samples: Sequence[SampledIds | None] | None = None,
) -> Scores:
    """For each prompt, the judge's score of each of its responses.

    A model scores what was sampled: with ``samples`` the ids themselves, or the text without an end where a response
    was truncated. Without them every response is taken as one that ended.

    Raises RecipeError for a judge that does not score, ModelError for a model that cannot.
    """
    kind, _, rest = spec.partition(":")
    if kind == "implicit":  # one of its models in memory at a time
        policy, reference = (name.strip() for name in rest.split(",", 1))
        policy_sums = _loaded(policy, prompts[0], options).sums(prompts, responses, samples)
        reference_sums = _loaded(reference, prompts[0], options).sums(prompts, responses, samples)
        return _implicit(policy, policy_sums, reference_sums)
    return scorer(spec, prompts[0], options)(prompts, responses, samples)


def scorer(spec: str, prompt: Prompt, options: JudgeOptions) -> Scorer:
    """:func:`score` as a function that can be called again and again: the judge's models are loaded once.

    ``prompt`` is one of those to come, which are all text or all messages, as it is.
    """
    kind, _, rest = spec.partition(":")
    if kind == "gold":
        return lambda prompts, responses, samples=None: [
            gold_rewards([prompt] * len(texts), list(texts)) for prompt, texts in zip(prompts, responses, strict=True)
        ]
    if kind == "python":
        return lambda prompts, responses, samples=None: _function_scores(rest, prompts, responses)
    if kind == "rm":
        return _reward_scorer(rest, prompt, options)
    if kind == "implicit":
        policy, reference = (name.strip() for name in rest.split(",", 1))
        models = [_loaded(name, prompt, options) for name in (policy, reference)]
        return lambda prompts, responses, samples=None: _implicit(
            policy, *(model.sums(prompts, responses, samples) for model in models)
        )
    raise RecipeError(
        f"{spec!r} does not score responses", where="evaluate.judges", fix="use gold, rm:, implicit: or python:"
    )


def _reward_scorer(spec: str, prompt: Prompt, options: JudgeOptions) -> Scorer:
    ref = resolve(spec)
    tokenizer = load_tokenizer(ref)
    encoder = text_encoder(tokenizer, prompt, ref.spec, pair=reads_pairs(ref))
    model = load_scorer(ref, options.model, tokenizer, token_budget=options.token_budget)
    return lambda prompts, responses, samples=None: model.scores(
        _trees(encoder, options.max_response_tokens, prompts, responses, samples)
    )


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


def _function_scores(spec: str, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> Scores:
    flat_prompts = [prompt for prompt, texts in zip(prompts, responses, strict=True) for _ in texts]
    scores = iter(function_scores(spec, flat_prompts, [text for texts in responses for text in texts]))
    return [[next(scores) for _ in texts] for texts in responses]


def score_policies(spec: str, responses: PolicyResponses, options: JudgeOptions) -> dict[str, Scores]:
    """Each policy's scores. One call of :func:`score` sees all responses to a prompt together."""
    names = list(responses.texts)
    places = range(len(responses.prompts))
    together = Computed(places, lambda p: [text for name in names for text in responses.texts[name][p]])
    by_policy: dict[str, Scores] = {name: [] for name in names}
    samples = None if responses.truncated is None else Computed(places, responses.prompt_samples)
    for p, of_prompt in enumerate(score(spec, responses.prompts, together, options, samples)):
        remaining = iter(of_prompt)
        for name in names:
            by_policy[name].append([next(remaining) for _ in responses.texts[name][p]])
    return by_policy


def compare(
    judge: str, policy: str, baseline: str, responses: PolicyResponses, scores: Mapping[str, Scores]
) -> list[Judgement]:
    """One judgement for each prompt and pair of samples: 1, 1/2 or 0 by which scores higher.

    ``scores[policy]`` are the scores of that policy's responses. A score that is NaN makes a failed judgement.
    """
    out = []
    for row, prompt_id in enumerate(responses.prompt_ids):
        texts_b = responses.texts[baseline][row]
        for a, text_a in zip(scores[policy][row], responses.texts[policy][row], strict=True):
            for b, text_b in zip(scores[baseline][row], texts_b, strict=True):
                failed = math.isnan(a) or math.isnan(b)
                out.append(
                    Judgement(
                        prompt_id=prompt_id,
                        policy=policy,
                        baseline=baseline,
                        judge=judge,
                        preference=None if failed else preference_by_score(a, b),
                        **text_measures(text_a, text_b),
                        error="the judge gave no score" if failed else "",
                    )
                )
    return out
