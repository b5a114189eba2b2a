"""What the reward model's stage would refuse is refused behind the data stage, before SFT trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.running import duel
from support.small_models import save_bert

pytestmark = pytest.mark.fault

PAIR = {"chosen": " warm and good.", "rejected": " soup."}
SETTINGS = ("--set=data.eval_fraction=0.4", "--set=data.train_prompts=4", "--set=data.eval_prompts=2")
HEADS = "--set=reward_model.annotators=heads"


def pairs(path: Path, annotators: tuple[tuple[str, ...], ...]) -> str:
    """A file of ten prompts, and the setting that names it. The sets of annotators take turns."""
    rows = [
        {"prompt": f"Soup {k} was", **PAIR, "annotator": name}
        for k in range(10)
        for name in annotators[k % len(annotators)]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"--set=data.source={path}"


@pytest.fixture(scope="module")
def short_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with eight positions."""
    return save_bert(tmp_path_factory.mktemp("bert"), ["Soup"], positions=8)


@pytest.mark.parametrize(
    ("annotators", "settings", "message"),
    [
        ((("x", "y"),), [HEADS, "--set=reward_model.annotator=z"], "no annotator 'z'.*one of x, y"),
        ((("x",),), [HEADS], "one annotator compared all responses, 'x'"),
        ((("x",), ("y",)), [HEADS], "no pair of responses has the comparisons of two of the 2 annotators"),
        ((("",),), [HEADS], "4 of 4 comparisons name no annotator"),
        ((("",),), ["--set=reward_model.base={encoder}"], r"has positions \(8\)"),
        (
            (("",),),
            [
                "--set=reward_model.base={encoder}",
                "--set=reward_model.kind=process",
                "--set=reward_model.steps=arithmetic",
            ],
            "an encoder reads a whole response at once",
        ),
    ],
)
def test_a_reward_model_that_the_data_cannot_train(
    tmp_path: Path, short_encoder: Path, annotators: tuple[tuple[str, ...], ...], settings: list[str], message: str
) -> None:
    source = pairs(tmp_path / "pairs.jsonl", annotators)
    settings = [source, *SETTINGS, *(setting.format(encoder=short_encoder) for setting in settings)]
    for more in (["--dry-run"], ["--until", "sft"]):
        done = duel("run", "smoke", "--out", str(tmp_path / "run"), *settings, *more, check=2)
        assert re.search(message, " ".join(done.stderr.split()))
    assert (tmp_path / "run" / "data").is_dir() and not (tmp_path / "run" / "sft").exists()
