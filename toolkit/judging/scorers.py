"""Judges that score one response at a time; a comparison of two responses is the comparison of their scores.

``gold`` the known gold reward, ``rm:MODEL`` a sequence classifier, ``implicit:POLICY,REFERENCE`` an implicit reward,
``python:MODULE:FUNCTION`` a function of TRL's reward signature ``f(prompts, completions, **columns)``.
``file:PATH`` does not score: its recorded judgements are read with :mod:`toolkit.judging.records`.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Sequence
from typing import Any

from toolkit.engine.engine import Engine
from toolkit.errors import ModelError, RecipeError
from toolkit.judging.records import Judgement, measured
from toolkit.models.encoding import Tree, text_encoder
from toolkit.models.inspect import DTYPES, best_device
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.save import reward_mean
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.gold import gold_rewards
from toolkit.preferences.rows import Prompt
from toolkit.recipe.schema import ModelSection

Scores = list[list[float]]


def score(
    spec: str,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    section: ModelSection,
    *,
    max_response_tokens: int,
    token_budget: int | None = None,
) -> Scores:
    """For every prompt, the judge's score of each of its responses.

    Raises RecipeError for a judge that does not score, ModelError for a model that cannot.
    """
    kind, _, rest = spec.partition(":")
    if kind == "gold":
        return [
            gold_rewards([prompt] * len(texts), list(texts)) for prompt, texts in zip(prompts, responses, strict=True)
        ]
    if kind == "python":
        return _from_function(rest, prompts, responses)
    if kind == "rm":
        ref = resolve(rest)
        model = load_reward_model(ref, section).to(best_device())
        trees, tokenizer = _trees(ref, prompts, responses, max_response_tokens)
        engine = Engine(model, int(tokenizer.pad_token_id), dtype=DTYPES[section.dtype], token_budget=token_budget)
        mean = reward_mean(ref.path)
        return [[value - mean for value in values] for values in engine.scores(trees)]
    if kind == "implicit":
        policy, _, reference = rest.partition(",")
        logps = []
        for name in (policy.strip(), reference.strip()):
            ref = resolve(name)
            model = load_policy(ref, section).to(best_device())
            trees, tokenizer = _trees(ref, prompts, responses, max_response_tokens)
            engine = Engine(model, int(tokenizer.pad_token_id), dtype=DTYPES[section.dtype], token_budget=token_budget)
            logps.append([[float(t.sum()) for t in per_prompt] for per_prompt in engine.logps(trees)])
        return [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(*logps, strict=True)]
    raise RecipeError(
        f"{spec!r} does not score responses", where="evaluate.judges", fix="use gold, rm:, implicit: or python:"
    )


def _trees(
    ref: Any, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]], limit: int
) -> tuple[list[Tree], Any]:
    tokenizer = load_tokenizer(ref)
    encoder = text_encoder(tokenizer, prompts[0], ref.spec)
    encoded = [encoder.encode(prompt, texts, limit).tree for prompt, texts in zip(prompts, responses, strict=True)]
    return encoded, tokenizer


def _from_function(spec: str, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> Scores:
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"the judge's function cannot be imported: {error}",
            where=f"python:{spec}",
            fix="name it as python:MODULE:FUNCTION, with the module on PYTHONPATH",
        ) from error
    if inspect.iscoroutinefunction(function):
        raise RecipeError("the judge's function is asynchronous", where=f"python:{spec}", fix="give a plain function")
    flat_prompts = [prompt for prompt, texts in zip(prompts, responses, strict=True) for _ in texts]
    flat = [text for texts in responses for text in texts]
    values = list(function(prompts=flat_prompts, completions=flat))
    if len(values) != len(flat):
        raise ModelError(f"the judge returned {len(values)} scores for {len(flat)} responses", where=f"python:{spec}")
    scores = iter(math.nan if value is None else float(value) for value in values)
    return [[next(scores) for _ in texts] for texts in responses]


def compare(
    judge: str,
    policy: str,
    baseline: str,
    prompt_ids: Sequence[str],
    scores: tuple[Scores, Scores],
    texts: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]],
) -> list[Judgement]:
    """One judgement per prompt and pair of samples: 1, 1/2 or 0 by which scores higher; a NaN score is a failure."""
    out = []
    for row, prompt_id in enumerate(prompt_ids):
        for a, text_a in zip(scores[0][row], texts[0][row], strict=True):
            for b, text_b in zip(scores[1][row], texts[1][row], strict=True):
                failed = math.isnan(a) or math.isnan(b)
                preference = None if failed else 1.0 if a > b else 0.0 if a < b else 0.5
                out.append(
                    Judgement(
                        prompt_id=prompt_id,
                        policy=policy,
                        baseline=baseline,
                        judge=judge,
                        preference=preference,
                        **measured(text_a, text_b),
                        error="the judge gave no score" if failed else "",
                    )
                )
    return out
