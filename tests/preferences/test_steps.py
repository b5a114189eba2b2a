"""Step data: its layouts, what solutions share, and wrong rows with their place."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import DataError
from toolkit.preferences.solutions import Solution, solutions_from_parquet, solutions_to_parquet, split_solutions
from toolkit.preferences.steps import read_steps

REAL = os.environ.get("DUEL_REAL_DATA")
GOOD = {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}


def file_of(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "steps.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def candidate(before: list[str], step: str, rating: object) -> dict[str, Any]:
    return {"instruction": "q", "responses": before, "next_response": step, "rating": rating}


def test_trl_layout_with_steps_by_either_name(tmp_path: Path) -> None:
    named_steps = {"prompt": "q", "steps": [" c ", "d"], "labels": [1, None]}
    for row in (GOOD, named_steps):
        [solution] = read_steps(file_of(tmp_path, row)).solutions
        assert solution.steps == [step.strip() for step in row.get("steps", row.get("completions", []))]
        assert solution.labels == [None if label is None else bool(label) for label in row["labels"]]
        assert solution.source_row == 1 and solution.n_shared == 0


def test_solutions_share_the_steps_and_labels_that_they_begin_with(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "labels": [True, True, False]},
        {"prompt": "p", "completions": ["a", "b", "x"], "labels": [True, True, True]},
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, True]},
        {"prompt": "p", "completions": ["a", "b"], "labels": [False, True]},
        {"prompt": "other", "completions": ["a"], "labels": [True]},
    ]
    data = read_steps(file_of(tmp_path, *rows))
    assert [solution.n_shared for solution in data.solutions] == [0, 2, 0, 0]
    assert [solution.counted for solution in data.solutions] == [[0, 1, 2], [2], [0, 1], [0]]
    report = data.report
    assert (report.n_duplicates, report.n_contradictions, report.n_right, report.n_wrong) == (1, 1, 5, 2)


def test_prm800k_candidates_become_solutions(tmp_path: Path) -> None:
    """The longest path comes first; a candidate that nothing goes on from is a solution that shares what is before."""
    rows = [
        candidate([], "a", 1.0),
        candidate([], "z", -1.0),
        candidate(["a"], "b", 0.0),
        candidate(["a"], "y", None),
        candidate(["a", "b"], "c", -1.0),
        candidate(["human"], "d", 1.0),
    ]
    data = read_steps(file_of(tmp_path, *rows))
    assert [(s.steps, s.labels, s.n_shared) for s in data.solutions] == [
        (["a", "b", "c"], [True, True, False], 0),
        (["a", "y"], [True, None], 1),
        (["human", "d"], [None, True], 0),
        (["z"], [False], 0),
    ]
    report = data.report
    assert (report.n_neutral, report.n_right, report.n_wrong, report.n_unlabelled) == (1, 3, 2, 2)
    assert "neutral and count as right" in report.warnings()[0]


def nested(*steps: dict[str, Any]) -> dict[str, Any]:
    """An original record of PRM800K, with the fields that are not read."""
    label = {"steps": list(steps), "total_time": 1000, "finish_reason": "solution"}
    question = {"problem": "q", "ground_truth_answer": "1", "pre_generated_steps": ["a"]}
    return {"labeler": "x", "generation": None, "question": question, "label": label}


def offered(*texts_and_ratings: tuple[str, object], chosen: object = None, human: object = None) -> dict[str, Any]:
    completions = [{"text": text, "rating": rating, "flagged": None} for text, rating in texts_and_ratings]
    return {"completions": completions, "human_completion": human, "chosen_completion": chosen}


def test_original_records_of_prm800k_are_read_as_its_table_is(tmp_path: Path) -> None:
    human = {"text": "human", "rating": None, "source": "human", "flagged": False}
    rows = [
        nested(
            offered(("z", -1), ("a", 1), chosen=1),
            offered(("b", 0), chosen=0),
            offered(("c", -1), ("e", None)),
        ),
        nested(offered(("z", -1), human=human), offered(("d", 1), chosen=0)),
        nested(offered(("z", -1)), offered(("lost", 1), chosen=0)),
    ]
    data = read_steps(file_of(tmp_path, *rows))
    table = [
        *(candidate([], "z", -1), candidate([], "a", 1), candidate(["a"], "b", 0)),
        *(candidate(["a", "b"], "c", -1), candidate(["a", "b"], "e", None)),
        *(candidate([], "human", None), candidate(["human"], "d", 1)),
    ]
    same = read_steps(file_of(tmp_path, *table))
    assert [replace(s, source_row=0) for s in data.solutions] == [replace(s, source_row=0) for s in same.solutions]
    assert [(s.steps, s.source_row) for s in data.solutions] == [
        (["a", "b", "c"], 1),
        (["a", "b", "e"], 1),
        (["human", "d"], 2),
        (["z"], 1),
    ]
    assert (data.report.n_neutral, data.report.n_unclear) == (1, 1) and "original" in data.report.format
    assert any("1 rows do not say" in warning for warning in data.report.warnings())


def shepherd(text: str, signs: str) -> dict[str, str]:
    """A row of Math-Shepherd: the label has one sign for each mark of the text."""
    label = text
    for sign in signs:
        label = label.replace("ки", sign, 1)
    return {"input": text, "label": label, "task": "GSM8K"}


def test_math_shepherds_marks_divide_steps_and_carry_labels(tmp_path: Path) -> None:
    rows = [
        shepherd("How many - 2 + 1? Step 1: 2 + 1 = 3. ки\nStep 2: The answer is: 3 ки", "++"),
        shepherd("How many - 2 + 1? Step 1: 2 + 1 = 3. ки\nStep 2: The answer is: 4 ки", "+-"),
        shepherd("Who?  Nobody. ки\nI think. ки and more", "-+"),
        shepherd("Round ки to the nearest. Step 1: ten ки", "-+"),
        shepherd("No first step ки", "+"),
    ]
    data = read_steps(file_of(tmp_path, *rows))
    assert [(s.prompt, s.steps, s.labels, s.n_shared, s.source_row) for s in data.solutions] == [
        ("How many - 2 + 1?", ["Step 1: 2 + 1 = 3.", "Step 2: The answer is: 3"], [True, True], 0, 1),
        ("How many - 2 + 1?", ["Step 1: 2 + 1 = 3.", "Step 2: The answer is: 4"], [True, False], 1, 2),
        ("Who?", ["Nobody.", "I think.", "and more"], [False, True, None], 0, 3),
    ]
    assert data.report.n_unclear == 2 and data.report.format.startswith("Math-Shepherd")


@pytest.mark.skipif(REAL is None, reason="DUEL_REAL_DATA names no folder")
def test_prm800k_as_it_is() -> None:
    data = read_steps(f"{REAL}/prm800k/test.parquet")
    report = data.report
    assert (report.n_rows_read, report.n_prompts) == (2500, 47)
    # Of the 2,500 candidates some are the same step behind the same steps.
    assert report.n_right + report.n_wrong == 2176 and report.n_neutral == 431
    assert sum(len(solution.counted) for solution in data.solutions) == 2176


@pytest.mark.fault
@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "p", "completions": ["a", "b"]}, "no labels"),
        (GOOD | {"labels": None}, "steps and no labels"),
        (GOOD | {"labels": [True]}, "2 steps have 1 labels"),
        (GOOD | {"labels": [True, 2]}, "label of step 2 is 2"),
        (GOOD | {"labels": [True, -1]}, "label of step 2 is -1"),
        (GOOD | {"labels": [0.5, True]}, "label of step 1 is 0.5"),
        (GOOD | {"labels": ["right", True]}, "label of step 1 is 'right'"),
        (GOOD | {"labels": "11"}, "'labels' is text"),
        (GOOD | {"completions": ["a", " \n"]}, "step 2 of 2 is empty"),
        (GOOD | {"completions": ["a", 3]}, "step 2 is a number"),
        (GOOD | {"completions": [], "labels": []}, "no steps"),
        (GOOD | {"completions": "a b"}, "expected a list"),
        (GOOD | {"prompt": " "}, "prompt is empty"),
        (GOOD | {"labels": [None, None]}, "no step has a label"),
        ({"prompt": "p", "answer": "x"}, "not a known layout"),
        (candidate(["a"], "b", 2.0), "rating is 2.0"),
        (candidate(["a"], "b", "1"), "rating is '1'"),
        (candidate(["a", ""], "b", 1.0), "step 2 of 3 is empty"),
        (candidate(["a"], "", 1.0), "step 2 of 2 is empty"),
        ({"instruction": "q", "responses": [], "next_response": "a"}, "no labels"),
        (nested(offered(("a", 2), chosen=0)), "rating is 2"),
        (nested(offered(("a", True), chosen=0)), "rating is True"),
        (nested(offered(("a", 1), chosen=1)), "'chosen_completion' of step 1 is 1"),
        (nested(offered((" ", 1), chosen=0)), "step 1 of 1 is empty"),
        (nested(offered(("a", 1), human=3)), "human_completion is a number"),
        (nested() | {"question": "q"}, "question is text, expected an object"),
        (nested() | {"label": {"steps": "a"}}, "'steps' is text, expected a list"),
        (nested(), "no step has a label"),
        (shepherd("q? Step 1: a ки", "?"), "mark 1 of 'input' has '?'"),
        (shepherd("q? Step 1: a ки", "+") | {"label": "q?"}, "mark 1 of 'input' has ''"),
        (shepherd("q? ки Step 1: a", "+"), "no step has a label"),
        (shepherd("Step 1: a ки", "+"), "prompt is empty"),
    ],
)
def test_wrong_rows_are_refused_with_their_place(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_steps(file_of(tmp_path, row))
    assert says in caught.value.what and "steps.jsonl" in caught.value.where and "\n  fix:" in str(caught.value)


@pytest.mark.fault
def test_the_row_of_the_error_is_the_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3"):
        read_steps(file_of(tmp_path, GOOD, GOOD | {"prompt": "q"}, GOOD | {"labels": [True]}))
    for half in (GOOD | {"prompt": "\ud800"}, GOOD | {"completions": ["a", "\ud800"]}):
        with pytest.raises(DataError, match="surrogate pair.*\n.*line 2"):
            read_steps(file_of(tmp_path, GOOD, half))
    mixed = GOOD | {"prompt": [{"role": "user", "content": "q"}]}
    with pytest.raises(DataError, match="line 2 holds chat messages, line 1 holds plain text"):
        read_steps(file_of(tmp_path, GOOD, mixed))


def test_sides_are_whole_prompts_and_parquet_gives_back_equal_solutions(tmp_path: Path) -> None:
    solutions = [Solution(f"p{k // 3}", f"p{k // 3}", [f"s{k}"], [k % 2 == 0], 0, k) for k in range(300)]
    train, held_out = split_solutions(solutions, 0.3, 0)
    assert not {s.prompt_id for s in train} & {s.prompt_id for s in held_out}
    assert len(train) + len(held_out) == 300 and 45 < len(held_out) < 135
    chat = replace(solutions[0], prompt=[{"role": "user", "content": "q"}], labels=[None], n_shared=0)
    solutions_to_parquet([chat, *solutions[1:]], tmp_path / "steps.parquet")
    assert solutions_from_parquet(tmp_path / "steps.parquet") == [chat, *solutions[1:]]


def solution(name: str, group: str = "") -> Solution:
    return Solution(name, name, ["s"], [True], group=group)


def test_a_prompt_of_the_preference_data_takes_its_side_and_its_group_with_it() -> None:
    names = [f"p{k}" for k in range(60)]
    train, held_out = [(name, "") for name in names[:20]], [(name, "") for name in names[20:40]]
    sides = split_solutions([solution(name) for name in names], 0.5, 0, train, held_out)
    of_train, of_eval = ({s.prompt_id for s in side} for side in sides)
    assert set(names[:20]) <= of_train and set(names[20:40]) <= of_eval
    assert of_train & set(names[40:]) and of_eval & set(names[40:])
    assert [s.prompt_id for side in sides for s in side if s.prompt_id in names[40:]] == [
        s.prompt_id for side in split_solutions([solution(name) for name in names[40:]], 0.5, 0) for s in side
    ]
    # Whole groups: of the preference data, and of a prompt that is in both. One that is on both sides is held out.
    grouped = [solution("a", "x"), solution("b", "x"), solution("c", "y"), solution("d", "y"), solution("e", "y")]
    sides = split_solutions(grouped, 0.0, 0, [("p", "z"), ("c", "")], [("q", "x"), ("d", "")])
    assert [[s.prompt_id for s in side] for side in sides] == [["c"], ["a", "b", "d", "e"]]


def test_rows_of_steps_name_groups_that_are_held_out_whole(tmp_path: Path) -> None:
    rows = [GOOD | {"prompt": f"p{k}", "group": f"talk {k // 4}"} for k in range(120)]
    solutions = read_steps(file_of(tmp_path, *rows)).solutions
    train, held_out = ({s.group for s in side} for side in split_solutions(solutions, 0.3, 0))
    assert not train & held_out and len(train) + len(held_out) == 30 and held_out
    marked = {"input": "3+1? Step 1: 4 ки", "label": "3+1? Step 1: 4 +", "group": 7}
    for row in (marked, candidate([], "a", 1) | {"group": 7}):
        assert [s.group for s in read_steps(file_of(tmp_path, row)).solutions] == ["7"]
    with pytest.raises(DataError, match="group 'b' here and 'a' in another row of the same prompt.*\n.*line 2"):
        read_steps(file_of(tmp_path, GOOD | {"group": "a"}, GOOD | {"labels": [True, True], "group": "b"}))
