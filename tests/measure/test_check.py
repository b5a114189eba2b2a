# ruff: noqa: E501 (a case is one line)
"""``duel check``: data that trips each kind of finding, and data that looks like it and is sound."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.running import duel
from transformers import AutoTokenizer

from toolkit.errors import DataError, ModelError
from toolkit.measure.check.check import CheckOptions, CheckResult, check_data, check_with
from toolkit.measure.check.findings import KINDS
from toolkit.measure.check.rows import SourceOptions
from toolkit.measure.check.tokens import Limits
from toolkit.models.resolve import resolve
from toolkit.preferences.reading import read_preferences

TURN = "'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'"
OPENING = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
CHATML = "{%- for m in messages -%}{{- " + TURN + " -}}{%- endfor -%}" + OPENING
REFUSES_SYSTEM = (
    "{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}{{- "
    + TURN
    + " -}}{%- endfor -%}"
    + OPENING
)
DROPS_SYSTEM = (
    "{%- for m in messages if m['role'] in ('user', 'assistant') -%}{{- " + TURN + " -}}{%- endfor -%}" + OPENING
)
MERGES_SYSTEM = (
    "{%- set ns = namespace(system='') -%}{%- for m in messages -%}{%- if m['role'] == 'system' -%}"
    "{%- set ns.system = m['content'] + '\\n\\n' -%}{%- else -%}{{- '<|im_start|>' + m['role'] + '\\n' + ns.system + "
    "m['content'] + '<|im_end|>\\n' -}}{%- set ns.system = '' -%}{%- endif -%}{%- endfor -%}" + OPENING
)
THINKS = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'")
CLOSES_THINKING = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n\\n</think>\\n\\n'")
NO_END = "{%- for m in messages -%}{{- m['role'] + ': ' + m['content'] + '\\n' -}}{%- endfor -%}{{- 'assistant: ' -}}"
WITH_BOS = "{{- bos_token -}}" + NO_END.replace("+ '\\n'", "+ eos_token")
TWO_BOS = "{{- bos_token -}}" + WITH_BOS


def user(text: str, *before: tuple[str, str]) -> list[dict[str, str]]:
    return [*({"role": role, "content": content} for role, content in before), {"role": "user", "content": text}]


def text_rows(n: int = 6, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {i}?", "chosen": f" Good {i}.", "rejected": f" Poor {i}!"} | more for i in range(n)]


def chat_rows(n: int = 6) -> list[dict[str, Any]]:
    return [row | {"prompt": user(row["prompt"])} for row in text_rows(n)]


def with_row(rows: list[dict[str, Any]], place: int, **more: Any) -> list[dict[str, Any]]:
    return [row | more if i == place else row for i, row in enumerate(rows)]


Check = Callable[..., CheckResult]


@pytest.fixture
def check(tmp_path: Path, tokenizer: Any) -> Check:
    """``check(rows, template, **options)`` with the shipped tokenizer."""

    def run(rows: list[dict[str, Any]], template: str | None = CHATML, *, model: Any = None, **options: Any) -> Any:
        own = model or AutoTokenizer.from_pretrained(resolve("tiny").path)
        if template is not None:
            own.chat_template = template
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return check_with(str(path), resolve("tiny"), own, CheckOptions(**options))

    return run


def rows_of(result: CheckResult) -> dict[str, tuple[int, ...]]:
    return {finding.kind: finding.rows for finding in result.findings}


SYSTEM = ("system", "Be kind.")
LONG = " word" * 40
SHORT_LIMIT = {"limits": Limits(max_prompt_tokens=512, max_response_tokens=12)}
PRERENDERED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
ASSISTANT = ("assistant", "It is an answer.")
STORY = "Tell me in your words what the old man said to the two young men who came to his house on the hill that day"


def annotated(n: int, odd: Callable[[int, str], bool]) -> list[dict[str, Any]]:
    """Rows that a, b and c judge; where ``odd`` says so they prefer the second response."""
    return [
        {
            "prompt": f"Question {i}?",
            "responses": [f" Good {i}.", f" Poor {i}!"],
            "comparisons": [
                {"winner": int(odd(i, name)), "loser": 1 - int(odd(i, name)), "annotator": name} for name in "abc"
            ],
        }
        for i in range(n)
    ]


# kind, template, rows, options, places that are expected
TRIPS: list[tuple[str, str, list[dict[str, Any]], dict[str, Any], tuple[int, ...]]] = [
    ("unreadable", CHATML, with_row(text_rows(), 1, chosen=3), {}, (2,)),
    ("template_raises", REFUSES_SYSTEM, with_row(chat_rows(), 2, prompt=user("Q?", SYSTEM)), {}, (3,)),
    ("template_raises", CHATML.replace("m['role']", "m['role'] + 1"), chat_rows(2), {}, (1, 2)),
    ("think_block_open", THINKS, chat_rows(2), {}, (1, 2)),
    ("eos_missing", NO_END, chat_rows(2), {}, (1, 2)),
    (
        "eos_missing",
        CHATML,
        with_row(text_rows(4, chosen=" Yes<|im_end|>", rejected=" No<|im_end|>"), 1, chosen=" And then"),
        {},
        (2,),
    ),
    ("eos_twice", CHATML, with_row(chat_rows(), 1, chosen="Good.<|im_end|>\n"), {}, (2,)),
    ("boundary", CHATML, with_row(text_rows(), 3, prompt="Question: ", chosen="Good"), {}, (4,)),
    ("boundary", CHATML, with_row(text_rows(), 3, prompt="I like the fil", chosen="m very much"), {}, (4,)),
    ("prerendered", CHATML, with_row(text_rows(), 0, prompt=PRERENDERED, chosen="Yes", rejected="No"), {}, (1,)),
    ("prerendered", CHATML, with_row(chat_rows(), 0, prompt=user("[INST] Hi [/INST]")), {}, (1,)),
    ("prerendered", CHATML, with_row(text_rows(), 0, rejected=" No</s>"), {}, (1,)),
    ("prerendered", CHATML, with_row(text_rows(), 0, rejected=" No<|im_end|>\n<|im_start|>user\nHm"), {}, (1,)),
    ("ends_with_assistant", CHATML, with_row(chat_rows(), 4, prompt=[*user("Hi"), dict(role="assistant", content="x")]), {}, (5,)),
    ("ends_with_assistant", CHATML, with_row(chat_rows(), 4, prompt=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x"}]), {}, (5,)),
    ("ends_with_assistant", CHATML, with_row(text_rows(), 1, prompt="Human: Hi\n\nAssistant: Hello there"), {}, (2,)),
    ("system_dropped", DROPS_SYSTEM, with_row(chat_rows(), 2, prompt=user("Q?", SYSTEM)), {}, (3,)),
    ("system_dropped", DROPS_SYSTEM, with_row(chat_rows(), 2, prompt=user("Be kind. Please.", SYSTEM)), {}, (3,)),
    ("unseen_parts", CHATML, with_row(text_rows(), 1, images=["a.png"]), {}, (2,)),
    ("unseen_parts", CHATML, with_row(text_rows(), 1, system="Be kind."), {"source": SourceOptions(conversational=False)}, (2,)),
    ("unseen_parts", CHATML, with_row(chat_rows(), 1, tools=[{"type": "function"}]), {}, (2,)),
    ("unseen_parts", CHATML, with_row(chat_rows(), 1, prompt=[{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Hi"}]}]), {}, (2,)),
    ("unseen_parts", CHATML, with_row(chat_rows(), 1, prompt=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "Hi"}]}]), {}, (2,)),
    ("unseen_parts", CHATML, with_row(chat_rows(), 1, prompt=[dict(role="user", content="Hi"), dict(role="assistant", content="", tool_calls=[{"function": {"name": "f"}}]), dict(role="tool", content="1")]), {}, (2,)),
    ("unseen_parts", DROPS_SYSTEM, with_row(chat_rows(), 1, prompt=[*user("Hi"), dict(role="tool", content="42 degrees")]), {}, (2,)),
    ("text_and_messages", CHATML, with_row(text_rows(), 2, prompt=user("Hi")), {}, (3,)),
    ("text_and_messages", CHATML, with_row(chat_rows(), 2, prompt="Hi?"), {}, (3,)),
    ("text_and_messages", CHATML, with_row(chat_rows(), 5, chosen=[dict(role="assistant", content="x")]), {}, (6,)),
    ("cut", CHATML, with_row(text_rows(), 2, chosen=LONG), SHORT_LIMIT, (3,)),
    ("cut_unevenly", CHATML, text_rows(6, chosen=LONG), SHORT_LIMIT, (1, 2, 3, 4, 5, 6)),
    ("cut_unevenly", CHATML, text_rows(6, rejected=LONG), SHORT_LIMIT, (1, 2, 3, 4, 5, 6)),
    ("identical_when_cut", CHATML, with_row(text_rows(), 1, chosen=LONG + " yes", rejected=LONG + " no"), SHORT_LIMIT, (2,)),
    ("identical_when_cut", CHATML, with_row(text_rows(), 1, chosen=" Same.", rejected=" Same."), {}, (2,)),
    ("length_bias", CHATML, text_rows(8, chosen=" A long and good answer."), {}, tuple(range(1, 9))),
    ("length_bias", CHATML, text_rows(8, rejected=" A long and poor answer."), {}, tuple(range(1, 9))),
    ("duplicates", CHATML, [*text_rows(), text_rows()[1]], {}, (7,)),
    ("duplicates", CHATML, [*text_rows(), text_rows()[1] | {"prompt": "Question  1? "}], {}, (7,)),
    ("contradictions", CHATML, [*text_rows(), text_rows()[1] | {"chosen": " Poor 1!", "rejected": " Good 1."}], {}, (2, 7)),
    ("ties", CHATML, [{"prompt": f"Q{i}?", "response_a": " Aa", "response_b": " Bb", "label": 0 if i == 2 else 1 + i % 2} for i in range(6)], {}, (3,)),
    ("leak", CHATML, with_row(text_rows(), 3, prompt="question 0"), {}, (1, 4)),
    ("leak", CHATML, with_row(with_row(text_rows(), 0, prompt=STORY + "."), 3, prompt=STORY + " please."), {}, (1, 4)),
    ("annotator", CHATML, annotated(12, lambda i, name: name == "c"), {}, tuple(range(1, 11))),
    ("encoding", CHATML, with_row(text_rows(), 1, chosen=" caf\u00c3\u00a9"), {}, (2,)),
    ("encoding", CHATML, with_row(text_rows(), 1, chosen=" don\u00e2\u20ac\u2122t"), {}, (2,)),
    ("encoding", CHATML, with_row(text_rows(), 1, prompt="Is it\x00 good?"), {}, (2,)),
    ("encoding", CHATML, with_row(text_rows(), 1, rejected=" bell\x07"), {}, (2,)),
    ("encoding", CHATML, with_row(text_rows(), 1, rejected=" lost\ufffd"), {}, (2,)),
    ("encoding", CHATML, with_row(text_rows(), 1, rejected=" half\ud83d"), {}, (2,)),
    ("encoding", CHATML, with_row(text_rows(), 1, rejected=" zero\u200bwidth"), {}, (2,)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "template", "rows", "options", "expected"), TRIPS, ids=[f"{i}-{trip[0]}" for i, trip in enumerate(TRIPS)]
)
def test_each_kind_is_found_in_its_rows(
    check: Check,
    kind: str,
    template: str,
    rows: list[dict[str, Any]],
    options: dict[str, Any],
    expected: tuple[int, ...],
) -> None:
    [finding] = [f for f in check(rows, template, **options).findings if f.kind == kind]
    assert finding.rows == expected
    assert finding.n_rows >= len(expected) and finding.example and finding.fix == KINDS[kind].fix


# kind, template, rows that must not trip it, options
SOUND: list[tuple[str, str, list[dict[str, Any]], dict[str, Any]]] = [
    ("unreadable", CHATML, with_row(text_rows(), 1, chosen=" "), {}),  # left out of a run
    ("template_raises", REFUSES_SYSTEM, chat_rows(), {}),
    ("think_block_open", CLOSES_THINKING, chat_rows(), {}),
    ("think_block_open", THINKS, [r | {"chosen": "Hm.\n</think>\nGood", "rejected": "So.</think>Bad"} for r in chat_rows()], {}),
    ("think_block_open", CHATML, with_row(text_rows(), 0, prompt="What does <think> mean?"), {}),
    ("eos_missing", CHATML, chat_rows(), {}),
    ("eos_twice", CHATML, with_row(text_rows(), 0, chosen=" The token <|im_end|> closes a turn."), {}),
    ("prerendered", CHATML, with_row(text_rows(), 0, chosen=" <s>old</s>", prompt="<s>struck</s> text?"), {}),
    ("prerendered", CHATML, with_row(text_rows(), 0, prompt="Human: Hi\n\nAssistant:"), {}),
    ("ends_with_assistant", CHATML, with_row(chat_rows(), 1, prompt=user("And?", ("user", "Hi"), ASSISTANT)), {}),
    ("ends_with_assistant", CHATML, with_row(text_rows(), 1, prompt="Human: Hi\n\nAssistant:"), {}),
    ("system_dropped", MERGES_SYSTEM, with_row(chat_rows(), 2, prompt=user("Q?", SYSTEM)), {}),
    ("system_dropped", CHATML, with_row(chat_rows(), 2, prompt=user("Be kind. Please.", SYSTEM)), {}),
    ("system_dropped", DROPS_SYSTEM, with_row(chat_rows(), 2, prompt=user("Q?", ("system", " "))), {}),
    ("system_dropped", CHATML.replace("m['content']", "(m['content'] | upper)"), with_row(chat_rows(), 2, prompt=user("Q?", SYSTEM)), {}),
    ("unseen_parts", CHATML.replace("m['content']", "(m['content'] | tojson)"), with_row(chat_rows(), 1, prompt=user('Say "no".')), {}),
    ("unseen_parts", CHATML, with_row(text_rows(), 1, images=[], system="", score=3.5), {}),
    ("unseen_parts", CHATML, with_row(chat_rows(), 1, prompt=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]), {}),
    ("text_and_messages", CHATML, [r | {k: [{"role": "assistant", "content": r[k]}] for k in ("chosen", "rejected")} for r in text_rows()], {}),
    ("cut", CHATML, text_rows(), SHORT_LIMIT),
    ("cut_unevenly", CHATML, [r | {"chosen" if i % 2 else "rejected": LONG} for i, r in enumerate(text_rows(12))], SHORT_LIMIT),
    ("cut_unevenly", CHATML, with_row(text_rows(), 1, chosen=LONG), SHORT_LIMIT),
    ("identical_when_cut", CHATML, with_row(text_rows(), 1, chosen="yes" + LONG, rejected="no" + LONG), SHORT_LIMIT),
    ("length_bias", CHATML, [r | {"chosen" if i % 2 else "rejected": LONG} for i, r in enumerate(text_rows(12))], {}),
    ("length_bias", CHATML, text_rows(3, chosen=LONG), {}),
    ("duplicates", CHATML, [*text_rows(), text_rows()[1] | {"rejected": " Another."}], {}),
    ("duplicates", CHATML, [r | {"annotator": who} for who in "ab" for r in text_rows()], {}),
    ("contradictions", CHATML, [r | {"annotator": who, ("chosen" if who == "a" else "rejected"): r["chosen"], ("rejected" if who == "a" else "chosen"): r["rejected"]} for who in "ab" for r in text_rows()], {}),
    ("ties", CHATML, text_rows(), {}),
    ("leak", CHATML, text_rows(20), {}),
    ("leak", CHATML, [*text_rows(), text_rows()[1]], {}),
    ("leak", CHATML, with_row(with_row(text_rows(), 0, prompt=STORY), 3, prompt=STORY[:64] + " when they asked him for the way to the sea"), {}),
    ("leak", CHATML, [r | {"prompt": f"What is {i} {'+-'[i % 2]} 2?"} for i, r in enumerate(text_rows())] + [r | {"prompt": f"What is {i} {'-+'[i % 2]} 2?"} for i, r in enumerate(text_rows())], {}),
    ("leak", CHATML, with_row(with_row(text_rows(2, group="x"), 0, prompt=STORY + "."), 1, prompt=STORY + " please."), {}),
    ("leak", CHATML, [r | {"prompt": f"{STORY}, and to {name}"} for r, name in zip(text_rows(12), ["Ann", "Bob", "Cid", "Dan", "Eve", "Flo", "Gus", "Hal", "Ida", "Jim", "Kim", "Lou"], strict=True)], {}),
    ("annotator", CHATML, annotated(12, lambda i, name: i % 4 == "abc".index(name)), {}),
    ("annotator", CHATML, annotated(3, lambda i, name: name == "c"), {}),
    ("encoding", CHATML, with_row(text_rows(), 1, prompt="S\u00c3O, IRM\u00c3? na\u00efve \U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u0414\u0430 \u00d8\u2013 \u20ac5 \u2018x\u2019\ttab\r\n", chosen=" caf\u00e9\u2122"), {}),
    ("boundary", CHATML, with_row(chat_rows(), 1, chosen="Yes.\n\nNo.", rejected=" No."), {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "template", "rows", "options"), SOUND, ids=[f"{i}-{row[0]}" for i, row in enumerate(SOUND)]
)
def test_sound_rows_trip_nothing(
    check: Check, kind: str, template: str, rows: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    assert kind not in rows_of(check(rows, template, **options))


def test_clean_data_has_no_finding(check: Check) -> None:
    assert check(chat_rows(12)).findings == () and check(text_rows(12)).findings == ()
    assert check(text_rows(12)).as_dict() == {"n_rows": 12, "n_refused": 0, "findings": [], "notes": []}


def test_every_kind_has_a_case() -> None:
    of_the_model = {"bos_twice", "bos_missing", "off_policy"}
    assert {trip[0] for trip in TRIPS} | of_the_model == set(KINDS) == {row[0] for row in SOUND} | of_the_model


def test_bos_and_eos_of_a_tokenizer_that_adds_them(check: Check, stories_folder: Path) -> None:
    stories = AutoTokenizer.from_pretrained(stories_folder)
    rendered = {"prompt": "<s>[user] Tell a story</s>[assistant]", "chosen": " Once.</s>", "rejected": " No</s>"}
    kinds = rows_of(check(with_row(text_rows(), 1, **rendered), None, model=stories))
    assert {"bos_twice", "eos_twice", "prerendered"} <= kinds.keys() and kinds["bos_twice"] == kinds["eos_twice"] == (
        2,
    )
    assert rows_of(check(text_rows(), None, model=stories)) == {}
    # A template without BOS, with one, and with two.
    no_bos = NO_END.replace("+ '\\n'", "+ eos_token")
    for template, expected in (
        (no_bos, {"bos_missing": (1, 2)}),
        (WITH_BOS, {}),
        (TWO_BOS, {"bos_twice": (1, 2)}),
    ):
        kinds = rows_of(check(chat_rows(2), template, model=stories))
        assert kinds == expected


def test_other_held_out_data_has_a_configuration_and_a_commit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str | None]] = []

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        asked.append((path, options["name"], options["revision"]))
        return datasets.Dataset.from_list(text_rows(2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for held_out in ("c/d", "a/b"):
        options = CheckOptions(SourceOptions(config="x", revision="v1"), held_out=held_out, held_out_split="test")
        check_data("a/b", "tiny", options)
    assert asked == [("a/b", "x", "v1"), ("c/d", None, None), ("a/b", "x", "v1"), ("a/b", "x", "v1")]


def test_a_tokenizer_without_an_end(check: Check) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny").path)
    tokenizer.eos_token = None
    assert rows_of(check(text_rows(2), None, model=tokenizer))["eos_missing"] == (1, 2)


def test_held_out_prompts(check: Check, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    rows = [text_rows(9)[8], text_rows(1)[0] | {"prompt": "question 1"}]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = check([*text_rows(9), text_rows(9)[8]], held_out=str(held_out))
    assert rows_of(result)["leak"] == (2, 9, 10)
    [leak] = [f for f in result.findings if f.kind == "leak"]
    assert leak.example.startswith("line 2: the prompt is nearly that of held-out line 2: 'Question 1?'")


def test_rows_are_lines_of_the_file_and_rows_of_a_table(check: Check, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "gaps.jsonl"
    lines = [json.dumps(row) for row in with_row(text_rows(3), 1, chosen=" x\x00")]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    assert rows_of(check_with(str(path), resolve("tiny"), tokenizer, CheckOptions()))["encoding"] == (3,)
    table = tmp_path / "rows.json"
    table.write_text("[" + ",\n\n".join(lines) + "]", encoding="utf-8")
    result = check_with(str(table), resolve("tiny"), tokenizer, CheckOptions())
    assert rows_of(result)["encoding"] == (2,) and "(row 2)" in str(result)


REFUSED = [
    (CHATML, with_row(text_rows(), 1, chosen=3), 1),
    (CHATML, with_row(with_row(text_rows(), 1, chosen=3), 4, chosen={"a": 1}), 2),
    (REFUSES_SYSTEM, with_row(chat_rows(), 2, prompt=user("Q?", SYSTEM)), 1),
    (CHATML, with_row(chat_rows(), 4, prompt=[*user("Hi"), dict(role="assistant", content="x")]), 1),
    (
        CHATML,
        [{k: [*user("Hi"), *(dict(role="assistant", content=c) for c in ("a", k))] for k in ("chosen", "rejected")}],
        1,
    ),
    (CHATML, [*text_rows(), chat_rows()[0]], 1),
    (CHATML, with_row(text_rows(), 1, chosen=" "), 0),
    (CHATML, with_row(text_rows(), 1, prompt="Human: Hi\n\nAssistant: Hello there"), 0),
    (CHATML, [*text_rows(), *text_rows()], 0),
]


@pytest.mark.parametrize(("template", "rows", "n_refused"), REFUSED)
def test_rows_for_which_a_run_refuses_the_data_are_counted(
    check: Check, tmp_path: Path, template: str, rows: list[dict[str, Any]], n_refused: int
) -> None:
    assert check(rows, template).n_refused == n_refused
    if template != CHATML:  # the template of the model, which a run meets behind its reading
        return
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError) if n_refused else nullcontext():
        read_preferences(str(path))


def test_the_exit_code_says_whether_a_run_takes_the_data(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for number, code in ((3, 2), (" fine", 0)):
        rows = with_row(text_rows(), 1, chosen=number)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        done = duel("check", str(path), "--model", "tiny", "--json", check=code)
        assert json.loads(done.stdout)["n_refused"] == (code == 2)
        assert ("duel run refuses this data for 1 row" in done.stderr) == (code == 2)


def test_rows_that_cannot_be_read_are_named_and_the_others_checked(check: Check) -> None:
    rows = with_row(with_row(text_rows(), 1, chosen=3), 2, rejected=" ")
    result = check([*rows, rows[0]])
    assert rows_of(result) == {"unreadable": (2,), "duplicates": (7,)} and result.n_rows == 7
    assert "line 2: 'chosen' is a number" in result.findings[0].example and "(line 3)" in result.notes[0]
    with pytest.raises(DataError, match="no row can be read") as caught:
        check([row | {"chosen": 3} for row in text_rows()])
    assert "line 1" in caught.value.where
    with pytest.raises(DataError, match="no row has a prompt"):
        check([row | {"chosen": " "} for row in text_rows()])
    with pytest.raises(ModelError, match="no chat template"):
        tokenizer = AutoTokenizer.from_pretrained(resolve("tiny").path)
        tokenizer.chat_template = None
        check(chat_rows(), None, model=tokenizer)


def test_columns_limit_and_reading_as_messages(check: Check) -> None:
    renamed = [
        {"q": r["prompt"], "a": r["chosen"], "b": r["rejected"]} for r in with_row(text_rows(), 5, chosen="\x00")
    ]
    source = SourceOptions(columns={"prompt": "q", "chosen": "a", "rejected": "b"})
    assert rows_of(check(renamed, source=source))["encoding"] == (6,)
    limited = check(renamed, source=source, limit=3)
    assert limited.n_rows == 3 and limited.findings == ()
    mixed = with_row(text_rows(), 2, prompt=user("Hi"))
    assert "text_and_messages" not in rows_of(check(mixed, source=SourceOptions(conversational=True)))


def test_off_policy_needs_the_model(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = text_rows(4, chosen=" zqxj kvwp qqq", rejected=" xxyz zzkq")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert "off_policy" not in rows_of(check_data(str(path), "tiny", CheckOptions()))
    result = check_data(str(path), "tiny", CheckOptions(likelihood=3, seed=1))
    [finding] = [f for f in result.findings if f.kind == "off_policy"]
    assert finding.n_rows == 3 and "nats per token" in finding.example and "in 3 rows" in finding.example


def test_rows_of_one_prompt_are_one_for_off_policy(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [row | {"prompt": "Question?"} for row in text_rows(4, chosen=" zqxj kvwp qqq", rejected=" xxyz zzkq")]
    rows = [row | {"chosen": row["chosen"] + f" q{k}" * k} for k, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    [finding] = [
        f for f in check_data(str(path), "tiny", CheckOptions(likelihood=4)).findings if f.kind == "off_policy"
    ]
    assert "in 4 rows" in finding.example and "interval" not in finding.example


def test_an_annotator_who_is_not_there_is_an_error(check: Check, tmp_path: Path) -> None:
    rows = annotated(12, lambda i, name: name == "c")
    assert "annotator" not in rows_of(check(rows, source=SourceOptions(annotators=["a", "b"])))
    with pytest.raises(DataError, match="no comparison by annotator 'bb'"):
        check(rows, source=SourceOptions(annotators=["a", "bb"]))
    with pytest.raises(DataError, match="in the first 3 rows"):
        check(rows, source=SourceOptions(annotators=["d"]), limit=3)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in text_rows(3)))
    options = {"source": SourceOptions(annotators=["a"]), "held_out": str(held_out)}
    assert rows_of(check(rows, **options))["leak"] == (1, 2, 3)  # whoever compared the held-out ones


def test_pairs_of_one_prompt_are_one_for_annotators(check: Check) -> None:
    rows = [row | {"prompt": "Question?"} for row in annotated(12, lambda i, name: name == "c")]
    assert "annotator" not in rows_of(check(rows))


def test_findings_do_not_depend_on_how_many_rows_are_looked_at_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = text_rows(12)
    rows[5] = rows[2] | {"chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    rows += [rows[1], rows[3] | {"prompt": "question 3"}, text_rows(1, prompt="The fi", chosen="lm was good.")[0]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    together = check_data(str(path), "tiny", CheckOptions())
    assert {"duplicates", "contradictions", "leak", "boundary"} <= {finding.kind for finding in together.findings}
    monkeypatch.setattr("toolkit.measure.check.stored.ROWS_AT_ONCE", 2)
    monkeypatch.setattr("toolkit.evals.near_duplicates.CELLS", 1)
    assert check_data(str(path), "tiny", CheckOptions()) == together


@pytest.mark.parametrize("kind", ["pairs", "one response"])
def test_texts_and_details_do_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, kind: str
) -> None:
    """A row of 4,000 characters takes less than 400 bytes, and each of them is a finding with other words."""
    monkeypatch.setattr("toolkit.preferences.loading.HELD_BYTES", 0)
    monkeypatch.setattr("toolkit.storage.spilled.BUFFER", 1 << 12)
    monkeypatch.setattr("toolkit.measure.check.stored.CHARACTERS_AT_ONCE", 1 << 15)
    monkeypatch.setattr("toolkit.evals.near_duplicates.CHARACTERS", 1 << 10)
    peaks, counts = [], (300, 900)
    for n in counts:
        path = tmp_path / f"{n}.jsonl"
        texts = [f"{i:06d}\u200b good".ljust(2_000, "x") for i in range(2 * n)]
        pairs = [{"prompt": f"{i} is which?", "responses": texts[2 * i : 2 * i + 2]} for i in range(n)]
        if kind == "one response":
            rows = [
                {"prompt": row["prompt"], "response": text, "score": len(text)}
                for row in pairs
                for text in row["responses"]
            ]
        else:
            judged = [{"winner": k, "loser": 1 - k, "annotator": name} for k, name in enumerate("ab")]
            rows = [row | {"comparisons": judged} for row in pairs]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        del texts, pairs, rows
        tracemalloc.start()
        result = check_with(str(path), resolve("tiny"), tokenizer, CheckOptions(limits=Limits(512, 10_000)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert {f.kind: f.n_rows for f in result.findings}["encoding"] == n
    assert (peaks[1] - peaks[0]) / (counts[1] - counts[0]) < 400
