"""What ``duel label`` and ``duel simulate`` write has the groups of the data, which are held out as wholes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from toolkit.engine.sampling import SamplingParams
from toolkit.judging import llm
from toolkit.judging.answers import Answer, Question
from toolkit.judging.options import JudgeOptions
from toolkit.judging.principles import Labelling
from toolkit.measure.label import label_data
from toolkit.measure.options import PromptSelection
from toolkit.measure.sampling import PolicySampler
from toolkit.measure.simulate import simulate_data
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import PreferenceRow, prompt_id
from toolkit.preferences.samples import Sample, write_samples
from toolkit.preferences.splits import split_rows
from toolkit.preferences.tables import to_parquet
from toolkit.progress import Reporter
from toolkit.recipe.training import ModelSection

QUIET = Reporter(quiet=True)
FP32 = ModelSection(dtype="float32")
PROMPTS = [f"Film {k} was" for k in range(8)]
GROUPS = {prompt: f"film {k // 2}" for k, prompt in enumerate(PROMPTS)}
TEXTS = [" good and long.", " bad."]
Make = Callable[[PromptSelection, Path], Any]


def labelled(judge: str, *, sampled: bool = False) -> Make:
    labelling = Labelling(judge, ["Choose the better one."] if judge.startswith("openai:") else [], JudgeOptions(FP32))
    return lambda selection, out: label_data(
        labelling, selection, sampler=sampler() if sampled else None, out=out, reporter=QUIET
    )


def simulated(*, sampled: bool) -> Make:
    return lambda selection, out: simulate_data(sampler() if sampled else None, selection, out=out, reporter=QUIET)


def sampler() -> PolicySampler:
    return PolicySampler("tiny", FP32, SamplingParams(6, 1.0, 3))


MADE = {
    "label by scores": labelled("gold"),
    "label by principles": labelled("openai:m@http://127.0.0.1:1/v1"),
    "label what a policy writes": labelled("gold", sampled=True),
    "simulate": simulated(sampled=False),
    "simulate what a policy writes": simulated(sampled=True),
}


@pytest.fixture(autouse=True)
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model that prefers what is longer."""

    def ask(spec: str, template: Any, questions: Sequence[Question], options: JudgeOptions, keep: Any) -> None:
        for question in questions:
            keep(question, Answer(float(len(question.first) > len(question.second))))

    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llm, "_ask", ask)


@pytest.mark.parametrize("how", MADE)
def test_the_groups_of_the_data_stay(how: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    records = [{"prompt": p, "chosen": TEXTS[0], "rejected": TEXTS[1], "group": GROUPS[p]} for p in PROMPTS]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    MADE[how](PromptSelection(str(data)), tmp_path / "out.jsonl.gz")
    rows = read_preferences(str(tmp_path / "out.jsonl.gz")).rows
    assert {row.prompt: row.group for row in rows} == GROUPS
    train, held_out = split_rows(rows, 0.5, 0)
    assert held_out and not {row.group for row in train} & {row.group for row in held_out}


@pytest.mark.parametrize("how", MADE)
def test_data_without_groups_gets_none(how: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    record = {"prompt": PROMPTS[0], "chosen": TEXTS[0], "rejected": TEXTS[1]}
    data.write_text(json.dumps(record) + "\n")
    MADE[how](PromptSelection(str(data)), tmp_path / "out.jsonl.gz")
    with gzip.open(tmp_path / "out.jsonl.gz", "rt") as lines:
        assert ["group" in json.loads(line) for line in lines] == [False]


def test_samples_of_a_run_are_in_the_groups_of_its_data(tmp_path: Path) -> None:
    held_out = [PreferenceRow(prompt_id(p), p, TEXTS, [], group=GROUPS[p]) for p in PROMPTS]
    (tmp_path / "run" / "data").mkdir(parents=True)
    to_parquet(held_out, tmp_path / "run" / "data" / "eval.parquet")
    samples = [
        Sample(prompt_id(p), policy, prompt=p, response=text)
        for policy, text in zip(("dpo", "sft"), TEXTS, strict=True)
        for p in PROMPTS
    ]
    write_samples(samples, tmp_path / "run" / "samples.parquet")
    labelled("gold")(PromptSelection(str(tmp_path / "run")), tmp_path / "out.jsonl.gz")
    assert {row.prompt: row.group for row in read_preferences(str(tmp_path / "out.jsonl.gz")).rows} == GROUPS
