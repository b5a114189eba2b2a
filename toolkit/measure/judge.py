"""``duel judge``: recorded samples before another judge, a model or a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, nearest
from toolkit.files import write_table
from toolkit.judging import alpaca_eval, human, llm, records, scorers, win_rates
from toolkit.judging.answers import remembering
from toolkit.preferences.samples import by_policy, by_prompt, read_samples
from toolkit.progress import Reporter
from toolkit.recipe.schema import JudgeSettings, ModelSection

# Far above any recorded response: nothing is cut here, the samples are as they are.
MAX_RESPONSE_TOKENS = 4096


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
    usage: list[llm.Usage] = []
    if judge is None:
        found = ask_people(ids, prompts, texts, policy, baseline, annotator, port, seed, out, reporter)
    elif llm.asks(judge):
        found, used = llm.judge_pairs(
            judge, [(policy, baseline)], ids, prompts, texts, judge_settings, section, reporter
        )
        usage.append(used)
    elif judge.startswith("file:"):
        found = recorded(judge.removeprefix("file:"), policy, baseline, ids)
    else:
        flat = [[*a, *b] for a, b in zip(texts[policy], texts[baseline], strict=True)]
        scores = scorers.score(judge, prompts, flat, section, max_response_tokens=MAX_RESPONSE_TOKENS)
        split = [len(a) for a in texts[policy]]
        by = ([s[:n] for s, n in zip(scores, split, strict=True)], [s[n:] for s, n in zip(scores, split, strict=True)])
        found = scorers.compare(judge, policy, baseline, ids, by, (texts[policy], texts[baseline]))
    if annotations is not None:
        alpaca_eval.write_annotations(found, ids, prompts, texts, annotations)
    write_table([asdict(judgement) for judgement in found], out)
    report = win_rates.report(found, controls=win_rates.RECORDED_CONTROLS, seed=seed)
    return report | {"judge_usage": [asdict(used) for used in usage]}


def recorded(file: str, policy: str, baseline: str, ids: Sequence[str]) -> list[records.Judgement]:
    """The judgements in ``file`` of these two policies on these prompts.

    Raises DataError where there is none.
    """
    everything = records.read_judgements([file])
    wanted = set(ids)
    found = [j for j in everything if (j.policy, j.baseline) == (policy, baseline) and j.prompt_id in wanted]
    if not found:
        there = sorted({f"{j.policy} against {j.baseline}" for j in everything})
        raise DataError(
            f"no judgement of {policy!r} against {baseline!r} on these prompts",
            where=file,
            fix=f"it holds {', '.join(there[:5])}",
        )
    return found


def ask_people(
    ids: list[str],
    prompts: list[str],
    texts: dict[str, list[list[str]]],
    policy: str,
    baseline: str,
    annotator: str,
    port: int,
    seed: int,
    out: Path,
    reporter: Reporter,
) -> list[records.Judgement]:
    """Serve the page until Ctrl-C; votes of an earlier sitting count and are not asked for again."""
    ballots = human.Ballots(policy, baseline, ids, prompts, texts, seed)
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
