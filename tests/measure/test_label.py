"""Preference data by written principles: what is asked, how verdicts become labels, and reading them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import DataError, RecipeError, StoreError
from toolkit.files import write_table
from toolkit.judging import llm, principles
from toolkit.judging.answers import Answer, Question, remembering
from toolkit.judging.options import JudgeOptions
from toolkit.judging.responses import PolicyResponses
from toolkit.judging.templates import load_template
from toolkit.measure.label import label_data
from toolkit.measure.options import PromptSelection
from toolkit.preferences import splits
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import PreferenceRow, write_native
from toolkit.progress import Reporter
from toolkit.recipe.schema import JudgeSettings
from toolkit.recipe.training import ModelSection

QUIET = Reporter(quiet=True)
JUDGE = "openai:m@http://127.0.0.1:1/v1"
PROMPTS = ["first prompt", "second prompt"]
RESPONSES = [["one", "three", "fifteen"], ["seven", "eleven", "seven", "twenty-two"]]
RULES = ["Prefer the longer one.", "Prefer the shorter one.", "Prefer what comes later in the alphabet."]


def verdict(question: Question) -> float | None:
    """A judge that does what the principle says."""
    a, b = question.first, question.second
    if "longer" in question.principle:
        return 0.5 if len(a) == len(b) else float(len(a) > len(b))
    if "shorter" in question.principle:
        return 0.5 if len(a) == len(b) else float(len(a) < len(b))
    return float(a > b)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """All questions that reach the judge, which answers by :func:`verdict`."""
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    seen: list[Question] = []
    answer_with(monkeypatch, verdict, seen)
    return seen


def answer_with(
    monkeypatch: pytest.MonkeyPatch, judge: Callable[[Question], float | None], seen: list[Question] | None = None
) -> None:
    def ask(spec: str, template: Any, questions: Sequence[Question], options: JudgeOptions, keep: Any) -> None:
        for question in questions:
            if seen is not None:
                seen.append(question)
            value = judge(question)
            keep(question, Answer(value, error="" if value is not None else "no verdict"))

    monkeypatch.setattr(llm, "_ask", ask)


def label(draw: str = "one", labels: str = "soft", rules: Sequence[str] = RULES, seed: int = 0) -> principles.Labelled:
    options = JudgeOptions(ModelSection())
    labelling = principles.Labelling(JUDGE, rules, options, draw, labels, seed)  # type: ignore[arg-type]
    return principles.label_rows(list(zip(PROMPTS, RESPONSES, strict=True)), labelling, QUIET)


def test_one_principle_is_drawn_for_a_comparison_and_shown_in_both_orders(asked: list[Question]) -> None:
    labelled = label()
    assert labelled.n_comparisons == 6 and len(asked) == 12  # the response that comes twice is one response
    for row in labelled.rows:
        for i, j in combinations(range(3), 2):
            a, b = row.responses[i], row.responses[j]
            both = [q for q in asked if {q.first, q.second} == {a, b} and q.prompt == row.prompt]
            assert len(both) == 2 and both[0].principle == both[1].principle
            assert (both[0].first, both[0].second) == (both[1].second, both[1].first)
            [pair] = [p for p in splits.pairs(row) if (p.i, p.j) == (i, j)]
            assert pair.p == verdict(Question("", "", "", a, b, both[0].principle)) and pair.weight == 1.0
    drawn = {q.principle for q in asked}
    assert len(drawn) > 1
    again = label()
    assert again.rows == labelled.rows and len(asked) == 12  # the same draw, and nothing is asked twice
    assert again.usage.n_remembered == 12
    assert label(seed=1).rows != labelled.rows


def test_all_principles_vote(asked: list[Question]) -> None:
    labelled = label("all")
    assert len(asked) == 6 * 2 * 3
    for row in labelled.rows:
        for pair in splits.pairs(row):
            a, b = row.responses[pair.i], row.responses[pair.j]
            votes = [verdict(Question("", "", "", a, b, rule)) or 0.0 for rule in RULES]
            assert pair.p == pytest.approx(sum(votes) / 3) and pair.weight == pytest.approx(1.0)
    hard = label("all", "hard")
    for soft_row, row in zip(labelled.rows, hard.rows, strict=True):
        for soft, pair in zip(splits.pairs(soft_row), splits.pairs(row), strict=True):
            assert pair.p == (0.5 if soft.p == pytest.approx(0.5) else float(soft.p > 0.5))


def test_position_bias_becomes_doubt_and_is_counted(asked: list[Question], monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, lambda question: 0.8)  # whatever stands first
    labelled = label()
    assert {pair.p for row in labelled.rows for pair in splits.pairs(row)} == {0.5}
    assert (labelled.n_inconsistent, labelled.n_tied, labelled.n_failed) == (6, 6, 0)


def test_a_failed_order_leaves_the_comparison_out(asked: list[Question], monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, lambda q: None if q.first == "fifteen" else verdict(q))
    labelled = label()
    assert labelled.n_failed == 2 and labelled.usage.n_failed == 2
    first = next(row for row in labelled.rows if row.prompt == PROMPTS[0])
    assert [(p.i, p.j) for p in splits.pairs(first)] == [(0, 1)]
    answer_with(monkeypatch, verdict)
    assert label().n_failed == 0  # failures are asked again
    # a vote with a voice missing is no vote of all
    answer_with(monkeypatch, lambda q: None if "shorter" in q.principle and q.second == "three" else verdict(q))
    labelled = label("all", rules=["Choose the shorter one.", "Choose the longer one."])
    assert labelled.n_failed == 2 and labelled.usage.n_failed == 2


def test_the_principle_is_part_of_the_question(tmp_path: Path) -> None:
    questions = [Question("j", "t", "p", "a", "b", principle) for principle in ("", "x", "y")]
    assert len({question.key for question in questions}) == 3
    template = load_template("principle")
    assert "RULE 7" in template.messages("p", "a", "b", "RULE 7")[-1]["content"]
    with remembering(tmp_path / "m.sqlite") as memory:
        memory.keep(questions[0], Answer(1.0))
        assert memory.answers(questions[1:]) == {}


def test_a_template_without_or_with_a_needless_principle(asked: list[Question]) -> None:
    without, needless = (
        JudgeOptions(ModelSection(), JudgeSettings(template=template)) for template in ("choice", "principle")
    )
    rows = list(zip(PROMPTS, RESPONSES, strict=True))
    with pytest.raises(RecipeError, match="does not show the principle"):
        principles.label_rows(rows, principles.Labelling("llm:x", RULES, without), QUIET)
    responses = PolicyResponses(["p"], ["p"], {"a": [["x"]], "b": [["y"]]})
    with pytest.raises(RecipeError, match="shows a principle"):
        llm.judge_pairs("llm:x", [("a", "b")], responses, needless, QUIET)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "# ours\nBe kind.\n\n  Be brief.  \n", ["Be kind.", "Be brief."]),
        ("p.yaml", "- Be kind.\n- >-\n  Be\n  brief.\n", ["Be kind.", "Be brief."]),
    ],
)
def test_files_of_principles(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(content)
    assert principles.load_principles(str(tmp_path / name)) == expected
    assert len(principles.load_principles("hhh")) >= 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "# nothing\n\n", "no principle"),
        ("p.txt", "a\nb\na\n", "twice"),
        ("p.yaml", "a: b", "list of texts"),
        ("p.yaml", "- [", "not valid YAML"),
        ("q.txt", None, "no such file"),
    ],
)
def test_files_that_hold_none(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((DataError, RecipeError), match=message):
        principles.load_principles(str(tmp_path / name))


def run(data: Path, out: Path, judge: str = JUDGE, limit: int | None = None, force: bool = False) -> dict[str, Any]:
    labelling = principles.Labelling(judge, principles.load_principles("hhh"), JudgeOptions(ModelSection()))
    return label_data(labelling, PromptSelection(str(data), limit=limit), out=out, force=force, reporter=QUIET)


def test_preference_data_is_labelled_anew(asked: list[Question], tmp_path: Path) -> None:
    source, out = tmp_path / "data.jsonl.gz", tmp_path / "labels.jsonl.gz"
    pairs = zip(PROMPTS, RESPONSES, strict=True)
    write_native([PreferenceRow("", prompt, list(dict.fromkeys(texts)), []) for prompt, texts in pairs], source)
    summary = run(source, out)
    assert (summary["n_prompts"], summary["n_comparisons"], summary["n_failed"]) == (2, 6, 0)
    back = read_preferences(str(out))
    assert back.report.n_comparisons == 6 and {row.prompt for row in back.rows} == set(PROMPTS)
    assert {c.annotator for row in back.rows for c in row.comparisons} == {JUDGE}
    n_asked = len(asked)
    assert run(source, out) == summary and len(asked) == n_asked  # it is done
    with pytest.raises(StoreError, match="exists"):
        run(source, out, limit=1)
    with pytest.raises(RecipeError, match="cannot read a principle"):
        run(source, out, judge="gold", force=True)


def test_samples_of_a_run_are_labelled(asked: list[Question], tmp_path: Path) -> None:
    table = [
        {"prompt_id": f"p{row}", "policy": policy, "prompt": PROMPTS[row], "response": RESPONSES[row][k]}
        for k, policy in enumerate(("sft", "dpo"))
        for row in range(2)
    ]
    write_table(table, tmp_path / "samples.parquet")
    summary = run(tmp_path, tmp_path / "labels.jsonl.gz", limit=1)
    assert (summary["n_prompts"], summary["n_comparisons"]) == (1, 1)
    assert {q.first for q in asked} == {"one", "three"}


def test_nothing_to_label_and_nothing_labelled(
    asked: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(
        [{"prompt_id": "p", "policy": p, "prompt": "x", "response": "same"} for p in "ab"], tmp_path / "samples.parquet"
    )
    with pytest.raises(DataError, match="two different responses"):
        run(tmp_path, tmp_path / "out.jsonl.gz")
    write_native([PreferenceRow("", "x", ["a", "b"], [])], tmp_path / "d.jsonl.gz")
    answer_with(monkeypatch, lambda question: None)
    with pytest.raises(DataError, match="all 1 comparisons failed"):
        run(tmp_path / "d.jsonl.gz", tmp_path / "out.jsonl.gz")
    assert not (tmp_path / "out.jsonl.gz").exists()
