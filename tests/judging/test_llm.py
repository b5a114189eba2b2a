"""A language model of this process as judge, templates, and recorded samples before another judge."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from toolkit.errors import DataError, RecipeError
from toolkit.files import write_table
from toolkit.judging import llm
from toolkit.judging.answers import Answer, Question, remembering
from toolkit.judging.judge import judge_pairs, name_training_signals
from toolkit.judging.local_model import whole_groups
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, write_judgements
from toolkit.judging.responses import PolicyResponses
from toolkit.judging.templates import load_template
from toolkit.judging.win_rates import winrate_report
from toolkit.measure.judge import JudgedFiles, judge_outputs
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.progress import Reporter
from toolkit.recipe.schema import JudgeSettings
from toolkit.recipe.training import ModelSection

QUIET = Reporter(quiet=True)
PROMPTS = ["The hotel was", "I bought this phone and"]
TEXTS = {
    "a": [[" lovely and quiet, and I would stay there again."], [" it works well, so I love it."]],
    "b": [[" dirty, and the staff were rude to us."], [" it broke on the first day, which was awful."]],
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))


def judge(template: str | None = None, model: str = "tiny") -> list[Any]:
    options = JudgeOptions(ModelSection(dtype="float32"), JudgeSettings(template=template))
    responses = PolicyResponses(["p0", "p1"], PROMPTS, TEXTS)
    return judge_pairs(f"llm:{model}", [("a", "b")], responses, options, QUIET)[0]


def test_log_probabilities_of_a_local_model(tiny: Any, tokenizer: Any) -> None:
    """P(A) / (P(A) + P(B)) by one whole forward pass for each order."""
    template = load_template("logprob")
    judgements = judge()
    assert len(judgements) == 4
    for judgement in judgements:
        row = int(judgement.prompt_id[1])
        shown = [TEXTS["a"][row][0], TEXTS["b"][row][0]]
        first, second = shown[::-1] if judgement.order else shown
        messages = template.messages(PROMPTS[row], first, second)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        logp = []
        for letter in "AB":
            [*branch] = tokenizer(letter, add_special_tokens=False)["input_ids"]
            logits = tiny(torch.tensor([[*ids, *branch]])).logits[0].double().log_softmax(-1)
            logp.append(sum(logits[len(ids) - 1 + k, token] for k, token in enumerate(branch)))
        for_first = float(torch.sigmoid(logp[0] - logp[1]))
        expected = 1 - for_first if judgement.order else for_first
        assert judgement.preference == pytest.approx(expected, abs=1e-5)


def test_a_small_model_that_gives_no_verdict_fails_with_its_text() -> None:
    judgements = judge("choice")
    assert len(judgements) == 4 and all(j.preference is None and j.error for j in judgements)
    with remembering(llm.memory_file()) as memory:
        answers = memory.connection.execute("SELECT raw, error FROM answers").fetchall()
    assert len(answers) == 4 and all(raw and error for raw, error in answers)


def n_answers() -> int:
    with remembering(llm.memory_file()) as memory:
        return int(memory.connection.execute("SELECT count(*) FROM answers").fetchone()[0])


def test_another_model_under_the_same_name_is_asked_again(tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    shutil.copytree(resolve("tiny").path, folder)
    first = judge(model=str(folder))
    assert judge(model=str(folder)) == first and n_answers() == 4  # remembered
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    moved = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    retrained = judge(model=str(folder))
    assert n_answers() == 8
    for judgement, before in zip(retrained, first, strict=True):
        assert judgement.preference != before.preference
    tokenizer = load_tokenizer(resolve(str(folder)))
    (folder / "chat_template.jinja").write_text(str(tokenizer.chat_template) + "Verdict: ", encoding="utf-8")
    judge(model=str(folder))
    assert n_answers() == 12


def test_another_precision_or_attention_is_asked_again() -> None:
    responses = PolicyResponses(["p0"], PROMPTS[:1], {name: texts[:1] for name, texts in TEXTS.items()})
    sections = [ModelSection(dtype="float32"), ModelSection(dtype="bfloat16")]
    sections += [ModelSection(dtype="float32", attn_implementation="eager")]
    for n, section in enumerate([*sections, *sections], start=1):
        judge_pairs("llm:tiny", [("a", "b")], responses, JudgeOptions(section), QUIET)
        assert n_answers() == 2 * min(n, 3)


def test_an_edited_template_is_another_question(tmp_path: Path) -> None:
    template = tmp_path / "t.yaml"
    for n, word in ((4, "better"), (8, "worse")):
        template.write_text(f"kind: logprob\nuser: '{{{{ prompt }}}} {{{{ response_a }}}} {{{{ response_b }}}} {word}'")
        judge(str(template))
        assert n_answers() == n


def test_a_stored_verdict_of_a_cut_reply_is_no_answer() -> None:
    """Earlier versions read a verdict that a reply quotes before it is cut."""
    template = load_template("choice")
    quoted = Answer(0.0, 'B ends with "[[B]]", which is no verdict. As to', completion_tokens=template.max_tokens)
    assert template.was_cut(quoted)
    assert not template.was_cut(replace(quoted, raw="I prefer the second. **[[B]]**\n"))
    assert not template.was_cut(replace(quoted, completion_tokens=template.max_tokens - 1))
    assert not load_template("logprob").was_cut(Answer(0.3, "A", completion_tokens=1))


def test_a_failure_never_replaces_an_answer(tmp_path: Path) -> None:
    question = Question("j", "t", "prompt", "first", "second")
    with remembering(tmp_path / "m.sqlite") as memory:
        memory.keep(question, Answer(None, error="no"))
        assert memory.answers([question]) == {}
        memory.keep(question, Answer(0.25, raw="x"))
        memory.keep(question, Answer(None, error="later"))
        assert memory.answers([question]) == {question.key: Answer(0.25, raw="x")}


def test_ppos_own_reward_model_by_its_path_is_not_neutral() -> None:
    tiny = resolve("tiny").fingerprint
    names, [warning] = name_training_signals(["rm:tiny"], {"rm": [tiny]})
    assert names == ["rm"] and "PPO was trained against" in warning
    assert name_training_signals(["rm:tiny"], {"rm": ["another"]}) == (["rm:tiny"], [])  # held out: other weights
    others = ["rm", "gold", "llm:tiny"]
    assert name_training_signals(others, {"rm": [tiny]}) == (others, [])
    assert name_training_signals(["rm", "rm:tiny"], {"rm": [tiny]})[0] == ["rm"]


def test_dpos_implicit_reward_by_its_models_is_not_neutral() -> None:
    tiny = resolve("tiny").fingerprint
    names, [warning] = name_training_signals(["implicit:tiny, tiny"], {"implicit": [tiny, tiny]})
    assert names == ["implicit"] and "DPO's own policy" in warning
    # DPO's policy is its own reward whatever it is compared with; another policy's is not.
    assert name_training_signals(["implicit:tiny,tiny"], {"implicit": [tiny, "another"]})[0] == ["implicit"]
    others = ["implicit:tiny,tiny"]
    assert name_training_signals(others, {"implicit": ["another", tiny]}) == (others, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: choice\nuser: '{{ prompt }}'", "response_a"),
        ("kind: vote\nuser: x", "cannot be read"),
        ("kind: score\nuser: '{{ prompt }} {{ response }}'\nextra: 1", "cannot be read"),
        ("kind: score\nuser: '{{ prompt '", "cannot be read"),
    ],
)
def test_templates_that_cannot_work(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_template(str(tmp_path / "t.yaml"))
    with pytest.raises(RecipeError, match="no such judge template"):
        load_template("chioce")


def table(path: Path) -> Path:
    rows = [
        {"prompt_id": f"p{i}", "policy": name, "sample_index": 0, "prompt": PROMPTS[i], "response": TEXTS[name][i][0]}
        for name in TEXTS
        for i in range(2)
    ]
    write_table(rows, path)
    return path


def rejudge(samples: Path, out: Path, judge: str = "gold", policy: str = "a", baseline: str = "b", **more: Any) -> Any:
    files, options = JudgedFiles([samples], policy, baseline), JudgeOptions(ModelSection(dtype="float32"))
    return judge_outputs(files, judge, options, seed=0, out=out, reporter=QUIET, **more)


def test_recorded_samples_before_another_judge(tmp_path: Path) -> None:
    samples, out = table(tmp_path / "samples.parquet"), tmp_path / "judged.parquet"
    [row] = rejudge(samples, out)["win_rates"]
    assert (row["policy"], row["baseline"], row["judge"], row["n_judged"]) == ("a", "b", "gold", 2)
    assert row["win_rate"] == 1.0  # praise against none
    assert pq.read_table(out).num_rows == 2
    [row] = rejudge(samples, out, judge="llm:tiny")["win_rates"]
    assert row["n_judged"] == 2 and pq.read_table(out).num_rows == 4
    judged = tmp_path / "again.parquet"
    [row] = rejudge(samples, judged, judge=f"file:{out}", annotations=tmp_path / "annotations.json")["win_rates"]
    assert (row["judge"], row["n_judged"]) == ("llm:tiny", 2)
    [exported] = winrate_report([tmp_path / "annotations.json"])["win_rates"]
    assert (exported["policy"], exported["win_rate"]) == ("a", pytest.approx(row["win_rate"]))
    [turned] = rejudge(samples, judged, policy="b", baseline="a", judge=f"file:{out}")["win_rates"]
    assert (turned["policy"], turned["n_judged"], turned["win_rate"]) == ("b", 2, pytest.approx(1.0 - row["win_rate"]))
    write_judgements([Judgement("p0", "a", "c", "me", 1.0)], tmp_path / "other.parquet")
    with pytest.raises(DataError, match="no judgement of 'a' against 'b'"):
        rejudge(samples, judged, judge=f"file:{tmp_path / 'other.parquet'}")
    [again] = rejudge(samples, judged, judge=f"file:{tmp_path / 'annotations.json'}")[
        "win_rates"
    ]  # reads what it wrote
    assert (again["judge"], again["n_judged"], again["win_rate"]) == ("llm:tiny", 2, pytest.approx(row["win_rate"]))
    with pytest.raises(DataError, match="there is no system 'ab'"):
        rejudge(samples, out, policy="ab")
    samples.unlink()
    with pytest.raises(DataError, match="no samples"):
        rejudge(tmp_path, out)


def test_questions_are_asked_in_the_groups_of_a_first_call() -> None:
    """The last digits of an answer depend on what is computed with it."""
    keys, places = [f"{k}" for k in range(70)], list(range(70))
    assert whole_groups(keys, keys) == places
    assert whole_groups(keys, {keys[33]}) == places[32:64]
    assert whole_groups(keys, {keys[5], keys[69]}) == [*places[:32], *places[64:]]
    assert whole_groups(keys, set()) == []
