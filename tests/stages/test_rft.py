"""Rejection-sampling fine-tuning: what is sampled, what is kept, what is imitated, and the baseline in a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.running import SMALL, duel

from toolkit.engine.engine import Engine
from toolkit.errors import RecipeError
from toolkit.files import read_json
from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.prompt_kind import trained_on_messages
from toolkit.models.resolve import resolve, training_record
from toolkit.models.reward_head import reward_head
from toolkit.preferences.samples import by_prompt, read_samples
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe
from toolkit.recipe.training import ModelSection
from toolkit.stages import rft
from toolkit.stages.contexts import RftContext, context_of

pytestmark = pytest.mark.e2e
SETTINGS = [setting.removeprefix("--set=") for setting in SMALL]
FP32 = ModelSection(name="tiny", dtype="float32", lora=None)


def train(run: Path, out: Path, settings: str) -> dict[str, Any]:
    context = context_of("rft", load_recipe("smoke", [*SETTINGS, f"rft={settings}"]).recipe)
    assert isinstance(context, RftContext)
    out.mkdir(exist_ok=True)
    inputs = {name: run / name for name in ("data", "sft", "reward_model")}
    return rft.run(context, inputs, out, Reporter(quiet=True))


@pytest.mark.invariant
def test_the_best_sample_of_each_prompt_is_imitated(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = "{n: 3, prompts: 16, per_device_train_batch_size: 16, logging_steps: 1, max_steps: 2, warmup_ratio: 0}"
    record = train(small_run, tmp_path, settings)
    samples = read_samples(tmp_path / rft.SAMPLES_FILE, rft.COLUMNS)
    assert record["n_samples"] == len(samples) == 48 and record["steps"] == 2
    prompts = {row.prompt_id: row for row in from_parquet(small_run / "data" / "train.parquet")}
    reward = resolve(str(small_run / "reward_model" / "model"))
    scorer = Engine(load_reward_model(reward, FP32), 0, dtype=torch.float32)
    sft = Engine(load_policy(resolve(str(small_run / "sft" / "model")), FP32), 0, dtype=torch.float32)
    encoder = rft.text_encoder(rft.load_tokenizer(resolve(str(small_run / "sft" / "model"))), "text")
    best = []
    for name, of_prompt in by_prompt(samples).items():
        tree = Tree(encoder.prompt(prompts[name].prompt), [sample.response_ids for sample in of_prompt])
        expected = [score - reward_head(reward.path).mean for score in scorer.scores([tree])[0]]
        assert [sample.explicit_reward for sample in of_prompt] == pytest.approx(expected, abs=1e-4)
        best.append(Tree(tree.prompt_ids, [tree.response_ids[expected.index(max(expected))]]))
    # The first step's loss is that of SFT on them.
    nll = -float(torch.cat([logps for [logps] in sft.logps(best)]).mean())
    assert record["history"][0]["loss"] == pytest.approx(nll, abs=1e-4)
    assert record["mean_best_reward"] > record["mean_reward"]
    facts = training_record(resolve(str(tmp_path / "model")))
    assert (facts["arm"], facts["n"], facts["step"]) == ("rft", 3, 2) and facts["train_tokens"] > 0

    # A stopped stage draws no sample again.
    monkeypatch.setattr(rft, "scored_samples", lambda *_: pytest.fail("sampled again"))
    shutil.rmtree(tmp_path / "trainer")
    again = train(small_run, tmp_path, settings)
    assert again["history"] == [pytest.approx(entry, rel=1e-6) for entry in record["history"]]


def test_a_run_compares_it_with_sft_and_both_arms(small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(small_run, out)
    done = duel("run", "smoke", "--out", str(out), *SMALL, "--set=rft={n: 2, learning_rate: 1.0e-3}")
    for stage in ("data", "sft", "reward_model", "ppo", "dpo"):
        assert f"{stage}] cached" in done.stderr
    trained = [trained_on_messages(resolve(str(out / arm / "model"))) for arm in ("reward_model", "ppo", "dpo", "rft")]
    assert trained == [False] * 4  # its prompts are text
    results = read_json(out / "results.json")
    [row] = [row for row in results["policies"] if row["policy"] == "rft"]
    assert row["kind"] == "final" and row["kl_nats"] != 0 and row["n_prompts"] == 12
    pairs = {(rate["policy"], rate["baseline"]) for rate in results["win_rates"]}
    assert {("rft", "sft"), ("rm_ppo", "rft"), ("dpo", "rft"), ("rm_ppo", "dpo")} <= pairs
    assert results["cost"]["arms"]["rft"]["response_tokens_trained"] > 0
    assert [entry["arm"] for entry in results["cost"]["stages"] if entry["stage"] == "rft"] == ["rft"]
    assert "rft" not in read_json(small_run / "results.json")["cost"]["arms"]
    assert results["verdict"] == read_json(small_run / "results.json")["verdict"]  # it is between the arms
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "The square is the baseline" in page and '"square"' in page and "counts only its own sampling" in page
    assert "The square is" not in (small_run / "report.html").read_text(encoding="utf-8")

    pushed = json.loads(duel("push", str(out), "--to", str(tmp_path / "pushed"), "--only", "rft", "--json").stdout)
    card = (Path(pushed["pushed"]["rft"]) / "README.md").read_text(encoding="utf-8")
    assert "rejection-sampling fine-tuning" in card and "win rate over sft" in card and "`n` | `2`" in card
    refused = duel("push", str(small_run), "--to", str(tmp_path / "other"), "--only", "rft", check=2).stderr
    assert "no baseline of rejection sampling" in refused


@pytest.mark.parametrize(
    ("sets", "what"),
    [
        (["rft={n: 1}"], "rft.n must be a whole number >= 2"),
        (["rft={prompts: 0}"], "rft.prompts must be a whole number > 0"),
        (["rft=yes"], "rft must be a section or null"),
        (["rft={}", "study.seeds=2", "evaluate.judges=[gold]"], "does not train the baseline rft"),
    ],
)
def test_settings_that_it_does_not_take(sets: list[str], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        load_recipe("smoke", sets)
