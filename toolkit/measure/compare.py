"""``duel compare``: sample any policies on the same prompts, judge them, and give win rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.errors import DataError, StoreError
from toolkit.files import fingerprint, write_json
from toolkit.judging import alpaca_eval, win_rates
from toolkit.judging.judge import ask_judges
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import write_judgements
from toolkit.judging.responses import PolicyResponses
from toolkit.models.encoding import is_conversation, text_encoder
from toolkit.models.inspect import DTYPES, best_device
from toolkit.models.load import load_policy
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.tokenizer import check_vocabulary, load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import Prompt, prompt_id
from toolkit.preferences.samples import Sample, read_samples, write_samples
from toolkit.progress import Reporter
from toolkit.recipe.schema import JudgeSettings, ModelSection
from toolkit.runs.store import RunFolder

SAMPLE_COLUMNS = ("prompt_id", "policy", "sample_index", "response", "n_tokens", "truncated")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "messages")


def read_prompts(source: str, *, split: str, limit: int | None, seed: int) -> list[tuple[str, Prompt]]:
    """(prompt id, prompt) of preference data, of a ``.jsonl`` with a prompt column, or of a ``.txt`` with one a line.

    Raises DataError where there is none.
    """
    path = Path(source).expanduser()
    if path.suffix == ".txt" and path.is_file():
        found: list[Prompt] = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif path.suffix == ".jsonl" and path.is_file() and (column := _prompt_column(path)):
        import json

        found = [json.loads(line)[column] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        rows = splits.limit(read_preferences(source, split=split).rows, limit, seed)
        return [(row.prompt_id, row.prompt) for row in rows]
    unique = {prompt_id(prompt): prompt for prompt in found}
    if not unique:
        raise DataError("there is no prompt", where=source, fix="put one prompt on each line")
    return list(unique.items())[:limit]


def _prompt_column(path: Path) -> str | None:
    """The prompt column of a file that holds prompts alone; None for preference data, which has its own reader."""
    import json

    with path.open(encoding="utf-8") as lines:
        try:
            first = json.loads(next(lines, ""))
        except json.JSONDecodeError as error:
            raise DataError(f"not valid JSON: {error.msg}", where=f"{path}, line 1") from error
    if not isinstance(first, dict) or {"chosen", "responses", "response_a", "output_1"} & first.keys():
        return None
    return next((name for name in PROMPT_COLUMNS if name in first and len(first.keys() - {name, "id"}) == 0), None)


def sample(
    ref: ModelRef,
    prompts: Sequence[tuple[str, Prompt]],
    section: ModelSection,
    reporter: Reporter,
    *,
    n: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    purpose: str,
    batch_size: int = 64,
) -> list[list[Sample]]:
    """``n`` responses for each prompt, with ``SAMPLE_COLUMNS`` but for the policy's name."""
    tokenizer = load_tokenizer(ref)
    encoder = text_encoder(tokenizer, prompts[0][1], ref.spec)
    model = load_policy(ref, section).to(best_device())
    check_vocabulary(model.get_input_embeddings().weight.shape[0], tokenizer, ref.spec)
    encoded = [encoder.prompt(prompt) for _, prompt in prompts]
    with reporter.task(f"sample {ref.spec}", len(prompts) * n) as task:
        samples = sample_responses(
            model,
            tokenizer,
            encoded,
            lambda i, k: (seed, purpose, prompts[i][0], k),
            SamplingParams(max_new_tokens, temperature, n, batch_size),
            dtype=DTYPES[section.dtype],
            advance=task.advance,
        )
    return [
        [
            Sample(
                prompt_id=key,
                sample_index=k,
                response=encoder.decode(response.ids),
                n_tokens=len(response.ids),
                truncated=response.truncated,
            )
            for k, response in enumerate(group)
        ]
        for (key, _), group in zip(prompts, samples, strict=True)
    ]


def compare_policies(
    policies: Sequence[str],
    *,
    data: str,
    judge: Sequence[str],
    out: Path,
    reporter: Reporter,
    samples_per_prompt: int,
    temperature: float,
    max_new_tokens: int,
    limit: int | None,
    split: str,
    seed: int,
    dtype: str,
    judge_settings: JudgeSettings,
    annotations: Path | None = None,
) -> dict[str, Any]:
    """Writes ``samples-*.parquet``, ``judgements.parquet`` and ``results.json`` to ``out``, and returns the results.

    Rerunning continues: a policy's samples are kept under the fingerprint of all that they depend on.
    """
    section = ModelSection(dtype=dtype)  # type: ignore[arg-type]
    refs = [resolve(name) for name in policies]
    prompts = read_prompts(data, split=split, limit=limit, seed=seed)
    conversational = {is_conversation(prompt) for _, prompt in prompts}
    if len(conversational) > 1:
        raise DataError("prompts are partly text, partly messages", where=data, fix="use one kind")
    folder = RunFolder(out)
    with folder.lock():
        texts: dict[str, list[list[str]]] = {}
        for name, ref in zip(policies, refs, strict=True):
            settings = [
                ref.fingerprint,
                samples_per_prompt,
                temperature,
                max_new_tokens,
                seed,
                dtype,
                [key for key, _ in prompts],
            ]
            path = out / f"samples-{fingerprint(settings)}.parquet"
            if not path.is_file():
                groups = sample(
                    ref,
                    prompts,
                    section,
                    reporter,
                    n=samples_per_prompt,
                    temperature=temperature,
                    max_new_tokens=max_new_tokens,
                    seed=seed,
                    purpose=f"compare {ref.fingerprint}",
                )
                write_samples(
                    [replace(drawn, policy=name) for group in groups for drawn in group], path, SAMPLE_COLUMNS
                )
            recorded = read_samples(path, SAMPLE_COLUMNS, error=StoreError, fix="remove it and run again")
            n = samples_per_prompt
            texts[name] = [[drawn.response for drawn in recorded[i * n : (i + 1) * n]] for i in range(len(prompts))]

        ids = [key for key, _ in prompts]
        responses = PolicyResponses(ids, [prompt for _, prompt in prompts], texts)
        options = JudgeOptions(section, judge_settings, max_response_tokens=max_new_tokens + 1)
        judgements, usage = ask_judges(judge, list(combinations(policies, 2)), responses, options, reporter)
        write_judgements(judgements, out / "judgements.parquet")
        if annotations is not None:
            alpaca_eval.write_annotations(judgements, responses, annotations)
        results: dict[str, Any] = {"schema_version": 1, "policies": list(policies)}
        results |= win_rates.report(judgements, controls=win_rates.RECORDED_CONTROLS, seed=seed)
        results["judge_usage"] = [asdict(used) for used in usage]
        write_json(out / "results.json", results)
    return results
