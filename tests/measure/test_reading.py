"""The rows that ``duel rewards`` and ``duel score`` read wait on disk, as they are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.errors import ModelError
from toolkit.measure import sampling
from toolkit.measure.options import PromptSelection
from toolkit.measure.reading import DATA, EncodedRow, EncodedRows, Reading, ReadingOptions, read, read_data
from toolkit.models.encoding import Encoded, Tree, text_encoder
from toolkit.models.load import new_reward_model
from toolkit.models.prompt_kind import trained_on_messages
from toolkit.models.resolve import TRAINING_RECORD_FILE, resolve
from toolkit.models.reward_head import RewardHead
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt
from toolkit.recipe.training import ModelSection


def test_encoded_rows_are_a_sequence_of_equal_rows() -> None:
    rows = [
        EncodedRow(
            PreferenceRow(
                f"{k:016x}", [{"role": "user", "content": "\ud800"}], ["a", "b"], [Comparison(0, 1, 0.3)], [0.1, 2.0], k
            ),
            Encoded(Tree([k, 2**17], [[1], [2, k]]), [False, True]),
            DATA if k else "PPO",
            ["x", "y"],
            [("file", k), ("file", k + 1)],
        )
        for k in range(5)
    ]
    stored = EncodedRows.of(rows)
    assert list(stored) == rows and len(stored) == 5 and stored[-1] == rows[-1]
    assert list(stored[1:4:2]) == rows[1:4:2] and len(stored[:0]) == 0
    trees = Reading(text_encoder(load_tokenizer(resolve("tiny")), "tiny"), stored, {}).trees
    assert list(trees) == [row.encoded.tree for row in rows] == list(trees[:]) and trees[2] == rows[2].encoded.tree
    with pytest.raises(IndexError):
        stored[5]


def test_a_limit_counts_the_prompts_that_fit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{k} " * (1 + 99 * (k % 2)), "chosen": "good " * 40, "rejected": "bad"} for k in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(resolve("tiny"))
    options = ReadingOptions(max_prompt_tokens=30, max_response_tokens=8)
    whole = read(str(path), tokenizer, "tiny", options)
    assert [row.row.source_row for row in whole.rows] == list(range(1, 21, 2))
    assert whole.counts == {"n_rows_left_out": 0, "n_long_prompts": 10, "n_truncated_responses": 10}
    assert whole.rows[1].sources == [(str(path), 3)] * 2 and whole.n_data == 10 == len(whole.comparisons)
    few = read(str(path), tokenizer, "tiny", ReadingOptions(limit=4, max_prompt_tokens=30, max_response_tokens=8))
    numbers = [row.row.source_row for row in few.rows]
    assert len(numbers) == 4 and numbers == sorted(numbers) and few.counts["n_truncated_responses"] == 4


PEAK = """
import sys
from pathlib import Path
from toolkit.measure.reading import ReadingOptions, read
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
reading = read(sys.argv[1], load_tokenizer(resolve("tiny")), "tiny", ReadingOptions())
n_tokens = sum(map(len, reading.trees))
status = Path("/proc/self/status").read_text().splitlines()
print(len(reading.rows), n_tokens, next(int(line.split()[1]) for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_peak_memory_of_scoring_is_flat_in_the_rows(tmp_path: Path) -> None:
    peaks, tokens = [], []
    for n in (1, 12_000):
        path = tmp_path / f"{n}.jsonl"
        with path.open("w") as out:
            for k in range(n):
                out.write(json.dumps({name: f"{name} {k} " * 30 for name in ("prompt", "chosen", "rejected")}) + "\n")
        done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
        n_rows, n_tokens, peak = map(int, done.stdout.split())
        assert n_rows == n
        peaks.append(peak)
        tokens.append(n_tokens)
    held = 8 * (tokens[1] - tokens[0]) / 1024  # KiB that pointers to the ids alone would take
    assert peaks[1] - peaks[0] < 0.5 * held + 60_000


TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize("rows", ["pairs", "single"])
@pytest.mark.parametrize("trained", [True, False, None])
def test_prompts_are_of_the_kind_that_a_model_was_trained_on(tmp_path: Path, rows: str, trained: bool | None) -> None:
    def written(name: str, record: dict[str, str]) -> str:
        path = tmp_path / name
        path.write_text(json.dumps(record) + "\n")
        return str(path)

    answers = {"response": " a"} if rows == "single" else {"chosen": " a", "rejected": " b"}
    text = written("text.jsonl", {"prompt": "Hi", **answers})
    column = written("column.jsonl", {"prompt": TRANSCRIPT, **answers})
    whole = written("whole.jsonl", {name: TRANSCRIPT + text for name, text in answers.items()})

    def prompt(source: str, **options: bool) -> Prompt:
        [row] = read_data(source, ReadingOptions(**options), trained=trained, singles=True).rows
        return row.prompt

    messages = [{"role": "user", "content": "Hi"}]
    assert prompt(text) == (messages if trained else "Hi")
    assert prompt(column) == (messages if trained else TRANSCRIPT)
    assert prompt(column, plain=True) == TRANSCRIPT
    if rows == "pairs":
        assert prompt(whole) == (TRANSCRIPT if trained is False else messages)


@pytest.mark.parametrize("kinds", [(None, True), (True, False), (False, None), (None, None)])
def test_policies_are_asked_as_they_were_trained(tmp_path: Path, kinds: tuple[bool | None, ...]) -> None:
    """A policy trained on messages continued the bare text of a prompt in ``compare``, ``label`` and ``simulate``."""
    (tmp_path / "prompts.txt").write_text("Hi\n")
    refs = [replace(resolve("tiny"), path=str(tmp_path / str(k))) for k in range(len(kinds))]
    for ref, conversational in zip(refs, kinds, strict=True):
        Path(ref.path).mkdir()
        record = {} if conversational is None else {"conversational": conversational}
        (Path(ref.path) / TRAINING_RECORD_FILE).write_text(json.dumps(record))
    [(_, prompt)] = sampling.read_prompts(PromptSelection(str(tmp_path / "prompts.txt")), refs)
    assert prompt == ([{"role": "user", "content": "Hi"}] if kinds == (None, True) else "Hi")


def test_what_a_model_was_trained_on_lies_beside_its_weights(tmp_path: Path) -> None:
    assert trained_on_messages(resolve("tiny")) is None
    folder = tmp_path / "rm"
    new_reward_model(resolve("tiny"), ModelSection(dtype="float32"), 0, 0).save_pretrained(folder)
    assert trained_on_messages(resolve(str(folder))) is None
    for conversational in (True, False):
        RewardHead(conversational=conversational).write(folder)
        assert trained_on_messages(resolve(str(folder))) is conversational
    (folder / "reward_head.json").unlink()
    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    for stage in ("sft", ".work"):  # as it lies in a run, and where the run keeps earlier results
        shutil.copytree(folder, run / stage / "model")
    assert trained_on_messages(resolve(str(run / "sft" / "model"))) is None
    for conversational in (True, False):
        (run / "data" / "report.json").write_text(json.dumps({"conversational": conversational}))
        assert trained_on_messages(resolve(str(run / "sft" / "model"))) is conversational
        assert trained_on_messages(resolve(str(run / ".work" / "model"))) is None
    for file, words in (("reward_head.json", {"mean": 0.0}), ("duel.json", {})):
        (folder / file).write_text(json.dumps({**words, "conversational": "yes"}))
        with pytest.raises(ModelError, match="conversational must be true or false"):
            trained_on_messages(resolve(str(folder)))
        (folder / file).unlink()
