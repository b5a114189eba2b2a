"""``duel judge``: recorded samples before another judge, a model or a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, nearest
from toolkit.judging import alpaca_eval, human, llm, win_rates
from toolkit.judging.answers import remembering
from toolkit.judging.judge import judge_pairs
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, write_judgements
from toolkit.judging.responses import PolicyResponses
from toolkit.preferences.samples import by_policy, by_prompt, read_samples
from toolkit.progress import Reporter
from toolkit.recipe.schema import JudgeSettings, ModelSection


def paired_samples(
    path: Path, policies: tuple[str, str], limit: int | None
) -> tuple[list[str], list[str], dict[str, list[list[str]]]]:
    """(prompt ids, prompts, ``texts[policy][prompt]`` samples) of a run folder or its ``samples.parquet``.

    Raises DataError where there is none, or a policy is not in it.
    """
    samples = read_samples(path, ["prompt_id", "policy", "sample_index", "prompt", "response"])
    of_policy = by_policy(samples)
    for policy in policies:
        if policy not in of_policy:
            raise DataError(f"there is no policy {policy!r}", where=str(path), fix=nearest(policy, of_policy))
    prompts = {sample.prompt_id: sample.prompt for sample in samples}
    ids = list(prompts)[:limit]
    texts: dict[str, list[list[str]]] = {}
    for policy in policies:
        of_prompt = by_prompt(sorted(of_policy[policy], key=lambda sample: sample.sample_index))
        texts[policy] = [[sample.response for sample in of_prompt.get(key, ())] for key in ids]
    both = [k for k in range(len(ids)) if all(texts[policy][k] for policy in policies)]
    kept = {policy: [texts[policy][k] for k in both] for policy in policies}
    return [ids[k] for k in both], [prompts[ids[k]] for k in both], kept


def judge_samples(
    samples: Path,
    *,
    policy: str,
    baseline: str,
    judge: str | None,
    annotator: str,
    port: int,
    judge_settings: JudgeSettings,
    limit: int | None,
    seed: int,
    out: Path,
    dtype: str,
    reporter: Reporter,
    annotations: Path | None = None,
) -> dict[str, Any]:
    """Writes judgements to ``out``, and to ``annotations`` in AlpacaEval's format; without ``judge``, people vote on a
    local page. Returns :func:`toolkit.judging.win_rates.report` with ``judge_usage``.
    """
    ids, prompts, texts = paired_samples(samples, (policy, baseline), limit)
    section = ModelSection(dtype=dtype)  # type: ignore[arg-type]
    responses = PolicyResponses(ids, prompts, texts)
    usage: llm.Usage | None = None
    if judge is None:
        found = ask_people(responses, policy, baseline, annotator, port, seed, out, reporter)
    else:
        options = JudgeOptions(section, judge_settings)
        found, usage = judge_pairs(judge, [(policy, baseline)], responses, options, reporter)
        found = of_pair(found, policy, baseline, responses.prompt_ids, judge)
    if annotations is not None:
        alpaca_eval.write_annotations(found, responses, annotations)
    write_judgements(found, out)
    report = win_rates.report(found, controls=win_rates.RECORDED_CONTROLS, seed=seed)
    return report | {"judge_usage": [asdict(usage)] if usage is not None else []}


def of_pair(
    judgements: Sequence[Judgement], policy: str, baseline: str, prompt_ids: Sequence[str], judge: str
) -> list[Judgement]:
    """The judgements of these two policies on these prompts: a file may hold others.

    Raises DataError where there is none.
    """
    prompts = set(prompt_ids)
    wanted = [j for j in judgements if (j.policy, j.baseline) == (policy, baseline) and j.prompt_id in prompts]
    if not wanted:
        there = sorted({f"{j.policy} against {j.baseline}" for j in judgements})
        raise DataError(
            f"no judgement of {policy!r} against {baseline!r} on these prompts",
            where=judge,
            fix=f"it holds {', '.join(there[:5])}",
        )
    return wanted


def ask_people(
    responses: PolicyResponses,
    policy: str,
    baseline: str,
    annotator: str,
    port: int,
    seed: int,
    out: Path,
    reporter: Reporter,
) -> list[Judgement]:
    """Serve the page until Ctrl-C. Votes of an earlier sitting count, and those pairs are not shown again."""
    ballots = human.Ballots(policy, baseline, responses, seed)
    memory_path = out.with_suffix(".votes.sqlite")
    with human.serving(ballots, memory_path, port, annotator=annotator) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        reporter.line(f"vote at {address} (Ctrl-C ends and writes {out})")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            reporter.line("closing the page")
    with remembering(memory_path) as memory:
        return human.votes(ballots, memory)
