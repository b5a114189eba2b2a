"""Labels of a further round: the same number for both arms, failures that are no ties, samples that stay."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.running import SMALL

from toolkit.errors import DataError, ModelError
from toolkit.models.encoding import text_encoder
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.gold import gold_rewards
from toolkit.preferences.samples import Sample, read_samples
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe
from toolkit.stages import labels
from toolkit.stages.contexts import LabelsContext, context_of
from toolkit.training.labelled import COLUMNS, read_labelled, samples_file

pytestmark = [pytest.mark.invariant, pytest.mark.e2e]
SETTINGS = [setting.removeprefix("--set=") for setting in SMALL]
ARMS = ("rm_ppo", "dpo")


def context_with(rounds: str) -> LabelsContext:
    context = context_of("labels@2", load_recipe("smoke", [*SETTINGS, f"rounds={rounds}"]).recipe)
    assert isinstance(context, LabelsContext)
    return context


def label(run: Path, out: Path, rounds: str) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    inputs = {name: run / name for name in ("data", "sft", "ppo", "dpo")}
    return labels.run(context_with(rounds), inputs, out, Reporter(quiet=True))


@pytest.fixture
def judge_module() -> Iterator[ModuleType]:
    """A module that a judge python:round_judge:score is read from."""
    module = ModuleType("round_judge")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_both_arms_get_the_budget_of_labels_one_prompt_after_the_other(small_run: Path, tmp_path: Path) -> None:
    record = label(small_run, tmp_path, "{samples_per_prompt: 3, prompts: 10, label_budget: 15}")
    assert record["n_prompts"] == 10 and record["judge"] == "gold" and record["usages"] == []
    training = {row.prompt_id for row in from_parquet(small_run / "data" / "train.parquet")}
    for arm in ARMS:
        assert record["arms"][arm] | {"tied": 0, "tokens": 0} == {
            "labels": 15,
            "failed": 0,
            "tied": 0,
            "samples": 30,
            "tokens": 0,
        }
        rows = from_parquet(tmp_path / f"{arm}.parquet")
        assert {row.prompt_id for row in rows} <= training
        pairs = {row.prompt_id: splits.pairs(row) for row in rows}
        assert sum(map(len, pairs.values())) == 15 and all(1 <= len(of_row) <= 2 for of_row in pairs.values())
        for row in rows:
            gold = gold_rewards([row.prompt] * len(row.responses), row.responses)
            for pair in pairs[row.prompt_id]:
                expected = 0.5 if gold[pair.i] == gold[pair.j] else float(gold[pair.i] > gold[pair.j])
                assert pair.p == expected
    drawn = {arm: read_samples(samples_file(tmp_path, arm), COLUMNS) for arm in ARMS}
    assert {s.prompt_id for s in drawn["rm_ppo"]} == {s.prompt_id for s in drawn["dpo"]}
    assert [s.response_ids for s in drawn["rm_ppo"]] != [s.response_ids for s in drawn["dpo"]]


def test_examples_have_the_ids_that_were_sampled_and_no_end_that_was_not(small_run: Path, tmp_path: Path) -> None:
    label(small_run, tmp_path, "{samples_per_prompt: 3}")
    sft = resolve(str(small_run / "sft" / "model"))
    rows = from_parquet(tmp_path / "dpo.parquet")
    encoder = text_encoder(load_tokenizer(sft), rows[0].prompt)
    drawn = {(s.prompt_id, s.response): s for s in reversed(read_samples(samples_file(tmp_path, "dpo"), COLUMNS))}
    examples = read_labelled(tmp_path, "dpo", encoder)
    assert len(examples) == len(rows)
    cut = 0
    for row, example in zip(rows, examples, strict=True):
        assert example.tree.prompt_ids == encoder.prompt(row.prompt) and example.pairs == splits.pairs(row)
        for text, ids in zip(row.responses, example.tree.response_ids, strict=True):
            sample = drawn[row.prompt_id, text]
            assert ids == list(sample.response_ids) and (ids[-1] != encoder.end_id) == sample.truncated
            cut += sample.truncated
    assert cut > 0  # the case that texts alone would get wrong


def test_a_failed_label_is_no_tie(small_run: Path, tmp_path: Path, judge_module: ModuleType) -> None:
    def score(prompts: Any, completions: list[str], **_: Any) -> list[float | None]:
        return [None if len(text) % 5 == 0 else float(len(text)) for text in completions]

    judge_module.score = score  # type: ignore[attr-defined]
    record = label(small_run, tmp_path / "some", "{labels: 'python:round_judge:score'}")
    for arm in ARMS:
        counts = record["arms"][arm]
        assert 0 < counts["failed"] < counts["labels"] == record["arms"]["dpo"]["labels"]
        rows = from_parquet(tmp_path / "some" / f"{arm}.parquet")
        assert sum(len(splits.pairs(row)) for row in rows) == counts["labels"] - counts["failed"]
        assert not any(len(text) % 5 == 0 for row in rows for text in row.responses)
    judge_module.score = lambda completions, **_: [None] * len(completions)  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="labelled none of"):
        label(small_run, tmp_path / "none", "{labels: 'python:round_judge:score'}")


def test_a_stopped_stage_draws_no_sample_again(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label(small_run, tmp_path / "whole", "2")
    with monkeypatch.context() as patch:
        patch.setattr(labels, "labels_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            label(small_run, tmp_path / "stopped", "2")
    monkeypatch.setattr(labels, "sample_policy", lambda *_: pytest.fail("sampled again"))
    label(small_run, tmp_path / "stopped", "2")
    for name in ("rm_ppo.parquet", "dpo.parquet"):
        assert from_parquet(tmp_path / "stopped" / name) == from_parquet(tmp_path / "whole" / name)


def test_a_language_model_labels_by_principles(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    for number, rounds in enumerate(
        ("{labels: 'llm:tiny', principles: hhh, label_budget: 3}", "{labels: 'llm:tiny', label_budget: 3}")
    ):
        record = label(small_run, tmp_path / str(number), rounds)
        assert [record["arms"][arm]["labels"] for arm in ARMS] == [3, 3]
        assert [usage["judge"] for usage in record["usages"]] == ["llm:tiny"] * 2
        assert all(usage["n_questions"] == 6 for usage in record["usages"])  # both orders
        [soft, *_] = [
            pair.p for row in from_parquet(tmp_path / str(number) / "dpo.parquet") for pair in splits.pairs(row)
        ]
        assert 0 < soft < 1 and soft != 0.5


def test_the_arm_with_fewer_pairs_sets_the_number(capsys: pytest.CaptureFixture[str]) -> None:
    rows = from_rows("ab", "cd")
    two = labels.in_turns(rows, [*drawn("ab", "x", "y", "x"), *drawn("cd", "x", "y", "z")])
    assert [(pair.prompt, *pair.texts) for pair in two] == [
        ("ab", "x", "y"),
        ("cd", "x", "y"),
        ("cd", "x", "z"),
        ("cd", "y", "z"),
    ]
    one = labels.in_turns(rows, [*drawn("ab", "x", "x", "x"), *drawn("cd", "x", "y", "y")])
    reporter = Reporter()
    assert labels.labels_for_each({"rm_ppo": two, "dpo": one}, None, reporter) == 1
    assert labels.labels_for_each({"rm_ppo": two, "dpo": two}, 3, reporter) == 3
    assert "4 of RM + PPO, 1 of DPO; 1 label for each arm" in capsys.readouterr().err
    none = labels.in_turns(rows, [*drawn("ab", "x", "x"), *drawn("cd", "y", "y")])
    with pytest.raises(DataError, match="DPO writes one text"):
        labels.labels_for_each({"rm_ppo": two, "dpo": none}, None, reporter)


def from_rows(*prompts: str) -> list[Any]:
    return [labels.PreferenceRow(prompt, prompt, [], []) for prompt in prompts]


def drawn(prompt: str, *texts: str) -> list[Sample]:
    return [Sample(prompt, sample_index=k, response=text) for k, text in enumerate(texts)]
