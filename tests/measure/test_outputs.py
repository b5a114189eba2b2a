"""``duel judge`` of outputs that are there: AlpacaEval's file, rows of prompt and response, and samples."""

from __future__ import annotations

import csv
import json
import os
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.running import duel

from toolkit.errors import DataError
from toolkit.files import write_table
from toolkit.judging.records import read_judgements
from toolkit.judging.scorers import compare
from toolkit.measure.outputs import outputs_to_judge, read_outputs
from toolkit.preferences.rows import Comparison, PreferenceRow, prompt_id, readable
from toolkit.preferences.samples import Sample, write_samples
from toolkit.preferences.tables import to_parquet

PROMPTS = ["Name a bird.", "Say hello.", "Count to three.", "Why?"]
JUDGE = "def longer(prompts, completions, **_):\n    return list(map(len, completions))\n"


@pytest.fixture(autouse=True)
def longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "outputs_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "python:outputs_judge:longer"


def alpaca(path: Path, name: str, texts: list[str], prompts: list[str] = PROMPTS) -> Path:
    rows = [
        {"dataset": "helpful_base", "instruction": p, "output": t, "generator": name}
        for p, t in zip(prompts, texts, strict=True)
    ]
    path.write_text(json.dumps(rows))
    return path


def plain(path: Path, texts: list[str], prompts: list[Any] | None = None) -> Path:
    rows = [{"prompt": p, "response": t} for p, t in zip(prompts or PROMPTS, texts, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples(path: Path, policies: dict[str, list[str]]) -> Path:
    rows = [
        Sample(prompt_id(p), name, sample_index=0, prompt=p, response=t)
        for name, texts in policies.items()
        for p, t in zip(PROMPTS, texts, strict=True)
    ]
    write_samples(rows, path, ["prompt_id", "policy", "sample_index", "prompt", "response"])
    return path


LONG, MIDDLE, SHORT = (["x" * n] * 4 for n in (9, 6, 3))


def test_two_files_of_two_kinds(tmp_path: Path, longer: str) -> None:
    first = alpaca(tmp_path / "a.json", "big-model", ["a long answer", "hi", "1, 2, 3", "so"])
    chat = [[{"role": "user", "content": p}] for p in PROMPTS]  # the same prompts as messages
    second = plain(tmp_path / "mine.jsonl", ["owl", "hello", "3", "no"], chat)
    out = tmp_path / "j.parquet"
    done = json.loads(duel("judge", str(first), str(second), f"--judge={longer}", f"--out={out}", "--json").stdout)
    [row] = done["win_rates"]
    assert (row["policy"], row["baseline"], row["win_rate"]) == ("big-model", "mine", (1 + 0 + 1 + 0.5) / 4)
    assert [j.preference for j in read_judgements([out])] == [1.0, 0.0, 1.0, 0.5]
    again = json.loads(duel("winrate", str(out), "--json").stdout)
    assert again["win_rates"][0]["ci_low"] == row["ci_low"]


def test_prompts_of_messages_in_a_csv_file_and_in_texts_of_json_lines(tmp_path: Path, longer: str) -> None:
    chat = [json.dumps([{"role": "system", "content": "Be kind."}, {"role": "user", "content": p}]) for p in PROMPTS]
    first = tmp_path / "a.csv"
    with first.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "response"), *zip(chat, LONG, strict=True)])
    second = plain(tmp_path / "b.jsonl", SHORT, chat)
    out = tmp_path / "j.parquet"
    duel("judge", str(first), str(second), f"--judge={longer}", f"--out={out}")
    assert [j.preference for j in read_judgements([out])] == [1.0] * 4
    # recorded judgements name the prompt by the same text
    row = {"policy": "a", "baseline": "b", "judge": "j", "preference": 1.0, "winner": "model_a"}
    ids = []
    for prompt in (chat[0], json.loads(chat[0])):
        path = tmp_path / "votes.jsonl"
        path.write_text(json.dumps({"prompt": prompt, "model_a": "a", "model_b": "b", **row}) + "\n")
        ids += [j.prompt_id for j in read_judgements([path])]
    assert ids[0] == ids[1]


def test_three_systems_each_with_each_or_all_with_one(tmp_path: Path, longer: str) -> None:
    files = [plain(tmp_path / f"{name}.jsonl", texts) for name, texts in (("l", LONG), ("m", MIDDLE), ("s", SHORT))]
    table = samples(tmp_path / "samples.parquet", {"l": LONG, "m": MIDDLE, "s": SHORT})
    for sources in (files, [table]):
        arguments = ["judge", *map(str, sources), f"--judge={longer}", f"--out={tmp_path / 'j.parquet'}", "--json"]
        done = json.loads(duel(*arguments, "--force").stdout)
        assert [(r["policy"], r["baseline"], r["win_rate"]) for r in done["win_rates"]] == [
            ("l", "m", 1.0), ("l", "s", 1.0), ("m", "s", 1.0),
        ]  # fmt: skip
        assert len(done["bradley_terry"]) == 1
        done = json.loads(duel(*arguments, "--baseline=m", "--force").stdout)
        assert [(r["policy"], r["baseline"], r["win_rate"]) for r in done["win_rates"]] == [
            ("l", "m", 1.0), ("s", "m", 0.0),
        ]  # fmt: skip
        done = json.loads(duel(*arguments, "--policy=s", "--force").stdout)
        assert [(r["policy"], r["baseline"]) for r in done["win_rates"]] == [("s", "l"), ("s", "m")]


def test_prompts_that_one_system_left_out(tmp_path: Path) -> None:
    first = plain(tmp_path / "a.jsonl", LONG)
    second = plain(tmp_path / "b.jsonl", SHORT[:2], PROMPTS[1:3])
    asked = outputs_to_judge([first, second], policy=None, baseline=None, limit=None)
    assert list(asked.responses.prompts) == PROMPTS[1:3] and asked.pairs == [("a", "b")]
    assert asked.notes == ["2 of 4 prompts have a response of every system"]
    limited = outputs_to_judge([first, second], policy=None, baseline=None, limit=1).responses
    assert list(limited.prompts) == PROMPTS[1:2] and list(limited.texts["b"]) == [SHORT[:1]]


def test_several_samples_and_an_input_after_the_instruction(tmp_path: Path) -> None:
    rows = [{"instruction": "Sum", "input": "1 2", "output": text, "generator": "m"} for text in ("3", "three")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    outputs = read_outputs([tmp_path / "a.json"])["m"]
    [only] = outputs.prompts.tolist()
    assert outputs.prompt(only) == "Sum\n\n1 2" and outputs.responses(only) == ["3", "three"]
    assert outputs.source(only, "three") == (str(tmp_path / "a.json"), 2)
    assert outputs.source(only, "four") is None


def test_recorded_samples_are_judged_as_they_were_sampled(tmp_path: Path) -> None:
    rows = [
        Sample(prompt_id(p), name, sample_index=0, prompt=p, response="abc", response_ids=[5, k], truncated=name == "a")
        for name in ("a", "b")
        for k, p in enumerate(PROMPTS)
    ]
    columns = ["prompt_id", "policy", "sample_index", "prompt", "response", "response_ids", "truncated"]
    write_samples(rows, tmp_path / "samples.parquet", columns)
    responses = outputs_to_judge([tmp_path], policy=None, baseline=None, limit=2).responses
    assert responses.truncated is not None and responses.ids is not None
    assert [list(responses.truncated[name]) for name in "ab"] == [[[True], [True]], [[False], [False]]]
    assert [list(ids) for [ids] in responses.ids["a"]] == [[5, 0], [5, 1]]
    texts = plain(tmp_path / "texts.jsonl", SHORT)
    with_texts = outputs_to_judge([tmp_path, texts], policy="a", baseline="texts", limit=None).responses
    assert with_texts.ids is None and with_texts.truncated is None


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda f: [plain(f / "a.jsonl", LONG)], "there is one system, 'a'"),
        (lambda f: [plain(f / "a.jsonl", LONG), plain(f / "b.jsonl", LONG, ["other"] * 4)], "no prompt has a response"),
        (
            lambda f: [alpaca(f / "a.json", "m", LONG), alpaca(f / "b.json", "m", SHORT)],
            "two files hold outputs",
        ),
        (lambda f: [plain(f / "a.jsonl", LONG), f / "absent.json"], "no such file"),
        (lambda f: [plain(f / "a.jsonl", LONG), f / "c.json"], "no column holds the response"),
        (lambda f: [plain(f / "a.jsonl", [None, *LONG[1:]])], "'response' is null"),  # type: ignore[list-item]
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, build: Any, words: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps([{"prompt": "p", "text": "t"}]))
    with pytest.raises(DataError, match=words):
        outputs_to_judge(build(tmp_path), policy=None, baseline=None, limit=None)


def test_unknown_names_and_people_of_three_systems(tmp_path: Path) -> None:
    table = samples(tmp_path / "samples.parquet", {"l": LONG, "m": MIDDLE, "s": SHORT})
    with pytest.raises(DataError, match="there is no system 'x'"):
        outputs_to_judge([table], policy="x", baseline=None, limit=None)
    refused = duel("judge", str(table), "--human", f"--out={tmp_path / 'v.parquet'}", check=2)
    assert "people vote on one pair" in refused.stderr


def test_texts_of_outputs_do_not_wait_in_memory(tmp_path: Path) -> None:
    n = 600
    prompts = [f"prompt {k} " * 800 for k in range(n)]
    files = [plain(tmp_path / f"{name}.jsonl", [f"{name} {k} " * 1600 for k in range(n)], prompts) for name in "ab"]
    outputs_to_judge(files, policy=None, baseline=None, limit=1)  # what is loaded once
    tracemalloc.start()
    try:
        asked = outputs_to_judge(files, policy=None, baseline=None, limit=None)
        scores = {name: [[0.0]] * n for name in "ab"}
        assert len(compare("length", *asked.pairs[0], asked.responses, scores)) == n
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 0.3 * sum(file.stat().st_size for file in files)  # the buffers of files are in it


def test_a_file_of_many_systems_takes_one_more_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"instruction": p, "output": f"{k} {p}", "generator": f"system {k}"} for p in PROMPTS[:2] for k in range(300)
    ]
    file = tmp_path / "all.json"
    file.write_text(json.dumps(rows))
    before = len(os.listdir("/dev/fd"))
    opened = mock.Mock(wraps=tempfile.TemporaryFile)
    monkeypatch.setattr(tempfile, "TemporaryFile", opened)
    systems = read_outputs([file])
    assert len(systems) == 300 and opened.call_count == 1 and len(os.listdir("/dev/fd")) <= before + 2
    for k, (name, outputs) in enumerate(systems.items()):
        assert name == f"system {k}"
        assert [outputs.responses(prompt) for prompt in outputs.prompts] == [[f"{k} {p}"] for p in PROMPTS[:2]]
        assert [outputs.prompt(prompt) for prompt in outputs.prompts] == PROMPTS[:2]


def chat_run(folder: Path) -> list[list[dict[str, str]]]:
    """A run on conversations of one message: its samples show them as text, its data has the messages."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    (folder / "data").mkdir()
    to_parquet(
        [PreferenceRow(prompt_id(chat), chat, ["a", "b"], [Comparison(0, 1)]) for chat in chats],
        folder / "data" / "eval.parquet",
    )
    rows = [
        Sample(prompt_id(chat), name, prompt=readable(chat), response=text, response_ids=[5, 6])
        for name, texts in (("ppo", LONG), ("sft", SHORT))
        for chat, text in zip(chats, texts, strict=True)
    ]
    columns = ["prompt_id", "policy", "sample_index", "prompt", "response", "response_ids", "truncated"]
    write_samples(rows, folder / "samples.parquet", columns)
    return chats


def test_a_chat_run_is_judged_on_its_messages_and_under_its_ids(tmp_path: Path) -> None:
    """A model that scores reads them with its chat template, and the judgements are of the run's prompts."""
    chats = chat_run(tmp_path)
    for pair in (("ppo", "sft"), (None, None)):
        asked = outputs_to_judge([tmp_path], policy=pair[0], baseline=pair[1], limit=None)
        assert list(asked.responses.prompts) == chats and asked.responses.ids is not None
        assert asked.responses.prompt_ids == [prompt_id(chat) for chat in chats]
        assert asked.sources("sft", prompt_id(chats[1]), SHORT[1]) == (str(tmp_path / "samples.parquet"), 6)
    # Outputs of others have the prompts as texts: a model reads what the run has, whichever file is named first.
    texts = alpaca(tmp_path / "other.json", "other", MIDDLE)
    for files in ([texts, tmp_path], [tmp_path, texts]):
        asked = outputs_to_judge(files, policy="ppo", baseline="other", limit=None)
        assert list(asked.responses.prompts) == chats
        assert asked.responses.prompt_ids == [prompt_id(chat) for chat in chats]
    messages = plain(tmp_path / "messages.jsonl", MIDDLE, chats)
    for files in ([texts, messages], [messages, texts]):
        asked = outputs_to_judge(files, policy=None, baseline=None, limit=None)
        assert list(asked.responses.prompts) == chats
        assert asked.responses.prompt_ids == [prompt_id(prompt) for prompt in PROMPTS]


def test_a_function_that_judges_a_chat_run_sees_messages(tmp_path: Path) -> None:
    chat_run(tmp_path)
    (tmp_path / "seen_judge.py").write_text(
        "def f(prompts, completions, **_):\n    return [len(c) if isinstance(p, list) else None for p, c in "
        "zip(prompts, completions)]\n"
    )
    command = ["judge", str(tmp_path), "--policy=ppo", "--baseline=sft", "--judge=python:seen_judge:f", "--json"]
    [row] = json.loads(duel(*command, f"--out={tmp_path / 'j.parquet'}").stdout)["win_rates"]
    assert (row["n_judged"], row["n_failed"], row["win_rate"]) == (4, 0, 1.0)


def test_the_limit_counts_prompts_that_both_answered(tmp_path: Path, longer: str) -> None:
    rows = [
        Sample(prompt_id(p), name, prompt=p, response=text)
        for name, texts, prompts in (("sft", SHORT, PROMPTS), ("base", LONG[:2], PROMPTS[2:]))
        for p, text in zip(prompts, texts, strict=False)
    ]
    write_samples(rows, tmp_path / "samples.parquet", ["prompt_id", "policy", "sample_index", "prompt", "response"])
    command = ["judge", str(tmp_path), "--policy=base", "--baseline=sft", f"--judge={longer}", "--json"]
    done = json.loads(duel(*command, "--limit=2", f"--out={tmp_path / 'j.parquet'}").stdout)
    assert done["win_rates"][0]["n_judged"] == 2
    refused = duel(*command, "--policy=sft", f"--out={tmp_path / 'k.parquet'}", check=2)
    assert "'sft' would be compared with itself" in refused.stderr


def test_a_parquet_file_of_rows_is_read_as_any_other(tmp_path: Path, longer: str) -> None:
    rows = [
        {"prompt": p, "response": text, "generator": name}
        for name, texts in (("l", LONG), ("s", SHORT))
        for p, text in zip(PROMPTS, texts, strict=True)
    ]
    write_table(rows, tmp_path / "outs.parquet")
    command = ["judge", str(tmp_path / "outs.parquet"), "--policy=l", "--baseline=s", f"--judge={longer}", "--json"]
    assert json.loads(duel(*command, f"--out={tmp_path / 'j.parquet'}").stdout)["win_rates"][0]["win_rate"] == 1.0
    # A table of samples goes by what it holds, not by its name.
    chat_run(tmp_path)
    moved = (tmp_path / "samples.parquet").rename(tmp_path / "kept.parquet")
    assert outputs_to_judge([moved], policy=None, baseline=None, limit=None).responses.ids is not None


def test_annotations_of_several_samples_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    rows = [{"prompt": PROMPTS[0], "response": text, "generator": name} for name in "ab" for text in ("x", "y")]
    (tmp_path / "outs.json").write_text(json.dumps(rows))
    (tmp_path / "never.py").write_text("def f(prompts, completions, **_):\n    raise SystemExit('asked')\n")
    out, annotations = tmp_path / "j.parquet", tmp_path / "a.json"
    command = ["judge", str(tmp_path / "outs.json"), "--judge=python:never:f", f"--out={out}"]
    refused = duel(*command, f"--annotations={annotations}", check=2)
    assert "'a' has 2 samples and 'b' 2 for one prompt" in refused.stderr and not out.exists()
    compared = ["compare", "tiny", "tiny", "--data=reviews", "--judge=gold", f"--out={tmp_path / 'c'}", "--limit=2"]
    refused = duel(*compared, "--samples-per-prompt=2", f"--annotations={annotations}", check=2)
    assert "2 samples for a prompt" in refused.stderr and not list((tmp_path / "c").glob("samples-*"))
