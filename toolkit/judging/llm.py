"""Language models as judges: ``openai:MODEL@BASE_URL`` over HTTP, ``llm:MODEL`` in this process.

Every pair is shown in both orders. Answers are stored as they arrive, and no question is asked twice (``answers.py``).
A question that failed counts as a failure, and the next run asks it again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolkit.engine.fast.processor import AUTO, fastest_dtype
from toolkit.errors import RecipeError
from toolkit.files import fingerprint
from toolkit.judging.answers import Answer, Keep, Question, Questions, remembering
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, preference_by_score, text_measures
from toolkit.judging.responses import PolicyResponses
from toolkit.judging.templates import Template, load_template
from toolkit.models.resolve import cache_folder, resolve
from toolkit.progress import Reporter
from toolkit.recipe.schema import JudgeSettings
from toolkit.recipe.training import ModelSection
from toolkit.storage.lazy import Computed
from toolkit.storage.locks import in_turn

MOST_REASONS = 5
SHOWN_OF_REPLY = 300  # characters of one that has no verdict


@dataclass(frozen=True)
class Usage:
    """What a judge's answers took: tokens as counted by the endpoint, USD where prices are set.

    Failed attempts count. ``new_*`` is what this call spent. The other numbers, and ``n_questions``, cover stored
    answers as well: the price of all of them. ``failures``: reason -> how often, the most frequent ones first.
    """

    judge: str
    template: str
    n_questions: int
    n_remembered: int
    n_failed: int
    prompt_tokens: int
    completion_tokens: int
    new_prompt_tokens: int
    new_completion_tokens: int
    wall_s: float
    cost_usd: float | None
    new_cost_usd: float | None
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def silent(self) -> bool:
        """Whether every question failed."""
        return self.n_questions > 0 and self.n_failed == self.n_questions


def is_language_model(spec: str) -> bool:
    """Whether a judge is a language model, which compares two responses, and not a function that scores one."""
    return spec.partition(":")[0] in ("llm", "openai")


def model_identity(spec: str, section: ModelSection) -> str:
    """What computes the answers of ``llm:MODEL``: another model under the same name is asked again, and so is the same
    one in another precision or with another attention.

    "" for ``openai:``, whose endpoint does not tell.
    """
    kind, _, name = spec.partition(":")
    if kind != "llm":
        return ""
    dtype = fastest_dtype() if section.dtype == AUTO else section.dtype
    return fingerprint([resolve(name).identity, dtype, section.attn_implementation])


def memory_file() -> Path:
    """Where answers are stored, for all runs of one user."""
    return cache_folder() / "judgements.sqlite"


def judge_pairs(
    spec: str,
    pairs: Sequence[tuple[str, str]],
    responses: PolicyResponses,
    options: JudgeOptions,
    reporter: Reporter,
) -> tuple[list[Judgement], Usage]:
    """Judgements of ``(policy, baseline)`` pairs, the k-th sample of one against the k-th of the other, and their cost.

    Every pair of samples has two judgements, one for each order; one where the template scores responses alone. Two
    equal texts are a tie that nobody is asked about.
    Raises ModelError where the judge cannot be used at all. The answers until then are stored.
    """
    template = load_template(options.settings.template or ("logprob" if spec.startswith("llm:") else "choice"))
    if template.principled:
        raise RecipeError(
            f"template {template.name!r} shows a principle, and a comparison has none",
            where=spec,
            fix="label data with it (duel label --principles), or name another template",
        )
    questions = Questions()
    comparisons = list(_comparisons(spec, template, pairs, responses, questions, options.model))
    answers, usage = ask_all(spec, template, questions, options, reporter)
    return [comparison.judged(answers) for comparison in comparisons], usage


@dataclass(frozen=True)
class _Comparison:
    """A judgement without its preference, and the keys of the questions that it takes.

    They are one question about both responses, one about each of them, or none where their texts are equal.
    """

    blank: Judgement
    keys: list[str]

    def judged(self, answers: Mapping[str, Answer]) -> Judgement:
        values = []
        for key in self.keys:
            answer = answers[key]
            if answer.value is None:
                error = f"{answer.error}: {answer.raw!r}" if answer.raw else answer.error
                return replace(self.blank, error=error)
            values.append(answer.value)
        if not values:
            return replace(self.blank, preference=0.5)
        if len(values) == 2:
            return replace(self.blank, preference=preference_by_score(*values))
        return replace(self.blank, preference=1.0 - values[0] if self.blank.order == 1 else values[0])


def _comparisons(
    spec: str,
    template: Template,
    pairs: Sequence[tuple[str, str]],
    responses: PolicyResponses,
    questions: Questions,
    section: ModelSection,
) -> Iterator[_Comparison]:
    """The comparisons of these pairs, whose questions are added to ``questions``."""
    scored_alone, model = template.kind == "score", model_identity(spec, section)
    for policy, baseline in pairs:
        for prompt_id, prompt, a, b in responses.paired(policy, baseline):
            for order in (None,) if scored_alone else (0, 1):
                blank = Judgement(prompt_id, policy, baseline, spec, None, order, **text_measures(a, b))
                shown = [(a, ""), (b, "")] if scored_alone else [(b, a) if order == 1 else (a, b)]
                keys = [
                    questions.add(Question(spec, template.fingerprint, prompt, first, second, model=model))
                    for first, second in (shown if a != b else ())
                ]
                yield _Comparison(blank, keys)


def ask_all(
    spec: str, template: Template, questions: Questions, options: JudgeOptions, reporter: Reporter
) -> tuple[dict[str, Answer], Usage]:
    """The answer to every question by its key, failures among them. Questions with a stored answer are not asked.

    Of the replies only the beginning is kept, and of failures alone: the rest is stored.

    Raises ModelError where the judge cannot be used at all. The answers until then are stored.
    """
    started = time.monotonic()
    # Of two processes with the same questions one asks, and the other finds the answers.
    turn = memory_file().with_name(f"asking-{fingerprint([spec, *sorted(questions.keys)])}.lock")
    with in_turn(turn, reporter.line), remembering(memory_file()) as memory:
        stored = memory.each_answer(questions)
        answers = {key: _without_reply(answer) for key, answer in stored if not template.was_cut(answer)}
        n_remembered, keys = len(answers), list(questions.keys)
        missing, spent = {key for key in keys if key not in answers}, [0, 0]
        n_new = len(missing)
        with reporter.task(f"judge {spec}", n_new) as task:

            def keep(question: Question, answer: Answer) -> None:
                if (key := question.key) not in missing:
                    return
                memory.keep(question, answer)
                answers[key] = _without_reply(answer)
                spent[0] += answer.prompt_tokens
                spent[1] += answer.completion_tokens
                task.advance()

            if missing:
                places = _with_groups(spec, keys, missing)
                _ask(spec, template, Computed(places, questions.__getitem__), options, keep)
        tokens = memory.tokens(questions)
    usage = Usage(
        judge=spec,
        template=template.name,
        n_questions=len(questions),
        n_remembered=n_remembered,
        n_failed=sum(answer.value is None for answer in answers.values()),
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
        new_prompt_tokens=spent[0],
        new_completion_tokens=spent[1],
        wall_s=round(time.monotonic() - started, 3),
        cost_usd=_cost(tokens, options.settings),
        new_cost_usd=_cost((spent[0], spent[1]), options.settings),
        failures=most_frequent(answer.error for answer in answers.values() if answer.value is None),
    )
    money = "" if usage.new_cost_usd is None else f", {usage.new_cost_usd:.4f} USD"
    reporter.line(
        f"judge {spec}: {n_new} asked, {n_remembered} remembered, {usage.n_failed} failed, "
        f"{spent[0]} + {spent[1]} tokens (prompt + completion){money}"
    )
    for reason, times in usage.failures.items():
        reporter.line(f"  failed {times:,} x: {reason}")
    return answers, usage


def _without_reply(answer: Answer) -> Answer:
    return replace(answer, raw=answer.raw[:SHOWN_OF_REPLY] if answer.value is None else "")


def most_frequent(reasons: Iterable[str]) -> dict[str, int]:
    """Reason -> how often, for the most frequent ones.

    >>> most_frequent(["no verdict", "too long", "no verdict"])
    {'no verdict': 2, 'too long': 1}
    """
    return dict(Counter(reasons).most_common(MOST_REASONS))


def _with_groups(spec: str, keys: Sequence[str], missing: Collection[str]) -> Sequence[int]:
    """The places of the questions to ask for the missing answers.

    An endpoint is asked without torch, whose import takes long.
    """
    if not spec.startswith("llm:"):
        return [place for place, key in enumerate(keys) if key in missing]
    from toolkit.judging.local_model import whole_groups

    return whole_groups(keys, missing)


def _ask(spec: str, template: Template, questions: Sequence[Question], options: JudgeOptions, keep: Keep) -> None:
    kind, _, name = spec.partition(":")
    if kind == "openai":
        from toolkit.judging.endpoint import ask_endpoint

        ask_endpoint(name, template, questions, options.settings, keep)
    else:
        from toolkit.judging.local_model import ask_local_model

        ask_local_model(name, template, questions, options.model, keep)


def _cost(tokens: tuple[int, int], settings: JudgeSettings) -> float | None:
    if settings.prompt_price_usd is None or settings.completion_price_usd is None:
        return None
    return (tokens[0] * settings.prompt_price_usd + tokens[1] * settings.completion_price_usd) / 1e6
