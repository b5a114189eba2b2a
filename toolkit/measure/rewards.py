"""``duel rewards``: implicit rewards of preference data, one Parquet row per response.

The implicit reward of a response is ``beta * log(pi(y|x) / pi_ref(y|x))`` (Rafailov et al. 2023, equation 5 without
its ``beta log Z(x)``): comparable between responses to the same prompt only. It is the reward that the policy's loss
defines: of a loss on the mean over tokens (``ipo``, ``sigmoid_norm``) the mean, otherwise the sum.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from toolkit.engine import cache, distributed
from toolkit.errors import DataError, ModelError, RecipeError
from toolkit.evals.agreement import LOG_Z_WARNING
from toolkit.evals.implicit_reward import ImplicitReward, defined_by
from toolkit.files import write_json, write_row_groups
from toolkit.measure.explicit import score_reading
from toolkit.measure.once import once
from toolkit.measure.options import ScoringOptions
from toolkit.measure.passes import StoredPass
from toolkit.measure.reading import EncodedRow, Reading, ReadingOptions, read, with_samples
from toolkit.measure.shifts import Rewards, Shift, shift_rows, shifts_of, together
from toolkit.measure.summary import (
    accuracy_per_token,
    check_against_explicit,
    disagreements_path,
    summarise_rewards,
    summary_path,
)
from toolkit.models.resolve import ModelRef, resolve, training_record
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.rows import readable
from toolkit.progress import Reporter

DEFAULT_BETA = 0.1
# The columns of the table; some are there only with their option, or for one kind of data.
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("response_index", pa.int64()),
        ("source", pa.string()),
        ("n_tokens", pa.int64()),
        ("policy_logp", pa.float64()),
        ("reference_logp", pa.float64()),
        ("implicit_reward", pa.float64()),
        ("implicit_reward_mean", pa.float64()),
        ("truncated", pa.bool_()),
        ("label", pa.string()),
        ("explicit_reward", pa.float64()),
        ("token_rewards", pa.list_(pa.float64())),
        ("running_rewards", pa.list_(pa.float64())),
        ("prompt_ids", pa.list_(pa.int64())),
        ("response_ids", pa.list_(pa.int64())),
        ("source_file", pa.string()),
        ("source_row", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
    ]
)


@dataclass(frozen=True)
class RewardOptions:
    """What is computed beside the implicit rewards, and what the table holds.

    ``beta`` None takes the one that the policy was trained with, where it records that, else 0.1. ``rm`` is an explicit
    reward model to check against. ``samples``, a run's ``samples.parquet``, adds what its policies wrote to the data's
    prompts, and the check against ``rm`` on them. ``shifts`` are shifted versions of the comparisons, NAME:FILE or
    built in. ``per_token`` and ``with_ids`` add columns. ``any_reference`` accepts a reference that the policy was not
    trained against. ``with_text`` adds the texts of prompts and responses.
    """

    beta: float | None = None
    rm: str | None = None
    samples: str | Path | None = None
    shifts: Sequence[str] = ()
    per_token: bool = False
    with_ids: bool = False
    any_reference: bool = False
    with_text: bool = False


@dataclass(frozen=True)
class RewardRow:
    """A row of the table: one response. Log-probabilities and rewards are in nats, their sums in fp64."""

    prompt_id: str
    response_index: int
    source: str  # which policy wrote it, or "data"
    n_tokens: int
    policy_logp: float
    reference_logp: float | None
    implicit_reward: float
    implicit_reward_mean: float  # per token
    truncated: bool
    label: str | None
    explicit_reward: float | None
    token_rewards: NDArray[np.float64]
    running_rewards: NDArray[np.float64]
    prompt_ids: list[int]
    response_ids: list[int]
    source_file: str
    source_row: int  # of the file, from 1
    prompt: str  # as a person reads it
    response: str


@dataclass(frozen=True)
class PolicyPair:
    """A policy and its reference, None where the rewards are reference-free; both share the tokenizer."""

    policy: ModelRef
    reference: ModelRef | None
    tokenizer: Any
    reward: ImplicitReward

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on; the table and the summary record it."""
        return {
            "beta": self.reward.beta,
            "per_token": self.reward.per_token,
            "implicit_reward": self.reward.words,
            "reference_free": self.reference is None,
            "policy": self.policy.fingerprint,
            "reference": self.reference.fingerprint if self.reference else None,
        }


@once(summary_path, disagreements_path)
def implicit_rewards(
    policy: str,
    reference: str,
    data: str,
    options: RewardOptions,
    reading_options: ReadingOptions,
    scoring: ScoringOptions,
    *,
    out: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Write the table to ``out`` and return the summary.

    ``reference="none"`` gives reference-free rewards ``beta * log pi``, and says so. An interrupted call continues
    where it stopped. The reference's log-probabilities are stored in duel's cache folder: another beta, or another
    policy that was trained from it, costs no forward pass of it. Under `accelerate launch` the processes share the
    work; the main one returns the summary, the others an empty one.

    Raises ModelError for a reference that is not the one trained against and for results that are not finite,
    RecipeError for a beta that is not positive.
    """
    distributed.join_group()
    main = distributed.main_process()
    reporter = reporter if main else Reporter(quiet=True)
    started = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    pair = resolve_pair(policy, reference, options, reporter)
    models = [pair.policy, *([resolve(options.rm)] if options.rm else [])]
    reading = read(data, pair.tokenizer, policy, reading_options, reporter=reporter)
    if options.samples is not None:
        reading = with_samples(reading, Path(options.samples))
    if options.shifts and not reading.comparisons:
        raise DataError("the data has no comparison to shift", where=data, fix="leave --shift out")
    shifts = shifts_of(options.shifts, reading, pair.tokenizer, policy, reading_options, reporter)
    work = out.with_name(f".{out.name}.partial")

    # One model in memory at a time; the last pass writes each block's rows as they are complete.
    policy_pass = StoredPass(pair.policy, "policy", reading.trees, pair.tokenizer, work, scoring)
    policy_blocks = policy_pass.stored_logps(reporter)
    explicit = None
    if options.rm:
        explicit = score_reading(options.rm, reading, reading_options.max_response_tokens, scoring, work, reporter)
    shifted = _shifted_rewards(shifts, reading, pair, options, reading_options, scoring, work, reporter)
    reference_pass = None
    if pair.reference is not None:
        stored = cache.reference_folder()
        reference_pass = StoredPass(pair.reference, "reference", reading.trees, pair.tokenizer, stored, scoring)
    reference_blocks = reference_pass.logps(reporter) if reference_pass is not None else None
    if not main:  # the other processes have computed their blocks; the main one writes
        for _ in reference_blocks or ():
            pass
        distributed.barrier()
        return {}
    blocks = _rows(reading, policy_blocks, reference_blocks, explicit, pair.reward)
    implicit = _write_table(blocks, _schema(reading, options, pair), work / out.name)
    distributed.barrier()  # the others read the blocks too

    summary = summarise_rewards(reading, implicit, models, started)
    computed = {"policy": policy_pass.n_computed, "reference": reference_pass.n_computed if reference_pass else 0}
    summary |= {**pair.facts(), "out": str(out), "warning": LOG_Z_WARNING, "responses_computed": computed}
    if summary["accuracy"] is not None:
        summary["accuracy_mean"] = accuracy_per_token(reading, implicit, already_means=pair.reward.per_token)
    if explicit is not None:
        summary |= check_against_explicit(reading, explicit, implicit, out)
    if shifts:
        summary["shifts"] = shift_rows(shifts, reading, (implicit, explicit), shifted)
    write_json(summary_path(out), summary)
    # The table last: while it is not there, the same command goes on from the blocks.
    (work / out.name).replace(out)
    shutil.rmtree(work)
    return summary


def _shifted_rewards(
    shifts: Sequence[Shift],
    reading: Reading,
    pair: PolicyPair,
    options: RewardOptions,
    reading_options: ReadingOptions,
    scoring: ScoringOptions,
    work: Path,
    reporter: Reporter,
) -> tuple[Rewards, Rewards | None]:
    """The implicit and, with a reward model, the explicit rewards of all shifted rows."""
    if not shifts:
        return [], None
    rows = together(shifts, reading)
    log_ratios: list[NDArray[np.float64]] = [np.zeros(len(row.row.responses)) for row in rows.rows]
    for ref, label, sign in ((pair.policy, "policy", 1.0), (pair.reference, "reference", -1.0)):
        if ref is None:
            continue
        stored = StoredPass(ref, f"{label}, shifted", rows.trees, pair.tokenizer, work, scoring)
        of_rows = (of_row for block in stored.logps(reporter) for of_row in block)
        for total, of_row in zip(log_ratios, of_rows, strict=True):
            total += sign * np.array([float(logps.astype(np.float64).sum()) for logps in of_row])
    implicit = [
        np.array([pair.reward(float(value), int(n)) for value, n in zip(values, row.lengths, strict=True)])
        for values, row in zip(log_ratios, rows.rows, strict=True)
    ]
    if not options.rm:
        return implicit, None
    return implicit, score_reading(options.rm, rows, reading_options.max_response_tokens, scoring, work, reporter)


def resolve_pair(policy: str, reference: str, options: RewardOptions, reporter: Reporter) -> PolicyPair:
    """Raises ModelError for models that do not belong together, RecipeError for a beta that is not positive."""
    policy_ref = resolve(policy)
    reference_ref = resolve(reference) if reference != "none" else None
    tokenizer = load_tokenizer(policy_ref)
    if reference_ref is not None:
        check_reference(policy_ref, reference_ref, options.any_reference)
        check_same_tokens(tokenizer, load_tokenizer(reference_ref))
    else:
        reporter.line("reference-free: the rewards are beta * log pi, which longer and rarer texts lower")
    return PolicyPair(policy_ref, reference_ref, tokenizer, _reward(options.beta, policy_ref, reporter))


def check_reference(policy: ModelRef, reference: ModelRef, any_reference: bool) -> None:
    """Raises ModelError where the policy records another reference than this one."""
    expected = training_record(policy).get("reference_fingerprint")
    if expected and expected != reference.fingerprint and not any_reference:
        raise ModelError(
            f"{policy.spec!r} was trained against a reference with fingerprint {expected}, "
            f"and {reference.spec!r} has {reference.fingerprint}",
            where="--reference",
            fix="name the sft/model of the same run, or give --any-reference"
            + (" if that is what was pushed there" if reference.kind == "hub" else ""),
        )


def check_same_tokens(policy: Any, reference: Any) -> None:
    """Raises ModelError where two tokenizers would give other ids to the same text."""
    if policy.get_vocab() != reference.get_vocab():
        raise ModelError(
            "policy and reference have different tokenizers, so their log-probabilities are of different tokens",
            where="--reference",
            fix="compare models that share a tokenizer",
        )


def _reward(beta: float | None, policy: ModelRef, reporter: Reporter) -> ImplicitReward:
    record = training_record(policy)
    if beta is None:
        recorded = record.get("beta")
        beta = float(recorded) if recorded is not None else DEFAULT_BETA
        origin = "as the policy was trained" if recorded is not None else "the default, since the policy records none"
        reporter.line(f"beta {beta:g}, {origin}")
    if not (math.isfinite(beta) and beta > 0):
        raise RecipeError(f"beta is {beta:g}", where="--beta", fix="a positive number; DPO's default is 0.1")
    return defined_by(record, beta)


# ---------------------------------------------------------------- the table


def _schema(reading: Reading, options: RewardOptions, pair: PolicyPair) -> Any:
    """The columns that this call writes."""
    wanted = {
        "source": options.samples,
        "label": any(row.labels for row in reading.rows),
        "explicit_reward": options.rm,
        "token_rewards": options.per_token,
        "running_rewards": options.per_token,
        "prompt_ids": options.with_ids,
        "response_ids": options.with_ids,
        "prompt": options.with_text,
        "response": options.with_text,
    }
    fields = [SCHEMA.field(name) for name in SCHEMA.names if wanted.get(name, True)]
    return pa.schema(fields, metadata={"duel": json.dumps(pair.facts())})


def _rows(
    reading: Reading,
    policy_blocks: Iterator[list[cache.Values]],
    reference_blocks: Iterator[list[cache.Values]] | None,
    explicit: Sequence[NDArray[np.float64]] | None,
    reward: ImplicitReward,
) -> Iterator[list[list[RewardRow]]]:
    """For each block of prompts, for each prompt: the table's rows."""
    p = 0
    for policy_block in policy_blocks:
        reference_block = next(reference_blocks) if reference_blocks is not None else [None] * len(policy_block)
        rows = []
        for policy_logps, reference_logps in zip(policy_block, reference_block, strict=True):
            scores = explicit[p] if explicit is not None else None
            rows.append(_rows_of_prompt(reading.rows[p], policy_logps, reference_logps, scores, reward))
            p += 1
        yield rows
    for _ in reference_blocks or ():  # lets its progress bar end
        pass


def _rows_of_prompt(
    row: EncodedRow,
    policy_logps: cache.Values,
    reference_logps: cache.Values | None,
    explicit: NDArray[np.float64] | None,
    reward: ImplicitReward,
) -> list[RewardRow]:
    labels, prompt = row.labels, readable(row.row.prompt)
    out = []
    for k, ids in enumerate(row.encoded.tree.response_ids):
        policy = policy_logps[k].astype(np.float64)
        reference = reference_logps[k].astype(np.float64) if reference_logps is not None else None
        log_ratios = policy - reference if reference is not None else policy
        token_rewards = reward.beta * log_ratios / (len(ids) if reward.per_token else 1)
        total = float(token_rewards.sum())
        out.append(
            RewardRow(
                prompt_id=row.row.prompt_id,
                response_index=k,
                source=row.writers[k],
                n_tokens=len(ids),
                policy_logp=float(policy.sum()),
                reference_logp=float(reference.sum()) if reference is not None else None,
                implicit_reward=total,
                implicit_reward_mean=reward.beta * float(log_ratios.sum()) / len(ids),
                truncated=row.encoded.truncated[k],
                label=labels[k] if labels is not None else None,
                explicit_reward=float(explicit[k]) if explicit is not None else None,
                token_rewards=token_rewards,
                running_rewards=token_rewards.cumsum(),
                prompt_ids=row.encoded.tree.prompt_ids,
                response_ids=ids,
                source_file=row.sources[k][0],
                source_row=row.sources[k][1],
                prompt=prompt,
                response=row.row.responses[k],
            )
        )
    return out


def _write_table(blocks: Iterable[list[list[RewardRow]]], schema: Any, path: Path) -> list[NDArray[np.float64]]:
    """Write the rows, a row group for each block as it comes. Returns each prompt's implicit rewards."""
    implicit: list[NDArray[np.float64]] = []

    def row_groups() -> Iterator[list[dict[str, Any]]]:
        for block in blocks:
            implicit.extend(np.array([row.implicit_reward for row in of_prompt]) for of_prompt in block)
            yield [vars(row) for of_prompt in block for row in of_prompt]

    write_row_groups(row_groups(), schema, path)
    return implicit
