"""Every format reads back to the preferences it was built from."""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.preference_files import conversations, endings, quick, read_records, texts, words

from toolkit.errors import DataError
from toolkit.preferences.parsing import common_prefix_length, parse_transcript
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import (
    Comparison,
    PreferenceRow,
    soft_comparisons,
)
from toolkit.preferences.splits import labelled_pairs, pairs

# ------------------------------------------------------------------------------------------------- chosen / rejected
pair_records = st.lists(st.tuples(texts, texts, texts).filter(lambda t: t[1] != t[2]), min_size=1, max_size=4)


@endings
@quick
@given(result=pair_records)
def test_prompt_chosen_rejected(tmp_path: Path, ending: str, result: list[tuple[str, str, str]]) -> None:
    records = [dict(zip(("prompt", "chosen", "rejected"), one, strict=True)) for one in result]
    data = read_records(tmp_path, records, ending)
    by_prompt = {row.prompt: row for row in data.rows}
    expected = {(p, c, r): result.count((p, c, r)) for p, c, r in result}
    for (prompt, chosen, rejected), n in expected.items():
        row = by_prompt[prompt]
        wins = sum((row.responses[c.winner], row.responses[c.loser]) == (chosen, rejected) for c in row.comparisons)
        assert wins == n
    assert data.report.n_comparisons == len(result)
    assert data.report.n_duplicates == len(result) - len(expected)
    assert data.report.format == "chosen/rejected"


@pytest.mark.parametrize("given_as", ["nothing", "text", "messages", "messages apart"])
@quick
@given(prompt=conversations(texts), chosen=texts, rejected=texts)
def test_message_lists(tmp_path: Path, given_as: str, prompt: Any, chosen: str, rejected: str) -> None:
    start = [] if given_as == "messages apart" else prompt
    record = {
        "chosen": [*start, {"role": "assistant", "content": chosen}],
        "rejected": [*start, {"role": "assistant", "content": rejected}],
    }
    if given_as == "text":
        record["prompt"] = prompt[-1]["content"]
    elif given_as != "nothing":
        record["prompt"] = prompt
    records = [record, *other_record(record)]
    data = read_records(tmp_path, records)
    assert data.report.conversational
    assert data.rows[-1].responses == ["yes", "no"]
    if chosen == rejected:
        assert (data.report.n_identical, data.report.identical_rows, len(data.rows)) == (1, (1,), 1)
    else:
        assert data.rows[0].prompt == prompt
        assert data.rows[0].responses == [chosen, rejected]
        assert data.rows[0].comparisons == [Comparison(0, 1)]


def other_record(like: dict[str, Any]) -> list[dict[str, Any]]:
    """A record of the same columns with another prompt, so that something is left when the first one is identical."""
    question = [{"role": "user", "content": "a question that hypothesis does not find"}]
    start = question if len(like["chosen"]) > 1 else []
    record: dict[str, Any] = {
        "chosen": [*start, {"role": "assistant", "content": "yes"}],
        "rejected": [*start, {"role": "assistant", "content": "no"}],
    }
    if "prompt" in like:
        record["prompt"] = question if isinstance(like["prompt"], list) else question[0]["content"]
    return [record]


def test_text_prompt_with_assistant_messages_becomes_a_user_turn(tmp_path: Path) -> None:
    record = {
        "prompt": "Why?",
        "chosen": [{"role": "assistant", "content": "So."}],
        "rejected": [{"from": "gpt", "value": "No."}],
    }
    row = read_records(tmp_path, [record]).rows[0]
    assert (row.prompt, row.responses) == ([{"role": "user", "content": "Why?"}], ["So.", "No."])


def test_conversations_that_part_early_are_counted(tmp_path: Path) -> None:
    def turns(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[k % 2], "content": c} for k, c in enumerate(contents)]

    records = [
        {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "x")},
        {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "c", "e")},
        {name: [*turns("a", "b"), turns("", name)[1]] for name in ("chosen", "rejected")},  # assistant twice in a row
    ]
    data = read_records(tmp_path, records)
    assert (data.report.n_unparsable, data.report.unparsable_rows) == (2, (1, 3))
    assert data.rows[0].prompt == turns("a", "b", "c")


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_message_lists_in_tables(tmp_path: Path, ending: str) -> None:
    chat = [{"role": "user", "content": 'say "hi"'}]
    record = {
        "chosen": [*chat, {"role": "assistant", "content": "hi"}],
        "rejected": [*chat, {"role": "assistant", "content": "no"}],
    }
    row = read_records(tmp_path, [record], ending).rows[0]
    assert (row.prompt, row.responses) == (chat, ["hi", "no"])


# ------------------------------------------------------------------------------------------------- transcripts
def transcript(messages: list[dict[str, str]]) -> str:
    return "".join(f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in messages)


@quick
@given(prompt=conversations(words), chosen=words, rejected=words)
def test_transcripts(tmp_path: Path, prompt: Any, chosen: str, rejected: str) -> None:
    full = [transcript([*prompt, {"role": "assistant", "content": text}]) for text in (chosen, rejected + "!")]
    record = dict(zip(("chosen", "rejected"), full, strict=True))
    row = read_records(tmp_path, [record]).rows[0]
    assert (row.prompt, row.responses) == (prompt, [chosen, rejected + "!"])
    data = read_records(tmp_path, [record], conversational=False)
    assert not data.report.conversational
    assert data.rows[0].prompt == transcript(prompt) + "\n\nAssistant:"
    assert [data.rows[0].prompt + response for response in data.rows[0].responses] == full


def test_transcripts_that_part_before_the_last_turn(tmp_path: Path) -> None:
    """The prompt ends at the last "Assistant:" that both share; later turns stay in the response's text."""
    start = "\n\nHuman: a\n\nAssistant:"
    records = [
        {"chosen": start + " b\n\nHuman: c\n\nAssistant: d", "rejected": start + " b\n\nHuman: e\n\nAssistant: f"},
        {"chosen": "\n\nHuman: z\n\nAssistant: d", "rejected": "\n\nHuman: y\n\nAssistant: f"},
    ]
    data = read_records(tmp_path, records)
    assert data.rows[0].prompt == [{"role": "user", "content": "a"}]
    assert data.rows[0].responses == ["b\n\nHuman: c\n\nAssistant: d", "b\n\nHuman: e\n\nAssistant: f"]
    assert (data.report.n_multi_turn, data.report.n_unparsable, data.report.unparsable_rows) == (1, 1, (2,))


def test_one_transcript_that_is_no_conversation_keeps_all_as_text(tmp_path: Path) -> None:
    good, odd = "\n\nHuman: a\n\nAssistant:", "Preface\n\nHuman: a\n\nAssistant:"
    records = [{"chosen": start + " x", "rejected": start + " y"} for start in (good, odd)]
    assert [row.prompt for row in read_records(tmp_path, records).rows] == [good, odd]
    data = read_records(tmp_path, records, conversational=True)
    assert [row.prompt for row in data.rows] == [[{"role": "user", "content": "a"}]]
    assert data.report.unparsable_rows == (2,)


def test_two_turns_of_one_speaker_become_one_message() -> None:
    text = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    assert parse_transcript(text) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n\nc"},
        {"role": "user", "content": "d"},
    ]
    assert parse_transcript("\n\nAssistant: b\n\nHuman: d\n\nAssistant:") is None
    assert parse_transcript("\n\nHuman: a\n\nAssistant: b\n\nAssistant:") is None


@given(texts, texts, texts)
def test_common_prefix_length(start: str, a: str, b: str) -> None:
    assert common_prefix_length(start + a, start + b) == len(os.path.commonprefix([start + a, start + b]))


@quick
@given(prompt=st.lists(words, min_size=1, max_size=6).map(" ".join), endings=st.lists(words, min_size=2, max_size=2))
def test_implicit_prompt_of_plain_texts(tmp_path: Path, prompt: str, endings: list[str]) -> None:
    full = [f"{prompt} 1{endings[0]}", f"{prompt} 2{endings[1]}"]
    row = read_records(tmp_path, [{"chosen": full[0], "rejected": full[1]}]).rows[0]
    assert row.prompt == prompt
    assert [row.prompt + response for response in row.responses] == full


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("It was good", "It was great", "It was"),  # not "It was g"
        ("Q?\n\nYes", "Q?\n\nNo", "Q?"),
        ("a b", "a b c", "a"),  # one text is the start of the other: both keep something
        ("Hello world", "Hello\tthere", "Hello"),
    ],
)
def test_implicit_prompt_ends_at_a_word(tmp_path: Path, chosen: str, rejected: str, prompt: str) -> None:
    row = read_records(tmp_path, [{"chosen": chosen, "rejected": rejected}]).rows[0]
    assert (row.prompt, [prompt + r for r in row.responses]) == (prompt, [chosen, rejected])


@pytest.mark.parametrize(
    ("columns", "answers", "named"),
    [
        ({"problem": "Q{k}?"}, ("The answer is {k}.", "The sky is blue."), "'problem'"),
        ({"riddle": "What has {k} legs and no head?"}, ("A table.", "No idea."), "'riddle'"),
        ({"riddle": "What has {k} legs and no head?"}, ("The table.", "The idea."), "'riddle'"),  # one prompt for all
        ({"context": "Some text {k}."}, ("A table.", "No idea."), "'context'"),
    ],
)
def test_texts_beside_an_unknown_prompt_have_no_implicit_one(
    tmp_path: Path, columns: dict[str, str], answers: tuple[str, str], named: str
) -> None:
    texts = {**columns, "chosen": answers[0], "rejected": answers[1]}
    records = [{name: text.format(k=k) for name, text in texts.items()} for k in range(6)]
    with pytest.raises(DataError, match="no column is known to hold the prompt") as caught:
        read_records(tmp_path, records)
    [name] = columns
    assert named in caught.value.fix and f"columns: {{prompt: {name}}}" in caught.value.fix
    assert read_records(tmp_path, records, columns={"prompt": name}).rows[0].prompt == columns[name].format(k=0)


def test_other_columns_leave_the_implicit_prompt(tmp_path: Path) -> None:
    """Ids, sources, scores, categories; and remarks, where the texts do begin with prompts."""
    records = [
        {"chosen": f"Question {k}: why? Because.", "rejected": f"Question {k}: why? No.", "id": f"a8f3-{k}",
         "source": "a web page", "score_chosen": 4.5, "model": f"model-{k % 2}", "task": "short answers", "n": k,
         "user": f"ann-{k}", "rationale": f"The first of {k} is better than the other.", "problem": None,
         "document": f"doc {k} of words"}
        for k in range(6)
    ]  # fmt: skip
    data = read_records(tmp_path, records)
    assert [row.prompt for row in data.rows] == [f"Question {k}: why?" for k in range(6)]
    names = "'id', 'source', 'score_chosen', 'model', 'task', 'n', 'user', 'rationale', 'problem', 'document'"
    assert data.report.warnings() == [f"columns that are not read: {names}"]
    transcripts = [{**r, "task": f"x{k}", "chosen": f"\n\nHuman: a{k}\n\nAssistant: b",
                    "rejected": f"\n\nHuman: a{k}\n\nAssistant: c"} for k, r in enumerate(records)]  # fmt: skip
    assert read_records(tmp_path, transcripts).report.format == "chosen/rejected transcripts"


# ------------------------------------------------------------------------------------------------- K responses
@st.composite
def valued(draw: st.DrawFn) -> tuple[list[str], list[int]]:
    responses = draw(st.lists(texts, min_size=2, max_size=6, unique=True))
    return responses, draw(st.lists(st.integers(1, 4), min_size=len(responses), max_size=len(responses)))


def expected_pairs(values: list[float]) -> list[tuple[int, int, float]]:
    return [(i, j, (1 + (values[i] > values[j]) - (values[i] < values[j])) / 2)
            for i, j in combinations(range(len(values)), 2)]  # fmt: skip


@endings
@quick
@given(result=valued())
def test_ranked_and_scored(tmp_path: Path, ending: str, result: tuple[list[str], list[int]]) -> None:
    responses, values = result
    scored = read_records(tmp_path, [{"prompt": "p", "responses": responses, "scores": values}], ending)
    ranked = read_records(tmp_path, [{"prompt": "p", "responses": responses, "ranks": values}], ending)
    assert [pair[:3] for pair in pairs(scored.rows[0])] == expected_pairs([float(v) for v in values])
    assert [pair[:3] for pair in pairs(ranked.rows[0])] == expected_pairs([-float(v) for v in values])
    assert scored.report.n_comparisons == len(responses) * (len(responses) - 1) // 2
    assert scored.report.n_ties == sum(p == 0.5 for _, _, p in expected_pairs([float(v) for v in values]))


@given(st.permutations(range(5)))
@quick
def test_ranking_of_indices(tmp_path: Path, order: list[int]) -> None:
    row = read_records(tmp_path, [{"prompt": "p", "responses": list("abcde"), "ranking": order}]).rows[0]
    won = {(c.winner, c.loser) for c in row.comparisons}
    assert won == set(combinations(order, 2))  # earlier in the ranking wins


def test_a_missing_score_leaves_its_pairs_unjudged(tmp_path: Path) -> None:
    data = read_records(tmp_path, [{"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, None, 2]}])
    assert [pair[:3] for pair in pairs(data.rows[0])] == [(0, 2, 0.0)]
    assert data.report.n_unlabelled == 2


def test_ultrafeedback_completions(tmp_path: Path) -> None:
    def completion(text: str, overall: float | None, fine: float) -> dict[str, Any]:
        return {"response": text, "overall_score": overall, "fine-grained_score": fine, "model": "m"}

    records = [
        {"instruction": "p", "completions": [completion("a", 3, 1), completion("b", 8, 2), completion("c", 8, 3)]},
        {"instruction": "q", "completions": [completion("a", None, 1), completion("b", 8, 2)]},
    ]
    data = read_records(tmp_path, records)
    assert [pair[:3] for pair in pairs(data.rows[0])] == [(0, 1, 0.0), (0, 2, 0.0), (1, 2, 0.5)]
    assert [pair[:3] for pair in pairs(data.rows[1])] == [(0, 1, 0.0)]  # by the score that all of its completions have


def test_summaries(tmp_path: Path) -> None:
    info = {"post": "Long.", "title": "T", "subreddit": "tifu", "id": "x"}
    record = {"info": info, "summaries": [{"text": " one"}, {"text": "two"}], "choice": 1, "worker": "w9"}
    row = read_records(tmp_path, [record]).rows[0]
    assert row.prompt == "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: Long.\n\nTL;DR:"
    assert (row.responses, row.comparisons) == ([" one", " two"], [Comparison(1, 0, 1.0, "w9")])


# ------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize(
    ("column", "value", "p"),
    [
        ("label", 1, 1.0), ("label", 2, 0.0), ("label", 0, 0.5), ("label", "1", 1.0), ("label", 2.0, 0.0),
        ("winner", "A", 1.0), ("winner", "b", 0.0), ("winner", "tie", 0.5),
        ("winner", "model_a", 1.0), ("winner", "model_b", 0.0), ("winner", "tie (bothbad)", 0.5),
        ("preference", 1.25, 0.75), ("preference", 1.5, 0.5), ("preference", 0, 0.5), ("preference", 1.0, 1.0),
        ("probability", 0.25, 0.25), ("label_probability", 1, 1.0), ("probability", "0.75", 0.75),
        ("choice", 0, 1.0), ("choice", 1, 0.0), ("better_response_id", 1, 0.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("names", [("response_a", "response_b"), ("output_1", "output_2"), ("response1", "response2")])
def test_pair_labels(tmp_path: Path, column: str, value: Any, p: float, names: tuple[str, str]) -> None:
    record = {"prompt": "p", names[0]: "first", names[1]: "second", column: value}
    data = read_records(tmp_path, [record])
    assert data.rows[0].responses == ["first", "second"]
    assert [tuple(pair) for pair in pairs(data.rows[0])] == [(0, 1, p, 1.0)]
    assert (data.report.n_comparisons, data.report.n_ties) == (1, int(p == 0.5))


@given(st.floats(0, 1))
def test_soft_labels_keep_their_probability(p: float) -> None:
    row = PreferenceRow("", "p", ["a", "b"], soft_comparisons(0, 1, p))
    assert pairs(row)[0].p == pytest.approx(p, abs=1e-15)
    assert all(c.weight > 0 for c in row.comparisons)
    assert [judged.p for judged in labelled_pairs(row.comparisons)] == pytest.approx([p], abs=1e-15)


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_several_annotators(tmp_path: Path, ending: str) -> None:
    record = {"instruction": "do", "input": "this", "response1": "x", "response2": "y"}
    records = [record | {"annotator1": 1, "annotator2": 2, "annotator3": 0}]
    data = read_records(tmp_path, records, ending)
    assert data.rows[0].prompt == "do\n\nthis"
    assert {c.annotator for c in data.rows[0].comparisons} == {"annotator1", "annotator2", "annotator3"}
    assert (data.report.n_annotators, data.report.n_comparisons, data.report.n_ties) == (3, 3, 1)
    assert data.report.n_contradictions == 0  # two people may disagree
    only = read_records(tmp_path, records, ending, annotators=["annotator2"])
    assert only.rows[0].comparisons == [Comparison(1, 0, 1.0, "annotator2")]


def test_arena_conversations(tmp_path: Path) -> None:
    question = {"role": "user", "content": "q"}
    record = {
        "conversation_a": [question, {"role": "assistant", "content": "x"}],
        "conversation_b": [question, {"role": "assistant", "content": "y"}],
        "winner": "model_b",
    }
    row = read_records(tmp_path, [record]).rows[0]
    assert (row.prompt, row.responses, row.comparisons) == ([question], ["x", "y"], [Comparison(1, 0)])


@quick
@given(labels=st.lists(st.sampled_from([0, 1, 2]), min_size=6, max_size=6))
def test_label_lists_in_order_of_pairs(tmp_path: Path, labels: list[int]) -> None:
    numbered = {f"prediction {k}": f"r{k}" for k in (1, 2, 3, 4)}
    listed = {"responses": ["r1", "r2", "r3", "r4"]}
    expected = [(i, j, {0: 0.5, 1: 1.0, 2: 0.0}[label])
                for (i, j), label in zip(combinations(range(4), 2), labels, strict=True)]  # fmt: skip
    for record in ({"question": "p", **numbered, "preference": labels}, {"prompt": "p", **listed, "labels": labels}):
        row = read_records(tmp_path, [record]).rows[0]
        assert row.responses == ["r1", "r2", "r3", "r4"]
        assert [pair[:3] for pair in pairs(row)] == expected


def test_missing_labels_are_counted_and_the_prompt_stays(tmp_path: Path) -> None:
    base = {"prompt": "p", "output_1": "x", "output_2": "y"}
    data = read_records(tmp_path, [base | {"preference": None}, base | {"prompt": "q", "preference": 1.9}])
    assert (data.report.n_unlabelled, data.report.n_unjudged, data.report.n_prompts) == (1, 1, 2)


# ------------------------------------------------------------------------------------------------- merging, columns
def test_rows_of_one_prompt_are_merged(tmp_path: Path) -> None:
    rows = [("p", "a", "b"), ("q", "a", "b"), ("p", "c", "a"), ("p", "b", "a"), ("p", "a", "b"), ("p", "d", "d")]
    records = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    data = read_records(tmp_path, records)
    assert [row.prompt for row in data.rows] == ["p", "q"]
    assert data.rows[0].responses == ["a", "b", "c", "d"]
    won = [(c.winner, c.loser) for c in data.rows[0].comparisons]
    assert won == [(0, 1), (2, 0), (1, 0), (0, 1)]
    report = data.report
    assert (report.n_duplicates, report.n_contradictions, report.n_identical) == (1, 1, 1)
    assert report.identical_rows == (6,)
    assert [row.source_row for row in data.rows] == [1, 2]
    assert any("judged both ways" in text for text in report.warnings())


def test_empty_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    records = [good, good | {"chosen": " \n"}, good | {"rejected": None}, good | {"prompt": ""}]
    report = read_records(tmp_path, records).report
    assert (report.n_empty, report.empty_rows, report.n_comparisons) == (3, (2, 3, 4), 1)


def test_gold_follows_its_response_through_merging(tmp_path: Path) -> None:
    records = [
        {"prompt": "p", "responses": ["a", "b"], "comparisons": [], "gold": [1, 2]},
        {"prompt": "p", "responses": ["c", "a"], "comparisons": [{"winner": 0, "loser": 1}], "gold": [3, 1]},
    ]
    row = read_records(tmp_path, records).rows[0]
    assert (row.responses, row.gold, row.comparisons) == (["a", "b", "c"], [1.0, 2.0, 3.0], [Comparison(2, 0)])


def test_column_mapping(tmp_path: Path) -> None:
    record = {"question": "p", "good": "x", "bad": "y", "prompt": "something else", "id": 7}
    data = read_records(tmp_path, [record], columns={"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert (data.rows[0].prompt, data.rows[0].responses) == ("p", ["x", "y"])
    assert data.report.ignored_columns == ("id",)


def test_plain_prompts_as_conversation(tmp_path: Path) -> None:
    record = {"prompt": "p", "chosen": "x", "rejected": "y"}
    assert read_records(tmp_path, [record]).rows[0].prompt == "p"
    data = read_records(tmp_path, [record], conversational=True)
    assert data.rows[0].prompt == [{"role": "user", "content": "p"}]
    assert data.report.conversational


def test_report_is_json_and_repeated_prompts_are_noticed(tmp_path: Path) -> None:
    report = read_records(tmp_path, [{"prompt": "p?", "chosen": "p? x", "rejected": "p? y"}]).report
    assert report.n_prompt_repeated == 1
    assert json.loads(json.dumps(report.to_dict()))["n_prompts"] == 1


def test_json_lines_inside_json_and_wrapped_lists(tmp_path: Path) -> None:
    record = {"prompt": "p\u2028q", "chosen": "x", "rejected": "y"}  # U+2028 ends a line for str.splitlines
    (tmp_path / "lines.json").write_text(f"{json.dumps(record, ensure_ascii=False)}\n" * 2, encoding="utf-8")
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": [record]}), encoding="utf-8-sig")
    assert read_preferences(str(tmp_path / "lines.json")).report.n_duplicates == 1
    assert read_preferences(str(tmp_path / "wrapped.json")).rows[0].prompt == "p\u2028q"
