"""Commands that measure say when a model is measured on prompts that it was trained on, and fit a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.running import duel

pytestmark = pytest.mark.e2e


def test_prompts_of_the_training_are_counted_and_said(small_run: Path, tmp_path: Path) -> None:
    rm = str(small_run / "reward_model" / "model")
    for name, seen in (("train", True), ("eval", False)):
        data, out = str(small_run / "data" / f"{name}.parquet"), tmp_path / name
        score = ("score", "--rm", rm, "--data", data, "--limit", "12", "--out", f"{out}.parquet")
        said = duel(*score).stdout
        assert ("12 of the 12 prompts are among those that the model was trained on" in " ".join(said.split())) == seen
        assert json.loads(duel(*score, "--json").stdout)["n_trained_prompts"] == 12 * seen
        made = ("rm-card", rm, "--data", data, "--limit", "12", "--out", str(out))
        page = duel(*made).stdout
        assert ("note: 12 of the 12 prompts" in page) == seen and page.endswith(f"written: {out}\n")
        assert json.loads(duel(*made, "--json").stdout)["n_trained_prompts"] == 12 * seen
        kept = (
            "filter",
            "--rm",
            rm,
            "--data",
            data,
            "--calibrate",
            data,
            "--fpr",
            "0.3",
            "--out",
            f"{out}.kept.parquet",
        )
        gate = duel(*kept).stdout
        assert ("warning: the judge was trained on" in gate) == seen
        for text in (said, page, gate):
            lines = text.replace(str(tmp_path), "").splitlines()
            assert max(len(line) for line in lines if not line.startswith("Next: duel ")) <= 80, (
                text
            )  # commands are whole
