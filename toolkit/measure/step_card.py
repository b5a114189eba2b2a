"""``duel rm-card --steps``: how good a process reward model is on labelled steps, beside the implicit reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, RecipeError
from toolkit.evals.intervals import DEFAULT_INTERVALS, BootstrapOptions
from toolkit.evals.process import ScoredSolution
from toolkit.files import fingerprint, read_json, write_json, write_table
from toolkit.measure.card_scores import scorer_identity, split_pair
from toolkit.measure.options import ScoringOptions
from toolkit.measure.process import (
    ImplicitSteps,
    StepScoring,
    explicit_steps,
    implicit_steps,
    process_head,
    process_results,
)
from toolkit.measure.reading import ReadingOptions
from toolkit.measure.rewards import PolicyPair, RewardOptions, resolve_pair
from toolkit.measure.rm_card import CardOptions, check_options, content_of, refuse_other
from toolkit.models.encoding import TextEncoder
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.solutions import Solution, as_prompts_of
from toolkit.preferences.steps import read_steps, step_source_path
from toolkit.progress import Reporter
from toolkit.runs.kinds import CARD_FILE, refuse_others_folder
from toolkit.runs.store import RunFolder

STEPS_FILE = "steps.parquet"


def step_card(
    model: str,
    steps: str,
    options: CardOptions,
    reading: ReadingOptions,
    scoring: ScoringOptions,
    *,
    out: Path | None = None,
    force: bool = False,
    reporter: Reporter,
) -> dict[str, Any]:
    """The figures of ``toolkit.evals.process`` as one document; with ``out`` it is written, with a table of steps.

    A folder that has this card already is not computed again. ``reading.limit`` counts prompts.

    Raises ModelError for a model that is no process reward model, DataError for steps that cannot be read, RecipeError
    for options that it does not have, StoreError where ``out`` has the card of something else, or files that no card
    wrote.
    """
    check_options(options)
    for name, given in (
        ("--by", options.by is not None),
        ("--judge", options.judge is not None),
        ("--best-of", options.best_of is not None),
        ("--plain", reading.plain),
    ):
        if given:
            raise RecipeError("the card of steps has no such setting", where=name, fix="leave it out")
    if out is None:
        return _card(model, steps, options, reading, scoring, reporter)[0]
    content = content_of(steps, step_source_path(steps))
    scorers = scorer_identity(model, options.implicit)
    identity = fingerprint([scorers, content, asdict(options), asdict(reading), asdict(scoring)])
    refuse_others_folder(out, "card", (CARD_FILE, STEPS_FILE), force)
    with RunFolder(out).lock():
        refuse_other(out / CARD_FILE, identity, force)
        if (out / CARD_FILE).is_file() and (out / STEPS_FILE).is_file() and not force:
            return read_json(out / CARD_FILE)
        card, table = _card(model, steps, options, reading, scoring, reporter)
        card["inputs"] = identity
        (out / STEPS_FILE).unlink(missing_ok=True)  # of another card
        write_json(out / CARD_FILE, card)  # before the table: it says whose that is
        write_table(table, out / STEPS_FILE)
    return card


def _card(
    model: str,
    steps: str,
    options: CardOptions,
    reading: ReadingOptions,
    scoring: ScoringOptions,
    reporter: Reporter,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The card, and a row for each step."""
    ref = resolve(model)
    head = process_head(ref)
    pair = _implicit_pair(options, reporter)
    data = read_steps(steps, split=reading.split)
    for warning in data.report.warnings():
        reporter.line(f"{steps}: {warning}")
    tokenizer = load_tokenizer(ref)
    encoder = TextEncoder(tokenizer, head.conversational)
    solutions = limited(as_prompts_of(data.solutions, encoder.conversational, steps), encoder, reading, steps)
    how = StepScoring(scoring.model, reading.max_response_tokens, scoring.batch_tokens)
    explicit = explicit_steps(ref, solutions, how, reporter)
    implicit, words = None, None
    if pair is not None and pair.reference is not None:
        words = f"running sums of beta * log(pi / pi_ref), with beta = {pair.reward.beta:g}"
        implicit = implicit_steps(
            pair.policy, pair.reference, pair.reward.beta, head.separator, solutions, how, reporter
        )
    intervals: BootstrapOptions = {**DEFAULT_INTERVALS, "seed": options.seed}
    card: dict[str, Any] = {
        "schema_version": 1,
        "kind": "process",
        "model": model,
        **asdict(head),
        "implicit_model": options.implicit,
        "implicit_reward": words,
        "steps": steps,
        "data": asdict(data.report),
        "n_prompts": len({solution.prompt_id for solution in solutions}),
        "n_solutions": len(solutions),
        "intervals": dict(intervals),
        **process_results(explicit, implicit, intervals),
    }
    return card, _table(explicit, implicit)


def _implicit_pair(options: CardOptions, reporter: Reporter) -> PolicyPair | None:
    """The policy and the reference of the implicit reward, where one is asked for.

    Raises RecipeError where it has no reference, and what :func:`resolve_pair` raises.
    """
    if options.implicit is None:
        return None
    wanted = RewardOptions(beta=options.beta, any_reference=options.any_reference)
    pair = resolve_pair(*split_pair(options.implicit), wanted, reporter)
    if pair.reference is None:
        what = "a running sum of log pi alone falls with every token"
        raise RecipeError(what, where="--implicit", fix="name the reference that the policy was trained against")
    return pair


def limited(solutions: Sequence[Solution], encoder: TextEncoder, reading: ReadingOptions, steps: str) -> list[Solution]:
    """Solutions of at most ``reading.limit`` prompts that are short enough. Raises DataError where none is left."""
    prompts = {solution.prompt_id: solution.prompt for solution in solutions}
    rows = [PreferenceRow(prompt_id, prompt, [], []) for prompt_id, prompt in prompts.items()]
    fits = {row.prompt_id for row in rows if 0 < len(encoder.prompt(row.prompt)) <= reading.max_prompt_tokens}
    chosen = {row.prompt_id for row in splits.limit(rows, reading.limit, 0, lambda row: row.prompt_id in fits)}
    within = [solution for solution in solutions if solution.prompt_id in chosen]
    if not within:
        fix = "raise --max-prompt-tokens"
        raise DataError(f"no prompt has at most {reading.max_prompt_tokens} tokens", where=steps, fix=fix)
    return within


def _table(explicit: Sequence[ScoredSolution], implicit: ImplicitSteps | None) -> list[dict[str, Any]]:
    """One row for each step that counts, or that nobody judged."""
    rows = []
    for number, solution in enumerate(explicit):
        for k in range(solution.n_shared, len(solution.labels)):
            row = {"prompt_id": solution.prompt_id, "solution": number, "step": k, "right": solution.labels[k]}
            row["probability"] = float(solution.scores[k])
            row["implicit"] = None if implicit is None else float(implicit.running[number].scores[k])
            rows.append(row)
    return rows
