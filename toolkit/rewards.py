"""``duel rewards`` and ``duel score``: implicit and explicit rewards of preference data, one Parquet row per response.

The implicit reward of a response is ``beta * log(pi(y|x) / pi_ref(y|x))`` (Rafailov et al. 2023, equation 5 without
its ``beta log Z(x)``): comparable between responses to the same prompt only.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from toolkit import models
from toolkit.errors import DataError, ModelError, StoreError
from toolkit.evals.agreement import LOG_Z_WARNING, Comparison, compare_rewards
from toolkit.evals.rm_quality import rm_quality
from toolkit.locating import ModelRef, resolve, training_record
from toolkit.preferences import splits
from toolkit.preferences.encoding import Encoded, encode, is_conversation, response_end
from toolkit.preferences.formats import PreferenceRow
from toolkit.preferences.reading import PreferenceData, read_preferences
from toolkit.progress import Reporter
from toolkit.recipe import ModelSection
from toolkit.scoring import Engine, Tree
from toolkit.store import fingerprint, write_json, write_table

PROMPTS_PER_PART = 256
DEFAULT_BETA = 0.1


@dataclass(frozen=True)
class Reading:
    """Rows that fit the limits, as token ids, and what was left out."""

    rows: list[PreferenceRow]
    encoded: list[Encoded]
    counts: dict[str, int]
    data: PreferenceData


def read(
    data: str,
    tokenizer: Any,
    spec: str,
    *,
    split: str,
    limit: int | None,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> Reading:
    """Read and tokenise. Prompts over the limit are left out, responses over it are cut; both are counted."""
    found = read_preferences(data, split=split)
    rows = splits.limit(found.rows, limit, 0)
    conversational = is_conversation(rows[0].prompt)
    if conversational:
        models.require_chat_template(tokenizer, spec)
    end_id = response_end(tokenizer, conversational)
    kept, encoded = [], []
    for row in rows:
        item = encode(tokenizer, row.prompt, row.responses, end_id=end_id, max_response_tokens=max_response_tokens)
        if 0 < len(item.tree.prompt_ids) <= max_prompt_tokens:
            kept.append(row)
            encoded.append(item)
    if not kept:
        raise DataError("every prompt is longer than the limit", where=data, fix="raise --max-prompt-tokens")
    counts = {
        "n_long_prompts": len(rows) - len(kept),
        "n_truncated_responses": sum(sum(item.truncated) for item in encoded),
    }
    return Reading(kept, encoded, counts, found)


def pairwise_label(row: PreferenceRow) -> list[str] | None:
    """``chosen`` and ``rejected`` for a pair with a winner."""
    found = splits.pairs(row)
    if len(row.responses) != 2 or len(found) != 1 or found[0].p == 0.5:
        return None
    return ["chosen", "rejected"] if found[0].p > 0.5 else ["rejected", "chosen"]


def check_reference(policy: ModelRef, reference: ModelRef, any_reference: bool) -> None:
    """Raises ModelError where the policy records another reference than this one."""
    expected = training_record(policy).get("reference_fingerprint")
    if expected and expected != reference.fingerprint and not any_reference:
        raise ModelError(
            f"{policy.spec!r} was trained against a reference with fingerprint {expected}, "
            f"and {reference.spec!r} has {reference.fingerprint}",
            where="--reference",
            fix="name the sft/model of the same run, or give --any-reference",
        )


def check_same_tokens(policy: Any, reference: Any) -> None:
    """Raises ModelError where two tokenizers would give other ids to the same text."""
    if policy.get_vocab() != reference.get_vocab():
        raise ModelError(
            "policy and reference have different tokenizers, so their log-probabilities are of different tokens",
            where="--reference",
            fix="compare models that share a tokenizer",
        )


def implicit_rewards(
    policy: str,
    reference: str,
    data: str,
    *,
    out: Path,
    reporter: Reporter,
    beta: float | None = None,
    per_token: bool = False,
    with_ids: bool = False,
    rm: str | None = None,
    any_reference: bool = False,
    force: bool = False,
    limit: int | None = None,
    split: str = "train",
    max_prompt_tokens: int = 2048,
    max_response_tokens: int = 1024,
    batch_tokens: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write ``out`` and return the summary. An interrupted call continues where it stopped.

    ``reference="none"`` gives reference-free rewards ``beta * log pi``, labelled as such.
    Raises ModelError for a reference that is not the one trained against, StoreError where ``out`` exists.
    """
    started = time.monotonic()
    _refuse_existing(out, force)
    section = ModelSection(dtype=dtype)  # type: ignore[arg-type]
    policy_ref = resolve(policy)
    reference_ref = resolve(reference) if reference != "none" else None
    tokenizer = models.load_tokenizer(policy_ref)
    if reference_ref is not None:
        check_reference(policy_ref, reference_ref, any_reference)
        check_same_tokens(tokenizer, models.load_tokenizer(reference_ref))
    if beta is None:
        recorded = training_record(policy_ref).get("beta")
        beta = float(recorded) if recorded is not None else DEFAULT_BETA
        source = "as the policy was trained" if recorded is not None else "the default, since the policy records none"
        reporter.line(f"beta {beta:g}, {source}")
    reading = read(
        data,
        tokenizer,
        policy,
        split=split,
        limit=limit,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
    )
    trees = [item.tree for item in reading.encoded]
    pad_id, torch_dtype = int(tokenizer.pad_token_id), models.DTYPES[section.dtype]
    identity = [
        policy_ref.fingerprint,
        reference_ref.fingerprint if reference_ref else "none",
        reading.data.fingerprint,
    ]
    identity += [str(limit), dtype, str(max_prompt_tokens), str(max_response_tokens), tokenizer.chat_template or ""]

    def logps_of(ref: ModelRef, label: str) -> list[list[list[float]]]:
        model = models.load_policy(ref, section).to(models.best_device())
        models.check_vocabulary(model.get_input_embeddings().weight.shape[0], tokenizer, ref.spec)
        engine = Engine(model, pad_id, dtype=torch_dtype, token_budget=batch_tokens)
        found: list[list[list[float]]] = []
        folder = out.with_name(f".{out.name}.{fingerprint([ref.fingerprint, *identity[2:]])}.partial")
        folder.mkdir(parents=True, exist_ok=True)
        with reporter.task(label, sum(len(tree.response_ids) for tree in trees)) as task:
            for start in range(0, len(trees), PROMPTS_PER_PART):
                part = trees[start : start + PROMPTS_PER_PART]
                path = folder / f"{start:08d}.parquet"
                if path.is_file():
                    column = pq.read_table(path).column("logps").to_pylist()
                    task.resume_at(sum(len(tree.response_ids) for tree in trees[: start + len(part)]))
                else:
                    column = [[t.tolist() for t in group] for group in engine.logps(part, advance=task.advance)]
                    partial = path.with_suffix(".partial")
                    pq.write_table(pa.table({"logps": column}), partial)
                    partial.replace(path)
                found += column
        return found

    of_policy = logps_of(policy_ref, "policy")
    of_reference = logps_of(reference_ref, "reference") if reference_ref is not None else None
    explicit = _explicit(rm, reading, section, batch_tokens, max_response_tokens, reporter) if rm else None

    rows: list[dict[str, Any]] = []
    for p, (row, item) in enumerate(zip(reading.rows, reading.encoded, strict=True)):
        label = pairwise_label(row)
        for k, ids in enumerate(item.tree.response_ids):
            own = np.array(of_policy[p][k], dtype=np.float64)
            ref = np.array(of_reference[p][k], dtype=np.float64) if of_reference is not None else None
            token_rewards = beta * (own - ref if ref is not None else own)
            total = float(token_rewards.sum())
            record: dict[str, Any] = {
                "prompt_id": row.prompt_id,
                "response_index": k,
                "n_tokens": len(ids),
                "policy_logp": float(own.sum()),
                "reference_logp": float(ref.sum()) if ref is not None else None,
                "implicit_reward": total,
                "implicit_reward_mean": total / len(ids),
                "truncated": item.truncated[k],
            }
            if label is not None:
                record["label"] = label[k]
            if explicit is not None:
                record["explicit_reward"] = explicit[p][k]
            if per_token:
                record["token_rewards"] = token_rewards.tolist()
            if with_ids:
                record["prompt_ids"], record["response_ids"] = item.tree.prompt_ids, ids
            rows.append(record)
    write_table(rows, out)
    for folder in out.parent.glob(f".{out.name}.*.partial"):
        shutil.rmtree(folder, ignore_errors=True)

    implicit = _by_prompt(rows, "implicit_reward", len(reading.rows))
    summary = _summary(reading, implicit, started, lengths=_by_prompt(rows, "n_tokens", len(reading.rows)))
    summary |= {"beta": beta, "reference_free": reference_ref is None, "out": str(out), "warning": LOG_Z_WARNING}
    if explicit is not None:
        summary["implicit_vs_explicit"] = compare_rewards(
            [row.prompt_id for row in reading.rows],
            _comparisons(reading.rows),
            [np.array(v) for v in explicit],
            implicit,
        )
    write_json(out.with_suffix(".summary.json"), summary)
    return summary


def explicit_rewards(
    rm: str,
    data: str,
    *,
    out: Path,
    reporter: Reporter,
    force: bool = False,
    limit: int | None = None,
    split: str = "train",
    max_prompt_tokens: int = 2048,
    max_response_tokens: int = 1024,
    batch_tokens: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write the reward model's score of every response to ``out`` and return the summary."""
    started = time.monotonic()
    _refuse_existing(out, force)
    section = ModelSection(dtype=dtype)  # type: ignore[arg-type]
    reading = read(
        data,
        models.load_tokenizer(resolve(rm)),
        rm,
        split=split,
        limit=limit,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
    )
    scores = _explicit(rm, reading, section, batch_tokens, max_response_tokens, reporter)
    rows = []
    for p, (row, item) in enumerate(zip(reading.rows, reading.encoded, strict=True)):
        label = pairwise_label(row)
        for k, ids in enumerate(item.tree.response_ids):
            record = {
                "prompt_id": row.prompt_id,
                "response_index": k,
                "n_tokens": len(ids),
                "explicit_reward": scores[p][k],
                "truncated": item.truncated[k],
            }
            rows.append(record | ({"label": label[k]} if label is not None else {}))
    write_table(rows, out)
    lengths = _by_prompt(rows, "n_tokens", len(reading.rows))
    return _summary(reading, [np.array(v) for v in scores], started, lengths=lengths) | {"out": str(out)}


def _refuse_existing(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise StoreError("the file exists", where=str(out), fix="choose another --out, or give --force")
    out.parent.mkdir(parents=True, exist_ok=True)


def _explicit(
    rm: str,
    reading: Reading,
    section: ModelSection,
    batch_tokens: int | None,
    max_response_tokens: int,
    reporter: Reporter,
) -> list[list[float]]:
    ref = resolve(rm)
    tokenizer = models.load_tokenizer(ref)
    model = models.load_reward_model(ref, section).to(models.best_device())
    models.check_vocabulary(model.get_input_embeddings().weight.shape[0], tokenizer, rm)
    conversational = is_conversation(reading.rows[0].prompt)
    if conversational:
        models.require_chat_template(tokenizer, rm)
    end_id = response_end(tokenizer, conversational)
    trees: list[Tree] = [
        encode(tokenizer, row.prompt, row.responses, end_id=end_id, max_response_tokens=max_response_tokens).tree
        for row in reading.rows
    ]
    engine = Engine(model, int(tokenizer.pad_token_id), dtype=models.DTYPES[section.dtype], token_budget=batch_tokens)
    with reporter.task("reward model", sum(len(tree.response_ids) for tree in trees)) as task:
        scores = engine.scores(trees, advance=task.advance)
    mean = models.reward_mean(ref.path)
    return [[value - mean for value in values] for values in scores]


def _comparisons(rows: Sequence[PreferenceRow]) -> list[Comparison]:
    return [(p, pair.i, pair.j, pair.p, pair.weight) for p, row in enumerate(rows) for pair in splits.pairs(row)]


def _by_prompt(rows: Sequence[dict[str, Any]], column: str, n: int) -> list[np.ndarray]:
    out: list[list[float]] = []
    for row in rows:
        if row["response_index"] == 0:
            out.append([])
        out[-1].append(float(row[column]))
    assert len(out) == n
    return [np.array(values) for values in out]


def _summary(
    reading: Reading, rewards: list[np.ndarray], started: float, *, lengths: list[np.ndarray]
) -> dict[str, Any]:
    comparisons = _comparisons(reading.rows)
    n_responses = sum(len(values) for values in rewards)
    seconds = time.monotonic() - started
    summary: dict[str, Any] = {
        "n_prompts": len(reading.rows),
        "n_responses": n_responses,
        "n_comparisons": len(comparisons),
        **reading.counts,
        "accuracy": None,
        "accuracy_ci": None,
    }
    if comparisons:
        quality = rm_quality(comparisons, rewards, lengths=lengths)
        accuracy: Any = quality["accuracy"]
        summary |= {"accuracy": accuracy["value"], "accuracy_ci": [accuracy["ci_low"], accuracy["ci_high"]]}
        summary["quality"] = quality
    not_finite = sum(not math.isfinite(value) for values in rewards for value in values)
    if not_finite:
        raise ModelError(f"{not_finite} rewards are not finite", where="policy, reference or reward model")
    return summary | {"seconds": round(seconds, 3), "responses_per_second": round(n_responses / seconds, 3)}
