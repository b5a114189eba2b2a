"""Judges that score one response at a time. A comparison of two responses is the comparison of their scores.

``gold`` is the known gold reward, ``rm:MODEL`` a sequence classifier, ``implicit:POLICY,REFERENCE`` an implicit reward,
``python:MODULE:FUNCTION`` a function with TRL's signature of a reward, ``f(prompts, completions, **columns)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from toolkit.engine.engine import Engine
from toolkit.errors import RecipeError
from toolkit.evals.implicit_reward import defined_by
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, preference_by_score, text_measures
from toolkit.judging.responses import PolicyResponses, SampledIds
from toolkit.judging.user_code import function_scores
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.inspect import DTYPES, best_device
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.resolve import ModelRef, resolve, training_record
from toolkit.models.save import reward_mean
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.gold import gold_rewards
from toolkit.preferences.rows import Prompt
from toolkit.recipe.schema import ModelSection

Scores = list[list[float]]  # for each prompt, one score for each of its responses


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
    if kind == "gold":
        return [
            gold_rewards([prompt] * len(texts), list(texts)) for prompt, texts in zip(prompts, responses, strict=True)
        ]
    if kind == "python":
        return _function_scores(rest, prompts, responses)
    if kind == "rm":
        ref = resolve(rest)
        engine, trees = _loaded(load_reward_model, ref, prompts, responses, options, samples)
        mean = reward_mean(ref.path)
        return [[value - mean for value in values] for values in engine.scores(trees)]
    if kind == "implicit":
        policy, _, reference = rest.partition(",")
        reward = defined_by(training_record(resolve(policy.strip())), beta=1.0)
        policy_logps = _token_logps(policy.strip(), prompts, responses, options, samples)
        reference_logps = _token_logps(reference.strip(), prompts, responses, options, samples)
        return [
            [reward(float(a.sum()) - float(b.sum()), len(a)) for a, b in zip(*of_prompt, strict=True)]
            for of_prompt in zip(policy_logps, reference_logps, strict=True)
        ]
    raise RecipeError(
        f"{spec!r} does not score responses", where="evaluate.judges", fix="use gold, rm:, implicit: or python:"
    )


def _token_logps(
    policy: str,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    options: JudgeOptions,
    samples: Sequence[SampledIds | None] | None,
) -> list[list[torch.Tensor]]:
    """For each prompt, for each response: the log-probabilities of its tokens."""
    engine, trees = _loaded(load_policy, resolve(policy), prompts, responses, options, samples)
    return engine.logps(trees)


def _loaded(
    load: Callable[[ModelRef, ModelSection], Any],
    ref: ModelRef,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    options: JudgeOptions,
    samples: Sequence[SampledIds | None] | None,
) -> tuple[Engine, list[Tree]]:
    """The engine of a model, and the prompts with their responses as its token ids."""
    model = load(ref, options.model).to(best_device())
    tokenizer = load_tokenizer(ref)
    encoder = text_encoder(tokenizer, prompts[0], ref.spec)
    trees = [
        _tree(encoder, prompt, texts, sampled, options.max_response_tokens)
        for prompt, texts, sampled in zip(prompts, responses, samples or [None] * len(prompts), strict=True)
    ]
    dtype = DTYPES[options.model.dtype]
    return Engine(model, int(tokenizer.pad_token_id), dtype=dtype, token_budget=options.token_budget), trees


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
    together = [[text for name in names for text in responses.texts[name][p]] for p in range(len(responses.prompts))]
    by_policy: dict[str, Scores] = {name: [] for name in names}
    samples = [responses.prompt_samples(p) for p in range(len(responses.prompts))]
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
        for a, text_a in zip(scores[policy][row], responses.texts[policy][row], strict=True):
            for b, text_b in zip(scores[baseline][row], responses.texts[baseline][row], strict=True):
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
