"""Texts and token ids of many rows wait on disk: what a prompt takes in memory is less than its texts.

Forward passes and language models are left out: they take time, and memory that Python does not count.
"""

from __future__ import annotations

import json
import tracemalloc
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toolkit.engine import cache
from toolkit.engine.engine import Engine
from toolkit.engine.reward_model import load_scorer
from toolkit.judging import llm, model_scorers, scorers
from toolkit.judging.answers import Answer
from toolkit.judging.options import JudgeOptions
from toolkit.judging.principles import Labelling, label_rows
from toolkit.judging.responses import PolicyResponses
from toolkit.measure import explicit, passes, rewards, summary
from toolkit.measure.options import PromptSelection, ScoringOptions
from toolkit.measure.outputs import outputs_to_judge
from toolkit.measure.reading import DATA, EncodedRow, EncodedRows, Reading, ReadingOptions, read, with_samples
from toolkit.measure.responses import read_responses
from toolkit.measure.shifts import shifts_of, together
from toolkit.measure.single_responses import read_single_responses
from toolkit.models.encoding import Encoded, Tree, text_encoder
from toolkit.models.resolve import resolve
from toolkit.preferences.rows import Comparison, PreferenceRow, prompt_id
from toolkit.preferences.samples import Sample, write_samples
from toolkit.progress import Reporter
from toolkit.recipe.training import ModelSection
from toolkit.storage.lazy import Computed

QUIET = Reporter(quiet=True)
FP32 = ModelSection(dtype="float32")
COUNTS = (60, 180)


@pytest.fixture(autouse=True)
def small_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("toolkit.storage.spilled.BUFFER", 1 << 12)
    monkeypatch.setattr("toolkit.preferences.loading.HELD_BYTES", 0)
    monkeypatch.setattr("toolkit.preferences.loading.ROWS_AT_ONCE", 8)
    monkeypatch.setattr("toolkit.files.ROWS_AT_ONCE", 8)
    monkeypatch.setattr(explicit, "PROMPTS_AT_ONCE", 8)
    monkeypatch.setattr(cache, "BLOCK", 8)


@pytest.fixture
def no_passes(monkeypatch: pytest.MonkeyPatch, tiny: Any, tokenizer: Any, reward_folder: Path) -> None:
    """Models that are loaded already, and say 0 of every token and response."""
    scorer = load_scorer(resolve(str(reward_folder)), FP32, tokenizer)
    for module in (model_scorers, passes):
        monkeypatch.setattr(module, "load_scorer", lambda *_, **__: scorer)
        monkeypatch.setattr(module, "load_policy", lambda *_, **__: tiny)
    for module in (model_scorers, explicit, rewards):
        monkeypatch.setattr(module, "load_tokenizer", lambda _: tokenizer)
    for command in (explicit, rewards):  # the resamples of a bootstrap grow with the prompts up to a bound
        monkeypatch.setattr(command, "summarise_rewards", lambda *_: {"accuracy": None})
    monkeypatch.setattr(Engine, "branch_scores", lambda _, batch: torch.zeros(batch.n_responses))
    monkeypatch.setattr(Engine, "token_logps", lambda _, batch, **__: (torch.zeros(len(batch.target)), None))


def growth(work: Callable[[int], object]) -> float:
    """The bytes by which the peak grows with each further prompt."""
    peaks = []
    work(COUNTS[0])  # what is loaded once
    for n in COUNTS:
        tracemalloc.start()
        try:
            kept = work(n)
            peaks.append(tracemalloc.get_traced_memory()[1])
            del kept
        finally:
            tracemalloc.stop()
    return (peaks[1] - peaks[0]) / (COUNTS[1] - COUNTS[0])


def texts(k: int, n_words: int = 200) -> list[str]:
    """Two responses to prompt k, of which one word is a token or more."""
    return [f" {word} {k}" + " and then some" * (n_words // 3) for word in ("good", "bad")]


def pairs(folder: Path, n: int) -> str:
    path = folder / f"{n}.jsonl"
    if not path.is_file():
        with path.open("w") as out:
            for k in range(n):
                chosen, rejected = texts(k)
                out.write(json.dumps({"prompt": f"Film {k} was", "chosen": chosen, "rejected": rejected}) + "\n")
    return str(path)


def singles(folder: Path, n: int) -> str:
    path = folder / f"{n}-singles.jsonl"
    if not path.is_file():
        with path.open("w") as out:
            for k in range(n):
                out.writelines(json.dumps({"prompt": f"Film {k} was", "response": t}) + "\n" for t in texts(k))
    return str(path)


def samples(folder: Path, n: int) -> Path:
    """Samples of two policies to n prompts, in a folder of their own."""
    path = folder / str(n) / "samples.parquet"
    if not path.is_file():
        path.parent.mkdir()
        rows = [
            Sample(prompt_id(f"Film {k} was"), name, "dpo", "final", prompt=f"Film {k} was", response=text)
            for k in range(n)
            for name, text in zip("ab", texts(k), strict=True)
        ]
        columns = ["prompt_id", "policy", "arm", "kind", "sample_index", "prompt", "response"]
        write_samples(rows, path, columns)
    return path


LENGTH = sum(map(len, texts(0)))  # of a prompt's responses


@pytest.mark.parametrize("kind", ["rm", "implicit"])
def test_ids_that_a_judge_scores(kind: str, no_passes: None, reward_folder: Path) -> None:
    spec = {"rm": f"rm:{reward_folder}", "implicit": "implicit:tiny,tiny"}[kind]

    def score(n: int) -> object:
        prompts = Computed(range(n), lambda k: f"Film {k} was")
        return scorers.score(spec, prompts, Computed(range(n), texts), JudgeOptions(FP32))

    assert growth(score) < 1_500  # the ids take 8 bytes each, without the numbers that they are


def test_log_probabilities_of_a_policy(no_passes: None, tmp_path: Path) -> None:
    asked = rewards.RewardOptions(beta=0.1)

    def compute(n: int) -> object:
        return rewards.implicit_rewards(
            "tiny", "none", pairs(tmp_path, n), asked, ReadingOptions(), ScoringOptions(dtype="float32"),
            out=tmp_path / f"{n}.parquet", force=True, reporter=QUIET,
        )  # fmt: skip

    assert growth(compute) < 2_500


def test_texts_in_a_table_of_scores(no_passes: None, reward_folder: Path, tmp_path: Path) -> None:
    def compute(n: int) -> object:
        return explicit.explicit_rewards(
            str(reward_folder), pairs(tmp_path, n), ReadingOptions(), ScoringOptions(dtype="float32"),
            with_text=True, out=tmp_path / f"{n}.parquet", force=True, reporter=QUIET,
        )  # fmt: skip

    assert growth(compute) < LENGTH


def test_pairs_on_which_rewards_disagree(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for statistic in ("compare_rewards", "calibration", "agreement_by_slice"):
        monkeypatch.setattr(summary, statistic, lambda *_, **__: {})

    def check(n: int) -> object:
        rows = (
            EncodedRow(
                PreferenceRow(f"{k:016x}", f"Film {k} was", texts(k), [Comparison(0, 1)]),
                Encoded(Tree([5], [[6], [7]]), [False, False]), DATA, [DATA, DATA],
            )
            for k in range(n)
        )  # fmt: skip
        reading = Reading(text_encoder(tokenizer, "p"), EncodedRows.of(rows), {})
        first, second = (np.tile(values, (n, 1)) for values in ([1.0, 0.0], [0.0, 1.0]))
        found = summary.check_against_explicit(reading, list(first), list(second), tmp_path / "out.parquet")
        assert found["n_disagreements"] == n
        return found

    assert growth(check) < LENGTH


@pytest.mark.parametrize(
    "make",
    [
        lambda folder, n: outputs_to_judge([samples(folder, n)], policy=None, baseline=None, limit=None),
        lambda folder, n: read_responses(PromptSelection(str(samples(folder, n)))),
        lambda folder, n: read_single_responses(str(samples(folder, n)), "train"),
        lambda folder, n: read_single_responses(singles(folder, n), "train"),
    ],
    ids=["systems", "to label", "to score", "rows to score"],
)
def test_samples_that_are_read(make: Callable[[Path, int], object], tmp_path: Path) -> None:
    for n in COUNTS:
        samples(tmp_path, n)
        singles(tmp_path, n)
    assert growth(lambda n: make(tmp_path, n)) < 0.5 * LENGTH


def test_samples_beside_the_data(tokenizer: Any, tmp_path: Path) -> None:
    encoder = text_encoder(tokenizer, "p")
    for n in COUNTS:
        pairs(tmp_path, n)
        sampled = []
        for k in range(n):
            for text in texts(k):
                ids = encoder.encode("p", [text], 10_000).tree.response_ids[0]
                text = encoder.decode(ids)
                sampled.append(Sample(prompt_id(f"Film {k} was"), "a", "dpo", "final", response=text, response_ids=ids))
        columns = ["prompt_id", "policy", "arm", "kind", "response", "response_ids", "truncated", "gold_reward"]
        write_samples(sampled, tmp_path / f"{n}.parquet", columns)
        del sampled

    def read_both(n: int) -> object:
        reading = read(pairs(tmp_path, n), tokenizer, "tiny", ReadingOptions())
        both = with_samples(reading, tmp_path / f"{n}.parquet")
        assert len(both.rows) == 2 * n
        return both

    assert growth(read_both) < LENGTH


def test_shifted_texts(tokenizer: Any, tmp_path: Path) -> None:
    def shift(n: int) -> object:
        reading = read(pairs(tmp_path, n), tokenizer, "tiny", ReadingOptions())
        specs = ["case", f"same:{pairs(tmp_path, n)}"]
        shifts = shifts_of(specs, reading, tokenizer, "tiny", ReadingOptions(), QUIET)
        return shifts, together(shifts, reading)

    assert growth(shift) < LENGTH


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model that prefers what stands first, with a long reply."""

    def ask(spec: str, template: Any, questions: Sequence[Any], options: JudgeOptions, keep: Any) -> None:
        for question in questions:
            keep(question, Answer(1.0, raw="because " * 500))

    monkeypatch.setattr(llm, "_ask", ask)


def test_questions_of_labels(answered: None) -> None:
    def label(n: int) -> object:
        responses = Computed(range(n), lambda k: (f"Film {k} was", texts(k)))
        asked = Labelling("openai:m@http://127.0.0.1:1/v1", ("Choose the better one.",), JudgeOptions(FP32))
        labelled = label_rows(responses, asked, QUIET)
        assert len(labelled.rows) == n
        return labelled

    assert growth(label) < LENGTH


def test_questions_about_two_policies(answered: None) -> None:
    def judge(n: int) -> object:
        responses = PolicyResponses(
            [f"{k}" for k in range(n)],
            Computed(range(n), lambda k: f"Film {k} was"),
            {name: Computed(range(n), lambda k, at=at: [texts(k)[at]]) for at, name in enumerate("ab")},
        )
        judged = llm.judge_pairs("openai:m@http://127.0.0.1:1/v1", [("a", "b")], responses, JudgeOptions(FP32), QUIET)
        assert len(judged[0]) == 2 * n
        return judged

    assert growth(judge) < 1.5 * LENGTH  # two judgements among them


def test_trees_of_an_engine(tiny: Any, no_passes: None) -> None:
    """An engine asks for the trees of one batch at a time."""
    in_memory = array("q", [0, 0])  # now, at most

    class Counted(Tree):
        def __del__(self) -> None:
            in_memory[0] -= 1

    def tree(k: int) -> Tree:
        in_memory[0] += 1
        in_memory[1] = max(in_memory)
        return Counted([5, 6, 7], [[8] * (k % 30 + 1), [9]])

    engine = Engine(tiny, 0, dtype=torch.float32, token_budget=100)
    engine.logps(Computed(range(500), tree))
    assert in_memory[0] <= 5 and in_memory[1] < 60
