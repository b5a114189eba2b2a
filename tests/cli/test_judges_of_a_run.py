"""A run judged by something else than what its arms were trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.running import SMALL, duel

from toolkit.engine.engine import Engine
from toolkit.models.encoding import Tree, text_encoder
from toolkit.models.inspect import DTYPES
from toolkit.models.load import load_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.recipe.schema import ModelSection

pytestmark = pytest.mark.e2e


def test_a_held_out_reward_model_judges_both_arms(small_run: Path, tmp_path: Path) -> None:
    """Trained by another run, on other annotations of other prompts: it counts as neutral, and PPO's own does not."""
    other, run = tmp_path / "other", shutil.copytree(small_run, tmp_path / "run")
    duel("run", "smoke", "--out", str(other), *SMALL, "--set=seed=1", "--until", "reward_model")
    held_out, own = other / "reward_model" / "model", run / "reward_model" / "model"
    judges = json.dumps([f"rm:{held_out}", f"rm:{own}"])
    duel("run", "smoke", "--out", str(run), *SMALL, f"--set=evaluate.judges={judges}")

    results = json.loads((run / "results.json").read_text())
    names = {row["judge"] for row in results["win_rates"]}
    assert names == {f"rm:{held_out}", "rm"}  # its own model is recognised behind its path
    assert "no independent judge" not in results["verdict"]["sentence"]

    # Its judgements are its scores of the samples, computed here by the reference path of one row for each.
    ref = resolve(str(held_out))
    model = load_reward_model(ref, ModelSection(name="tiny", dtype="float32", lora=None))
    tokenizer = load_tokenizer(ref)
    scorer = Engine(model, int(tokenizer.pad_token_id), dtype=DTYPES["float32"])
    samples = {}
    for row in pq.read_table(run / "samples.parquet").to_pylist():
        if row["kind"] != "best_of_n" and row["sample_index"] == 0:
            tree = Tree(text_encoder(tokenizer, row["prompt"]).prompt(row["prompt"]), [list(row["response_ids"])])
            samples[row["prompt_id"], row["policy"]] = scorer.scores([tree])[0][0]
    checked = 0
    for row in pq.read_table(run / "judgements.parquet").to_pylist():
        pair = (row["prompt_id"], row["policy"]), (row["prompt_id"], row["baseline"])
        if row["judge"] == f"rm:{held_out}" and all(key in samples for key in pair):
            ours, theirs = (samples[key] for key in pair)
            if abs(ours - theirs) > 1e-4:
                assert row["preference"] == float(ours > theirs)
                checked += 1
    assert checked >= 20
