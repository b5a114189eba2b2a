"""The prompt of a row is the same to every reader: to a run, to prompts, to single responses and to the filter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import DataError
from toolkit.measure.options import PromptSelection
from toolkit.measure.outputs import read_outputs
from toolkit.measure.responses import read_responses
from toolkit.measure.single_responses import read_single_responses
from toolkit.preferences.prompts import read_prompts
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import Prompt
from toolkit.preferences.stream import row_file, row_reader

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Why?"}
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant:"
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

# the columns of the prompt, and the prompt
PROMPTS: dict[str, tuple[dict[str, Any], Prompt]] = {
    "text": ({"prompt": "Why?"}, "Why?"),
    "input follows instruction": ({"instruction": "Translate.", "input": "Hello"}, "Translate.\n\nHello"),
    "messages": ({"prompt": [USER]}, [USER]),
    "JSON of messages": ({"prompt": json.dumps([USER])}, [USER]),
    "system": ({"prompt": "Why?", "system": "Be kind."}, [SYSTEM, USER]),
    "system beside messages": ({"prompt": [USER], "system_prompt": "Be kind."}, [SYSTEM, USER]),
    "earlier turns": ({"question": "Why?", "history": [["Hi", "Hello"]]}, [*EARLIER, USER]),
    "earlier turns behind a system message": (
        {"prompt": [SYSTEM, USER], "history": [["Hi", "Hello"]]},
        [SYSTEM, *EARLIER, USER],
    ),
    "a transcript with a column of its own": ({"prompt": TRANSCRIPT}, TRANSCRIPT),
}


def written(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def by_filter(source: str, **options: Any) -> list[tuple[Prompt, list[str]]]:
    reader = row_reader(row_file(source), options.pop("columns", {}), **options)
    found = [reader.read(k, r) for chunk in reader.file.chunks(10) for k, r in enumerate(chunk.records, chunk.first)]
    return [(datum.prompt, datum.responses) for datum in found if datum is not None]


@pytest.mark.parametrize("case", PROMPTS)
def test_every_reader_has_the_prompt_of_a_run(tmp_path: Path, case: str) -> None:
    columns, prompt = PROMPTS[case]
    pair = written(tmp_path / "pairs.jsonl", {**columns, "chosen": " yes", "rejected": " no"})
    single = written(tmp_path / "single.jsonl", {**columns, "response": " yes"})
    alone = written(tmp_path / "alone.jsonl", columns)
    assert [(row.prompt, row.responses) for row in read_preferences(pair).rows] == [(prompt, [" yes", " no"])]
    for source in (pair, single, alone):
        assert [item.prompt for item in read_prompts(source)] == [prompt], source
    listed = written(tmp_path / "listed.jsonl", {**columns, "responses": [" yes", " no"]})
    [answered] = read_responses(PromptSelection(data=listed))
    assert (answered.prompt, answered.responses) == (prompt, [" yes", " no"])
    singles = read_single_responses(single, "train")
    assert singles is not None and [(row.prompt, row.responses) for row in singles.rows] == [(prompt, [" yes"])]
    assert by_filter(pair) == [(prompt, [" yes", " no"])]
    assert by_filter(single) == [(prompt, [" yes"])]
    for conversational in (True, False):
        if conversational or "message" not in case:
            [run] = read_preferences(pair, conversational=conversational).rows
            [other] = read_single_responses(single, "train", conversational=conversational).rows  # type: ignore[union-attr]
            assert other.prompt == run.prompt and other.responses == run.responses[:1]
            assert by_filter(single, conversational=conversational) == [(run.prompt, run.responses[:1])]
            assert [item.prompt for item in read_prompts(alone, conversational=conversational)] == [run.prompt]


def test_transcripts_are_messages_where_all_of_a_file_are(tmp_path: Path) -> None:
    """Those of the first 100 rows do not decide, and none is left out."""
    pairs = [{side: f"{TRANSCRIPT} {side} {k}." for side in ("chosen", "rejected")} for k in range(101)]
    source = written(tmp_path / "all.jsonl", *pairs)
    run = [(row.prompt, row.responses) for row in read_preferences(source).rows]
    assert run[0][0] == [EARLIER[0]] and run[0][1][:2] == ["chosen 0.", "rejected 0."]
    assert by_filter(source) == [(run[0][0], [f"chosen {k}.", f"rejected {k}."]) for k in range(101)]
    odd = "\n\nAssistant: I ask.\n\nHuman: Hi\n\nAssistant:"
    source = written(tmp_path / "odd.jsonl", *pairs, {side: f"{odd} {side}" for side in ("chosen", "rejected")})
    assert [row.prompt for row in read_preferences(source).rows] == [TRANSCRIPT, odd]
    read = by_filter(source)
    assert len(read) == 102 and read[0] == (TRANSCRIPT, [" chosen 0.", " rejected 0."]) and read[-1][0] == odd


def test_texts_that_stay_texts_leave_messages_as_they_are(tmp_path: Path) -> None:
    """Of rows of one response, and in the filter; a run refuses messages then."""
    single = written(tmp_path / "single.jsonl", {"prompt": [USER], "response": " yes"})
    scored = written(tmp_path / "scored.jsonl", *({"prompt": [USER], "response": " yes", "score": k} for k in (1, 2)))
    for source in (single, scored):
        assert read_single_responses(source, "train", conversational=False).rows[0].prompt == [USER]  # type: ignore[union-attr]
        assert by_filter(source, conversational=False)[0] == ([USER], [" yes"])
    with pytest.raises(DataError, match="conversational=False, but the prompt is chat messages"):
        read_preferences(scored, conversational=False)


def test_mapped_columns_are_read_as_a_run_reads_them(tmp_path: Path) -> None:
    pair = {"problem": "Why?", "good": " yes", "bad": " no", "prompt": "something else"}
    columns = {"prompt": "problem", "chosen": "good", "rejected": "bad"}
    source = written(tmp_path / "a.jsonl", pair)
    [row] = read_preferences(source, columns=columns).rows
    assert by_filter(source, columns=columns) == [(row.prompt, row.responses)] == [("Why?", [" yes", " no"])]
    single = written(tmp_path / "b.jsonl", {"problem": "Why?", "text": " yes"})
    assert by_filter(single, columns={"prompt": "problem", "response": "text"}) == [("Why?", [" yes"])]
    with pytest.raises(DataError, match="no format has a column 'chosn'"):
        by_filter(source, columns={"chosn": "good"})


def test_labels_of_0_and_1_are_refused_by_the_filter_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{k}", "response_a": "a", "response_b": "b", "label": k % 2} for k in range(120)]
    source = written(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError, match="every label in 'label' is 0 or 1"):
        row_reader(row_file(source), {})
    rows[110]["label"] = 2
    row_reader(row_file(written(tmp_path / "b.jsonl", *rows)), {})


def test_a_prompt_in_two_groups_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": text, "score": k, "group": f"g{k}"} for k, text in enumerate("ab")]
    source = written(tmp_path / "a.jsonl", *rows)
    for read in (read_preferences, read_prompts, lambda name: read_single_responses(name, "train")):
        with pytest.raises(DataError, match="group 'g1' here and 'g0' earlier for the same prompt") as caught:
            read(source)
        assert "a.jsonl, line 2" in caught.value.where


def test_outputs_of_systems_have_these_prompts(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", {"instruction": "Translate.", "input": "Hello", "output": "Bonjour"})
    [outputs] = read_outputs([Path(source)]).values()
    assert outputs.prompt(int(outputs.prompts[0])) == "Translate.\n\nHello"
