"""Language models in this process as judges: ``llm:MODEL``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.judging.answers import Answer, Keep, Question
from toolkit.judging.records import preference_by_log_odds
from toolkit.judging.templates import Template
from toolkit.models.encoding import TextEncoder, Tree
from toolkit.models.inspect import best_device, torch_dtype
from toolkit.models.load import load_policy
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer, require_chat_template
from toolkit.recipe.training import ModelSection

AT_ONCE = 32  # answers are stored after this many questions, so that an interrupted command loses no more


def ask_local_model(
    name: str,
    template: Template,
    questions: Sequence[Question],
    section: ModelSection,
    keep: Keep,
) -> None:
    """Ask the model every question, and call ``keep`` with each answer.

    A template of kind ``logprob`` takes the exact probabilities of A and B, any other one a greedy reply in words.
    Raises ModelError where the model cannot be loaded or has no chat template.
    """
    ref = resolve(name)
    tokenizer = load_tokenizer(ref)
    require_chat_template(tokenizer, name)
    encoder = TextEncoder(tokenizer, conversational=True)
    model: Any = load_policy(ref, section)
    model.to(best_device())
    dtype = torch_dtype(section.dtype)
    engine = Engine(model, int(tokenizer.pad_token_id), dtype=dtype)
    for start in range(0, len(questions), AT_ONCE):
        chunk = list(questions[start : start + AT_ONCE])
        prompts = [encoder.prompt(template.messages(q.prompt, q.first, q.second, q.principle)) for q in chunk]
        if template.kind == "logprob":
            answers = _letter_probabilities(engine, encoder, prompts)
        else:
            answers = _replies(model, encoder, prompts, template, dtype)
        for question, answer in zip(chunk, answers, strict=True):
            keep(question, answer)


def _letter_probabilities(engine: Engine, encoder: TextEncoder, prompts: Sequence[list[int]]) -> list[Answer]:
    """P(A) / (P(A) + P(B)) as the next token of each prompt: the two letters are branches of one tree."""
    letters = [encoder.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "AB"]
    answers = []
    for ids, (a, b) in zip(prompts, engine.logps([Tree(ids, letters) for ids in prompts]), strict=True):
        log_odds = float(a.double().sum() - b.double().sum())
        answers.append(Answer(preference_by_log_odds(log_odds), prompt_tokens=len(ids)))
    return answers


def _replies(
    model: Any, encoder: TextEncoder, prompts: Sequence[list[int]], template: Template, dtype: Any
) -> list[Answer]:
    """The verdicts of greedy replies."""
    params = SamplingParams(template.max_tokens, temperature=0.0)
    # Nothing is drawn at temperature 0, so the key does not matter.
    replies = sample_responses(model, encoder.tokenizer, prompts, lambda i, _: (i,), params, dtype=dtype)
    answers = []
    for ids, [reply] in zip(prompts, replies, strict=True):
        raw = encoder.decode(reply.ids)
        value, error = template.verdict(raw, cut=reply.truncated)
        answers.append(Answer(value, raw, error, len(ids), len(reply.ids)))
    return answers


def whole_groups(keys: Sequence[str], new: Collection[str]) -> list[int]:
    """The places of the groups of ``AT_ONCE`` questions, of all with these keys, that have one whose key is in ``new``.

    The last digits of an answer depend on what is computed with it. In whole groups an interrupted command ends with
    the answers that it would have had.
    """
    groups = (range(len(keys))[start : start + AT_ONCE] for start in range(0, len(keys), AT_ONCE))
    return [place for group in groups if any(keys[k] in new for k in group) for place in group]
