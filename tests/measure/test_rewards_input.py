"""What ``duel rewards`` refuses, and what it counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import cut, emptied, flipped

from toolkit import implicit_rewards
from toolkit.engine import cache
from toolkit.engine.engine import Engine
from toolkit.errors import DuelError, ModelError, RecipeError
from toolkit.measure.reading import ReadingOptions, read
from toolkit.measure.summary import summarise_rewards
from toolkit.models.resolve import ModelRef
from toolkit.models.save import write_training_record
from toolkit.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.fault


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path, tiny_ref: ModelRef) -> Path:
    """A copy of the shipped model, to be broken."""
    return Path(shutil.copytree(tiny_ref.path, tmp_path / "model"))


def refused(kind: type[DuelError], *words: str, **options: Any) -> DuelError:
    settings = {"policy": "tiny", "reference": "tiny", "data": "reviews", "limit": 3, "beta": 0.1, **options}
    with pytest.raises(kind) as caught:
        implicit_rewards(**settings)
    for word in (*words, "fix:"):
        assert word in caught.value.render()
    return caught.value


def test_a_reference_that_was_not_trained_against(model: Path) -> None:
    write_training_record(model, arm="dpo", beta=0.1, reference_fingerprint="0123456789abcdef")
    refused(ModelError, "0123456789abcdef", "--any-reference", policy=str(model))
    assert implicit_rewards(str(model), "tiny", "reviews", limit=2, any_reference=True)["n_prompts"] == 2


def test_tokenizers_that_differ(model: Path) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    refused(ModelError, "different tokenizers", reference=str(model))


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_beta_that_is_none(beta: float) -> None:
    refused(RecipeError, "--beta", beta=beta)


def test_weights_that_are_not_numbers(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = next(iter(sorted(weights)))
    weights[name][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(ModelError, name, policy=str(model))


def test_results_that_are_not_numbers_are_never_kept(tiny: Any, make_trees: Any, tmp_path: Path) -> None:
    class Broken(Engine):
        def logps(self, *args: Any, **more: Any) -> Any:
            return [[t * float("nan") for t in row] for row in super().logps(*args, **more)]

    results = cache.ResponseCache(tmp_path, "key", lambda: Broken(tiny, 0, dtype=torch.float32))
    with pytest.raises(ModelError, match="not finite"):
        next(results.logps(make_trees(3), advance=lambda n: None))
    assert not list(tmp_path.glob("*.npy"))


def test_rewards_that_are_not_numbers_are_counted(tmp_path: Path, tiny_ref: ModelRef) -> None:
    data = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"A film {k}", "chosen": " good", "rejected": " bad"} for k in range(2)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    reading = read(str(data), load_tokenizer(tiny_ref), "tiny", ReadingOptions())
    rewards = [np.array([1.0, 0.0]), np.array([float("inf"), 0.0])]
    with pytest.raises(ModelError, match="1 of 4 scores are no finite numbers"):
        summarise_rewards(reading, rewards, [tiny_ref], 0.0)


def test_a_damaged_file_of_results_is_named_and_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    rows = implicit_rewards("tiny", "tiny", "reviews", limit=3)["rows"]
    [stored] = cache.reference_folder().glob("*.npy")
    content = stored.read_bytes()
    for damage in (emptied, cut, flipped):
        damage(stored)
        caplog.clear()
        assert implicit_rewards("tiny", "tiny", "reviews", limit=3)["rows"] == rows
        assert stored.read_bytes() == content and f"damaged, and computed again: {stored}" in caplog.text


def test_conversations_without_a_chat_template(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").unlink()
    data = tmp_path / "chat.jsonl"
    turn = [{"role": "user", "content": "How are you?"}]
    row = {"prompt": turn, "chosen": [{"role": "assistant", "content": "Well."}]}
    data.write_text(json.dumps(row | {"rejected": [{"role": "assistant", "content": "Go away."}]}) + "\n")
    refused(ModelError, "chat template", policy=str(model), reference=str(model), data=str(data))


def test_what_is_too_long_is_counted(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "A film", "chosen": " good" * 40, "rejected": " bad"},
        {"prompt": "A film " * 90, "chosen": "a", "rejected": "b"},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = implicit_rewards("tiny", "tiny", str(data), max_response_tokens=8, max_prompt_tokens=60)
    assert (summary["n_prompts"], summary["n_long_prompts"], summary["n_truncated_responses"]) == (1, 1, 1)
    # A limit counts what is left, whichever of the two comes first.
    one = implicit_rewards("tiny", "tiny", str(data), limit=1, max_response_tokens=8, max_prompt_tokens=60)
    assert one["n_prompts"] == 1 and one["rows"] == summary["rows"]
    cut = {row["label"]: (row["truncated"], row["n_tokens"]) for row in summary["rows"]}
    assert cut["chosen"] == (True, 8) and not cut["rejected"][0]
