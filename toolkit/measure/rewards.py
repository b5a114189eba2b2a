"""``duel rewards`` and ``duel score``: implicit and explicit rewards of preference data, one Parquet row per response.

The implicit reward of a response is ``beta * log(pi(y|x) / pi_ref(y|x))`` (Rafailov et al. 2023, equation 5 without
its ``beta log Z(x)``): comparable between responses to the same prompt only.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from toolkit.engine import cache, distributed
from toolkit.engine.engine import Engine
from toolkit.errors import ModelError, RecipeError
from toolkit.evals.agreement import (
    LOG_Z_WARNING,
    Comparison,
    compare_on_samples,
    compare_rewards,
    estimate_dict,
    pairwise_accuracy,
)
from toolkit.evals.rm_quality import calibration, rm_quality
from toolkit.evals.slices import agreement_by_slice, disagreements
from toolkit.files import read_table, refuse_existing, write_json, write_row_groups, write_table, write_text
from toolkit.measure.reading import Reading, pairwise_label, read, with_samples
from toolkit.models.encoding import Encoded, TextEncoder, Tree, text_encoder
from toolkit.models.inspect import DTYPES, best_device
from toolkit.models.load import attention, load_policy, load_reward_model
from toolkit.models.resolve import ModelRef, resolve, training_record
from toolkit.models.save import reward_mean
from toolkit.models.tokenizer import check_vocabulary, load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow, readable
from toolkit.progress import Reporter
from toolkit.recipe.schema import ModelSection

DEFAULT_BETA = 0.1
# The columns of ``duel rewards``; some are there with their option or kind of data alone.
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
    ]
)


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


def implicit_rewards(
    policy: str,
    reference: str,
    data: str,
    *,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
    beta: float | None = None,
    per_token: bool = False,
    with_ids: bool = False,
    rm: str | None = None,
    any_reference: bool = False,
    force: bool = False,
    limit: int | None = None,
    samples: str | Path | None = None,
    split: str = "train",
    plain: bool = False,
    max_prompt_tokens: int = 2048,
    max_response_tokens: int = 1024,
    batch_tokens: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write ``out`` and return the summary; without ``out``, the summary holds the table's ``rows``.

    ``plain`` reads "Human: ... Assistant: ..." transcripts as text, for models without a chat template.
    ``reference="none"`` gives reference-free rewards ``beta * log pi``, labelled as such. An interrupted call continues
    where it stopped. The reference's log-probabilities are kept in duel's cache folder: another beta, or another policy
    that was trained from it, costs no forward pass of it. ``samples``, a run's ``samples.parquet``, adds what its
    policies wrote to the data's prompts, and the check against ``rm`` on each source of them.

    Under `accelerate launch` the processes share the work; the summary is the main one's, that of the others is empty.

    Raises ModelError for a reference that is not the one trained against and for results that are not finite,
    StoreError where ``out`` exists, RecipeError for a beta that is not positive.
    """
    scratch = TemporaryDirectory() if out is None else None
    out = Path(scratch.name, "rewards.parquet") if scratch is not None else Path(str(out))
    distributed.join_group()
    main = distributed.main_process()
    reporter = reporter if reporter is not None and main else Reporter(quiet=True)
    started = time.monotonic()
    refuse_existing(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    section = ModelSection(dtype=dtype)  # type: ignore[arg-type]
    policy_ref = resolve(policy)
    reference_ref = resolve(reference) if reference != "none" else None
    tokenizer = load_tokenizer(policy_ref)
    if reference_ref is not None:
        check_reference(policy_ref, reference_ref, any_reference)
        check_same_tokens(tokenizer, load_tokenizer(reference_ref))
    else:
        reporter.line("reference-free: the rewards are beta * log pi, which longer and rarer texts lower")
    beta = _beta(beta, policy_ref, reporter)
    reading = read(
        data,
        tokenizer,
        policy,
        split=split,
        plain=plain,
        limit=limit,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
    )
    if samples is not None:
        reading = with_samples(reading, Path(samples))
    trees = [item.tree for item in reading.encoded]
    work = out.with_name(f".{out.name}.partial")
    counted = {"policy": 0, "reference": 0}

    n_responses = sum(len(tree.response_ids) for tree in trees)

    def passes(ref: ModelRef, label: str, folder: Path) -> Iterator[list[cache.Values]]:
        def load() -> Engine:
            model = load_policy(ref, section).to(best_device())
            check_vocabulary(model.get_input_embeddings().weight.shape[0], tokenizer, ref.spec)
            dtype = DTYPES[section.dtype]
            return Engine(model, int(tokenizer.pad_token_id), dtype=dtype, token_budget=batch_tokens)

        key = cache.identity(ref, dtype=section.dtype, attention=attention(section))
        with reporter.task(label, n_responses) as task:

            def advance(n: int) -> None:
                counted[label] += n
                task.advance(n)

            results = cache.ResponseCache(folder, key, load)
            yield from results.logps(trees, advance=advance, skip=lambda n: task.resume_at(task.done + n))

    # One model in memory at a time; the last pass writes each part's rows as they are complete.
    of_policy = list(passes(policy_ref, "policy", work))
    explicit = _explicit(rm, reading, section, batch_tokens, max_response_tokens, work, reporter) if rm else None
    of_reference = passes(reference_ref, "reference", cache.reference_folder()) if reference_ref else None
    if not main:  # the other processes have computed their parts; the main one writes
        for _ in of_reference or ():
            pass
        distributed.barrier()
        return {}
    implicit: list[np.ndarray] = []

    def row_groups() -> Iterator[list[dict[str, Any]]]:
        for number, part in enumerate(of_policy):
            first = number * cache.BLOCK
            of_part = next(of_reference) if of_reference is not None else None
            rows: list[dict[str, Any]] = []
            for offset, responses in enumerate(part):
                found = _rows(reading, first + offset, responses, of_part[offset] if of_part else None, beta)
                implicit.append(np.array([row["implicit_reward"] for row in found]))
                for k, row in enumerate(found):
                    if explicit is not None:
                        row["explicit_reward"] = explicit[first + offset][k]
                rows += found
            yield rows
        for _ in of_reference or ():  # lets its progress bar end
            pass

    facts = {
        "beta": beta,
        "reference_free": reference_ref is None,
        "policy": policy_ref.fingerprint,
        "reference": reference_ref.fingerprint if reference_ref else None,
    }
    left_out = {
        "source": samples,
        "token_rewards": per_token,
        "running_rewards": per_token,
        "prompt_ids": with_ids,
        "response_ids": with_ids,
        "explicit_reward": rm,
    }
    labelled = any(pairwise_label(row) for row in reading.rows)
    names = [name for name in SCHEMA.names if left_out.get(name, True) and (labelled or name != "label")]
    schema = pa.schema([SCHEMA.field(name) for name in names], metadata={"duel": json.dumps(facts)})
    write_row_groups(row_groups(), schema, work / out.name)
    distributed.barrier()  # the others read the parts too

    lengths = [np.array([len(ids) for ids in tree.response_ids], dtype=np.float64) for tree in trees]
    summary = _summary(reading, implicit, started, lengths=lengths)
    summary |= {**facts, "out": str(out), "warning": LOG_Z_WARNING, "responses_computed": counted}
    if summary["accuracy"] is not None:
        per_token_rewards = [reward / n for reward, n in zip(implicit, lengths, strict=True)]
        summary["accuracy_mean"] = estimate_dict(pairwise_accuracy(_comparisons(reading.rows), per_token_rewards))
    if explicit is not None:
        summary |= _against(reading, [np.array(v) for v in explicit], implicit, lengths, out)
    if scratch is not None:
        with scratch:
            return {**summary, "out": None, "rows": read_table(work / out.name)}
    write_json(out.with_suffix(".summary.json"), summary)
    # The table last: while it is not there, the same command goes on from the parts.
    (work / out.name).replace(out)
    shutil.rmtree(work)
    return summary


def _beta(beta: float | None, policy: ModelRef, reporter: Reporter) -> float:
    if beta is None:
        recorded = training_record(policy).get("beta")
        beta = float(recorded) if recorded is not None else DEFAULT_BETA
        source = "as the policy was trained" if recorded is not None else "the default, since the policy records none"
        reporter.line(f"beta {beta:g}, {source}")
    if not (math.isfinite(beta) and beta > 0):
        raise RecipeError(f"beta is {beta:g}", where="--beta", fix="a positive number; DPO's default is 0.1")
    return beta


def _rows(
    reading: Reading, index: int, of_policy: cache.Values, of_reference: cache.Values | None, beta: float
) -> list[dict[str, Any]]:
    """The table's rows of one prompt; sums in fp64."""
    row, item = reading.rows[index], reading.encoded[index]
    label = pairwise_label(row)
    out = []
    for k, ids in enumerate(item.tree.response_ids):
        own = of_policy[k].astype(np.float64)
        reference = of_reference[k].astype(np.float64) if of_reference is not None else None
        token_rewards = beta * (own - reference if reference is not None else own)
        total = float(token_rewards.sum())
        out.append(
            {
                "prompt_id": row.prompt_id,
                "response_index": k,
                "source": reading.writers[index][k],
                "n_tokens": len(ids),
                "policy_logp": float(own.sum()),
                "reference_logp": float(reference.sum()) if reference is not None else None,
                "implicit_reward": total,
                "implicit_reward_mean": total / len(ids),
                "truncated": item.truncated[k],
                "label": label[k] if label is not None else None,
                "token_rewards": token_rewards,
                "running_rewards": token_rewards.cumsum(),
                "prompt_ids": item.tree.prompt_ids,
                "response_ids": ids,
            }
        )
    return out


def _against(
    reading: Reading,
    explicit: list[np.ndarray],
    implicit: list[np.ndarray],
    lengths: list[np.ndarray],
    out: Path,
) -> dict[str, Any]:
    """The check against the explicit rewards; disagreements go to ``OUT.disagreements.jsonl``, the clearest first."""
    n = reading.n_data
    prompt_ids = [row.prompt_id for row in reading.rows]
    by_source = {}
    for source in dict.fromkeys(reading.sources[n:]):
        at = [p for p, of in enumerate(reading.sources) if of == source]
        columns = ([values[p] for p in at] for values in (prompt_ids, explicit, implicit))
        by_source[source] = compare_on_samples(*columns, [reading.rows[p].gold for p in at])
    prompt_ids, explicit, implicit, lengths = prompt_ids[:n], explicit[:n], implicit[:n], lengths[:n]
    comparisons = _comparisons(reading.rows)
    found: dict[str, Any] = dict(compare_rewards(prompt_ids, comparisons, explicit, implicit))
    if by_source:
        found["samples"] = by_source
    if comparisons:
        found["calibration"] = {
            "explicit": calibration(comparisons, explicit, prompt_ids=prompt_ids),
            "implicit": calibration(comparisons, implicit, prompt_ids=prompt_ids),
        }
        found["splits"] = agreement_by_slice(prompt_ids, comparisons, explicit, implicit, lengths)
    lines = []
    for index, x, y in disagreements(comparisons, explicit, implicit):
        p, i, j, prefer_i, _ = comparisons[index]
        row = reading.rows[p]
        record = {
            "prompt_id": row.prompt_id,
            "prompt": readable(row.prompt),
            "response_a": row.responses[i],
            "response_b": row.responses[j],
            "label_prefers_a": prefer_i,
            "explicit_margin": x,
            "implicit_margin": y,
            "n_tokens_a": int(lengths[p][i]),
            "n_tokens_b": int(lengths[p][j]),
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    path = out.with_suffix(".disagreements.jsonl")
    write_text(path, "".join(line + "\n" for line in lines))
    return {"implicit_vs_explicit": found, "n_disagreements": len(lines), "disagreements": str(path)}


def explicit_rewards(
    rm: str,
    data: str,
    *,
    out: Path,
    reporter: Reporter,
    force: bool = False,
    limit: int | None = None,
    split: str = "train",
    plain: bool = False,
    max_prompt_tokens: int = 2048,
    max_response_tokens: int = 1024,
    batch_tokens: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Write the reward model's score of every response to ``out`` and return the summary. Interrupted, it continues."""
    started = time.monotonic()
    refuse_existing(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    section = ModelSection(dtype=dtype)  # type: ignore[arg-type]
    reading = read(
        data,
        load_tokenizer(resolve(rm)),
        rm,
        split=split,
        plain=plain,
        limit=limit,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
    )
    work = out.with_name(f".{out.name}.partial")
    scores = _explicit(rm, reading, section, batch_tokens, max_response_tokens, work, reporter)
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
    lengths = [np.array([len(ids) for ids in item.tree.response_ids], dtype=np.float64) for item in reading.encoded]
    summary = _summary(reading, [np.array(v) for v in scores], started, lengths=lengths) | {"out": str(out)}
    write_table(rows, out)
    shutil.rmtree(work, ignore_errors=True)
    return summary


def _explicit(
    rm: str,
    reading: Reading,
    section: ModelSection,
    batch_tokens: int | None,
    max_response_tokens: int,
    work: Path,
    reporter: Reporter,
) -> list[list[float]]:
    ref = resolve(rm)
    tokenizer = load_tokenizer(ref)
    encoder = text_encoder(tokenizer, reading.rows[0].prompt, rm)
    trees = [
        encoder.encode(row.prompt, row.responses, max_response_tokens).tree
        if source == "data"
        else _as_sampled(encoder, row, item)
        for row, item, source in zip(reading.rows, reading.encoded, reading.sources, strict=True)
    ]

    def load() -> Engine:
        model = load_reward_model(ref, section).to(best_device())
        check_vocabulary(model.get_input_embeddings().weight.shape[0], tokenizer, rm)
        dtype = DTYPES[section.dtype]
        return Engine(model, int(tokenizer.pad_token_id), dtype=dtype, token_budget=batch_tokens)

    key = cache.identity(ref, dtype=section.dtype, attention=attention(section))
    with reporter.task("reward model", sum(len(tree.response_ids) for tree in trees)) as task:
        skip = lambda n: task.resume_at(task.done + n)  # noqa: E731
        parts = list(cache.ResponseCache(work, key, load).scores(trees, advance=task.advance, skip=skip))
    mean = reward_mean(ref.path)
    return [[float(value[0]) - mean for value in row] for part in parts for row in part]


def _as_sampled(encoder: TextEncoder, row: PreferenceRow, item: Encoded) -> Tree:
    """The ids that were sampled, where the reward model's tokenizer reads them as the same text; otherwise the text in
    its own ids."""
    texts = [encoder.decode(ids) for ids in item.tree.response_ids]
    if item.tree.prompt_ids == encoder.prompt(row.prompt) and texts == row.responses:
        return item.tree
    return encoder.encode_samples(row.prompt, row.responses, item.truncated)


def _comparisons(rows: Sequence[PreferenceRow]) -> list[Comparison]:
    return [(p, pair.i, pair.j, pair.p, pair.weight) for p, row in enumerate(rows) for pair in splits.pairs(row)]


def _summary(
    reading: Reading, rewards: list[np.ndarray], started: float, *, lengths: list[np.ndarray]
) -> dict[str, Any]:
    comparisons = _comparisons(reading.rows)
    n_responses = sum(len(values) for values in rewards)
    rewards, lengths = rewards[: reading.n_data], lengths[: reading.n_data]
    seconds = time.monotonic() - started
    summary: dict[str, Any] = {
        "n_prompts": reading.n_data,
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
