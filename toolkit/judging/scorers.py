"""Judges that score one response at a time. A comparison of two responses is the comparison of their scores.

``gold`` is the known gold reward, ``rm:MODEL`` a sequence classifier, ``implicit:POLICY,REFERENCE`` an implicit reward,
``python:MODULE:FUNCTION`` a function with TRL's signature of a reward, ``f(prompts, completions, **columns)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from toolkit.errors import RecipeError
from toolkit.files import module_fingerprint
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, preference_by_score, text_measures
from toolkit.judging.responses import PolicyResponses, SampledIds, Scores
from toolkit.judging.user_code import function_scores
from toolkit.models.resolve import resolve
from toolkit.preferences.gold import gold_rewards
from toolkit.preferences.rows import Prompt
from toolkit.storage.lazy import Computed


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
        from toolkit.judging.model_scorers import implicit_scores

        return implicit_scores(*_policy_and_reference(rest), prompts, responses, options, samples)
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
        from toolkit.judging.model_scorers import reward_scorer

        return reward_scorer(rest, prompt, options)
    if kind == "implicit":
        from toolkit.judging.model_scorers import implicit_scorer

        return implicit_scorer(*_policy_and_reference(rest), prompt, options)
    raise RecipeError(
        f"{spec!r} does not score responses", where="evaluate.judges", fix="use gold, rm:, implicit: or python:"
    )


def _policy_and_reference(names: str) -> tuple[str, str]:
    policy, reference = (name.strip() for name in names.split(",", 1))
    return policy, reference


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
