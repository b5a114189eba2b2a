"""The data stage: what it prints of odd data, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from toolkit.errors import DataError
from toolkit.models.encoding import TextEncoder, text_encoder
from toolkit.models.resolve import resolve
from toolkit.preferences import splits
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, prompt_id
from toolkit.progress import Reporter
from toolkit.recipe.schema import DataSection
from toolkit.stages import data
from toolkit.stages.contexts import DataContext, StepSource, TokenizerSettings

LONG = " the cat sat on the mat and went home" * 4


def row(prompt: Prompt, chosen: str, rejected: str) -> PreferenceRow:
    return PreferenceRow(prompt_id(prompt), prompt, [chosen, rejected], [Comparison(0, 1)])


def test_pairs_that_are_equal_once_cut_are_counted_and_refused_where_all_are(tokenizer: Any) -> None:
    section = DataSection(max_response_tokens=8)
    equal = [row(f"Question {i}?", f"{LONG} good", f"{LONG} bad") for i in range(3)]
    encoder = text_encoder(tokenizer, "")
    _, counts = data.limited("train", [*equal, row("And?", " Good.", " Bad.")], encoder, section, 0)
    assert counts["n_identical_pairs"] == 3
    notes = data.limit_notes("train", counts, section)
    assert "3 of 4 pairs have two responses with the same tokens once cut: training learns nothing from them" in notes
    with pytest.raises(DataError, match="every pair") as caught:
        data.limited("train", equal, encoder, section, 0)
    assert "max_response_tokens" in caught.value.fix
    data.limited("eval", equal, encoder, section, 0)  # nobody learns from these


def test_weights_that_tell_no_comparisons_apart_are_noticed(tokenizer: Any) -> None:
    """Every prompt counts once: a weight tells its own comparisons apart. A soft label is one judgement of weight 1."""

    def noted(*weights: list[float]) -> list[str]:
        rows = [
            replace(
                row(f"Question {k}?", " Good.", " Bad."),
                comparisons=[Comparison(i, 1 - i, w) for i, w in enumerate(of)],
            )
            for k, of in enumerate(weights)
        ]
        _, counts = data.limited("train", rows, text_encoder(tokenizer, ""), DataSection(), 0)
        assert data.limit_notes("eval", counts, DataSection()) == []
        return data.limit_notes("train", counts, DataSection())

    [note] = noted([1.0], [0.01], [0.7, 0.3], [2.0, 0.5])
    assert note.startswith("3 prompts have a single comparison each, of unequal weights: these have no effect")
    assert noted([1.0], [0.7, 0.3], [2.0, 0.5]) == [] == noted([0.5], [0.5])


def test_an_open_block_of_thoughts_is_noticed() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny").path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    )
    rows = [row([{"role": "user", "content": f"Question {i}?"}], "Good.", "Bad.") for i in range(2)]
    thoughtful = row([{"role": "user", "content": "And?"}], "Hm.</think>Good.", "So.</think>Bad.")
    encoder = text_encoder(tokenizer, rows[0].prompt)
    _, counts = data.limited("train", [*rows, thoughtful], encoder, DataSection(), 0)
    assert counts["n_open_thoughts"] == 2
    assert data.limit_notes("train", counts, DataSection())[0].startswith("2 prompts end inside a block of thoughts")


def test_a_refused_conversation_counts_where_the_limit_reaches_it() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny").path)
    rows = [row([{"role": "user", "content": f"Question {i}?"}], "Good.", "Bad.") for i in range(40)]
    order = splits.limit_order(rows, 10, 0)
    refused = order[10]
    rows[refused] = replace(rows[refused], prompt=[{"role": "system", "content": "No."}], source_row=7)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    encoder = text_encoder(tokenizer, rows[0].prompt)
    within, counts = data.limited("train", rows, encoder, DataSection(source="a.jsonl", train_prompts=10), 0)
    assert [within[k].prompt_id for k in range(10)] == [rows[k].prompt_id for k in sorted(order[:10])]
    assert counts["n_prompts"] == 10 and counts["n_long_prompts"] == 0
    with pytest.raises(DataError, match="no system") as caught:
        data.limited("train", rows, encoder, DataSection(source="a.jsonl", train_prompts=11), 0)
    assert caught.value.where == "a.jsonl, line 7"


def test_no_conversation_behind_the_last_one_that_is_asked_for_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are rendered some at once, and the next ones of a large file only where these do not suffice."""
    monkeypatch.setattr(data, "CHUNK", 10)
    rendered: list[int] = []

    class Counting(TextEncoder):
        def written(self, prompts: Sequence[Prompt]) -> list[str]:
            rendered.append(len(prompts))
            return super().written(prompts)

    rows = [row([{"role": "user", "content": f"Question {i}?"}], "Good.", "Bad.") for i in range(40)]
    encoder = Counting(AutoTokenizer.from_pretrained(resolve("tiny").path), conversational=True)
    _, counts = data.limited("train", rows, encoder, DataSection(train_prompts=10), 0)
    assert (counts["n_prompts"], rendered) == (10, [10])


class Lines(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)


def test_the_readers_warnings_are_printed(tmp_path: Path) -> None:
    source = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Q{i}?", "chosen": f"Q{i}? yes", "rejected": f"Q{i}? no"} for i in range(12)]
    rows += [{"prompt": "Same?", "chosen": "y", "rejected": "y"}]
    source.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    section = DataSection(source=str(source), eval_fraction=0.5)
    warnings = read_preferences(str(source)).report.warnings()
    assert any("left out: both responses are the same text" in text for text in warnings)
    assert any("with the prompt at the start" in text for text in warnings)
    reporter = Lines()
    out = tmp_path / "out"
    out.mkdir()
    model, reward_model = TokenizerSettings("tiny", None, None, False), StepSource("preference", None)
    data.run(DataContext(data=section, data_seed=0, model=model, reward_model=reward_model), {}, out, reporter)
    assert {f"{source}: {text}" for text in warnings} <= set(reporter.lines)


def pairs(first: int, n: int) -> datasets.Dataset:
    rows = [{"prompt": f"Question {k}?", "chosen": " Yes.", "rejected": " No."} for k in range(first, first + n)]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("names", [{}, {"eval_source": "again"}])
def test_the_held_out_split_of_a_saved_data_set_is_taken(tmp_path: Path, names: dict[str, str]) -> None:
    """And not a share of the other split. A prompt of both leaves the training side."""
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": pairs(0, 12), "test": pairs(10, 5)}).save_to_disk(str(saved))
    section = DataSection(source=str(saved), eval_split="test", **dict.fromkeys(names, str(saved)))
    sides, report = data.read_sides(section, 0)
    questions = {name: [row.prompt for row in rows] for name, rows in sides.items()}
    assert questions["eval"] == [f"Question {k}?" for k in range(10, 15)]
    assert questions["train"] == [f"Question {k}?" for k in range(10)] and report["n_overlap"] == 2
    with pytest.raises(DataError, match="no split 'validation'"):
        data.read_sides(section.model_copy(update={"eval_split": "validation"}), 0)


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def asked(*questions: str, chat: bool = False) -> list[dict[str, Any]]:
    prompts: list[Prompt] = [[{"role": "user", "content": q}] if chat else q for q in questions]
    return [{"prompt": prompt, "chosen": "Yes.", "rejected": "No."} for prompt in prompts]


def test_text_and_messages_on_two_sides_are_refused(tmp_path: Path) -> None:
    """A prompt of both would stay on both: its text is not found among messages."""
    shared = [f"Question {k}" for k in range(4)]
    source = lines(tmp_path / "train.jsonl", asked(*shared, "Another"))
    section = DataSection(source=source, eval_source=lines(tmp_path / "eval.jsonl", asked(*shared, chat=True)))
    with pytest.raises(DataError, match="are plain text, and the held-out ones chat messages") as caught:
        data.read_sides(section, 0)
    assert "train.jsonl" in caught.value.where and "data.conversational: true" in caught.value.fix
    sides, report = data.read_sides(section.model_copy(update={"conversational": True}), 0)
    assert [row.prompt for row in sides["train"]] == [[{"role": "user", "content": "Another"}]]
    assert report["n_overlap"] == 4


def test_one_transcript_that_is_no_conversation_does_not_hide_the_others(tmp_path: Path) -> None:
    def talks(*beginnings: str) -> list[dict[str, Any]]:
        return [{"chosen": f"{b}\n\nAssistant: Yes.", "rejected": f"{b}\n\nAssistant: No."} for b in beginnings]

    shared = [f"\n\nHuman: Question {k}" for k in range(4)]
    source = lines(tmp_path / "train.jsonl", talks(*shared, "\n\nHuman: Another"))
    odd = lines(tmp_path / "eval.jsonl", talks(*shared, "\n\nAssistant: Hello.\n\nHuman: Hi"))
    section = DataSection(source=source, eval_source=odd)
    with pytest.raises(DataError, match="are chat messages, and the held-out ones plain text"):
        data.read_sides(section, 0)
    for conversational in (True, False):
        sides, report = data.read_sides(section.model_copy(update={"conversational": conversational}), 0)
        assert len(sides["train"]) == 1 and report["n_overlap"] == 4


def test_configuration_and_commit_belong_to_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, Any, Any, Any]] = []

    def reading(source: str, **options: Any) -> Any:
        read.append((source, options["config"], options["revision"], options["annotators"]))
        return read_preferences("reviews")

    monkeypatch.setattr(data, "read_preferences", reading)
    section = DataSection(source="a/b", config="c", revision="v1", annotators=["x"], eval_source="d/e")
    for eval_source, own in (("d/e", (None, None)), ("a/b", ("c", "v1"))):
        with pytest.raises(DataError, match="among the held-out ones"):
            data.read_sides(section.model_copy(update={"eval_source": eval_source, "eval_split": "test"}), 0)
        assert read[-2:] == [("a/b", "c", "v1", ["x"]), (eval_source, *own, ["x"])]


def test_training_data_without_comparisons_is_refused_before_anything_trains(tmp_path: Path) -> None:
    """But for a reward model of steps, beside which DPO may compare its own samples."""
    rows = [
        {"prompt": f"Question {k}", "responses": [" Yes.", " No."], "comparisons": [[0, 1]] if k == 0 else []}
        for k in range(40)
    ]
    for row in rows[:1]:
        row["comparisons"] = [{"winner": 0, "loser": 1, "annotator": "ann"}]
    held_out = rows[:2]
    names = {"source": lines(tmp_path / "a.jsonl", rows), "eval_source": lines(tmp_path / "b.jsonl", held_out)}
    section = DataSection(**names, annotators=["ann"])
    model, out = TokenizerSettings("tiny", None, None, False), tmp_path / "out"
    out.mkdir()
    context = DataContext(data=section, data_seed=0, model=model, reward_model=StepSource("preference", None))
    with pytest.raises(DataError, match="no training prompt has a comparison by ann") as caught:
        data.run(context, {}, out, Reporter(quiet=True))
    assert caught.value.where == names["source"]
    data.check_compared("train", {"n_comparisons": 0}, section, "process")
    data.check_compared("eval", {"n_comparisons": 0}, section, "preference")


def test_steps_of_held_out_groups_do_not_train(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**r, "group": f"talk {k // 5}"} for k, r in enumerate(asked(*(f"Question {k}" for k in range(100))))]
    steps = [
        {"prompt": f"Question {k}{more}", "completions": ["a"], "labels": [True], "group": f"talk {k // 5}"}
        for k in range(100)
        for more in ("", " again")
    ]
    section = DataSection(source=lines(tmp_path / "a.jsonl", rows), eval_fraction=0.3)
    sides, _ = data.read_sides(section, 0)
    source = lines(tmp_path / "steps.jsonl", steps)
    within, report, _ = data.step_sides(source, section, 0, sides, text_encoder(tokenizer, ""))
    for name in data.SIDES:
        assert {s.group for s in within[name]} == {r.group for r in sides[name]}
    assert sum(report[name]["n_prompts"] for name in data.SIDES) == 200  # none is left out
