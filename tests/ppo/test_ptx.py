"""Other text in PPO's loss, and where a run takes it from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_models import LORA_CONFIG, Folders, changed, shake
from support.ppo_models import SECTION as SETTINGS
from support.ppo_trainers import PROMPTS, config, length_reward, train

from toolkit.errors import DataError
from toolkit.models.encoding import Tree, text_encoder
from toolkit.ppo import PPOTrainer
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.ptx_texts import imitated_texts, texts_of_source
from toolkit.ppo.update import Update, UpdateSums
from toolkit.preferences.rows import Comparison, PreferenceRow, prompt_id

pytestmark = pytest.mark.invariant
TEXTS = [Tree([5, 6], [[7, 8, 9]]), Tree([10], [[11]]), Tree([12, 13, 14], [[15, 16]])]


def gradients(folders: Folders, kind: str, texts: list[Tree], **options: Any) -> tuple[UpdateSums, dict[str, Any], Any]:
    """The sums of the first optimiser step's texts, the policy's gradients, and the models."""
    models = folders.models(kind)
    shake(models.policy, "lora_B.default." if kind == "lora" else "o_proj", seed=4)
    config = PPOConfig(**changed(SETTINGS, **options))
    update = Update(models, config, torch.float32, lambda loss: loss.backward(), critic_only=False)
    sums = update.ptx_gradients(texts, 0)
    names = {id(weight): name for name, weight in models.named_parameters()}
    return sums, {names[id(w)]: w.grad.clone() for w in models.policy_parameters() if w.grad is not None}, models


def difference(gradient: torch.Tensor, expected: Any) -> float:
    """The largest difference, as a share of the largest gradient."""
    return float((gradient - expected).abs().max() / expected.abs().max())


def test_a_uniform_policy_loses_the_logarithm_of_its_vocabulary(folders: Folders) -> None:
    models = folders.models("full")
    with torch.no_grad():
        for weight in models.policy.parameters():
            weight.zero_()
    config = PPOConfig(**changed(SETTINGS, ptx_coef=3.0, ptx_batch_size=3))
    update = Update(models, config, torch.float32, lambda loss: loss.backward(), critic_only=False)
    sums = update.ptx_gradients(TEXTS, 0)
    assert sums.ptx_loss == pytest.approx(math.log(2048), abs=1e-5) and sums.ptx_tokens == 6


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_loss_is_the_mean_over_the_tokens_of_the_steps_texts(folders: Folders, kind: str) -> None:
    """Weighted by its coefficient, against a plain forward pass; cutting it into passes changes no gradient."""
    options = {"ptx_coef": 3.0, "ptx_batch_size": 3, "temperature": 0.5}
    sums, of_whole, models = gradients(folders, kind, TEXTS, **options)
    models.zero_grad()
    models.use_policy()
    total = torch.zeros(())
    for tree in TEXTS:
        ids = torch.tensor([tree.prompt_ids + tree.response_ids[0]])
        logps = models.policy(ids).logits[0].log_softmax(-1)  # text is not sampled: the temperature is not its matter
        start = len(tree.prompt_ids)
        total = total - sum(logps[start + t - 1, token] for t, token in enumerate(tree.response_ids[0]))
    (3.0 * total / 6).backward()
    assert sums.ptx_loss == pytest.approx(total.item() / 6, abs=1e-5)
    weights = dict(models.named_parameters())
    assert of_whole
    for name, gradient in of_whole.items():
        assert difference(gradient, weights[name].grad) < 1e-4, name
    in_parts, of_parts, _ = gradients(folders, kind, TEXTS, **options, token_budget=4)
    assert in_parts.ptx_loss == pytest.approx(sums.ptx_loss, abs=1e-5) and in_parts.ptx_tokens == 6
    for name, gradient in of_whole.items():
        assert difference(of_parts[name], gradient) < 1e-4, name


def test_steps_take_the_texts_in_turn_and_their_tokens_are_counted(tmp_path: Path) -> None:
    """Two rollouts of two updates each, with two of the three texts in each update."""
    rows = [{"prompt": "The film", "completion": f" was{' very' * n} good."} for n in range(3)]
    args = config(tmp_path, ptx_coef=1.0, ptx_batch_size=2)
    trainer = PPOTrainer("tiny", args, length_reward, PROMPTS, ptx_dataset=rows, peft_config=LORA_CONFIG)
    lengths = [len(tree.response_ids[0]) for tree in trainer.data.ptx]
    assert len(set(lengths)) == 3
    logs = train(trainer)
    sampled = sum(log["tokens"] for log in logs if "tokens" in log)
    assert trainer.spending.tokens == sampled + sum(lengths[i] for i in (0, 1, 2, 0, 1, 2, 0, 1))


# ---------------------------------------------------------------- where a run's texts are from


def test_by_default_it_is_what_sft_imitates(tokenizer: Any) -> None:
    row = PreferenceRow("a", "The film", [" was good.", " was bad."], [Comparison(1, 0)])
    encoder = text_encoder(tokenizer, row.prompt)
    [tree] = imitated_texts([row], "preferred", encoder, 40, 0)
    assert tree == encoder.encode(row.prompt, [" was bad."], 40).tree
    both = imitated_texts([row], "all", encoder, 2, 0)
    assert sorted(tree.response_ids[0] for tree in both) == sorted(
        encoder.encode(row.prompt, row.responses, 2).tree.response_ids
    )


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_sources_of_texts(tokenizer: Any, tmp_path: Path) -> None:
    encoder = text_encoder(tokenizer, "The film")
    held_out = [PreferenceRow(prompt_id("held out"), "held out", ["x", "y"], [])]

    def read(source: str, limits: tuple[int, int] = (20, 20)) -> list[str]:
        trees, _ = texts_of_source(source, held_out, encoder, limits, 0)
        return sorted(tokenizer.decode(tree.prompt_ids + tree.response_ids[0]) for tree in trees)

    end = tokenizer.eos_token
    lines = tmp_path / "texts.txt"
    lines.write_text("A long walk home.\n\n  \nThe other text.\n", encoding="utf-8")
    assert read(str(lines)) == [f"A long walk home.{end}", f"The other text.{end}"]
    assert read(written(tmp_path / "t.jsonl", [{"text": "A long walk home."}, {"text": None}])) == [
        f"A long walk home.{end}"
    ]
    [cut], _ = texts_of_source(str(tmp_path / "t.jsonl"), held_out, encoder, (1, 2), 0)
    assert len(cut.prompt_ids) == 1 and len(cut.response_ids[0]) == 2
    pairs = [
        {"prompt": "The film", "completion": " was good."},
        {"prompt": "held out", "completion": " text."},
        {"prompt": "a prompt of more tokens " * 9, "completion": " text."},
    ]
    assert read(written(tmp_path / "p.jsonl", pairs)) == [f"The film was good.{end}"]
    labelled = [{"prompt": "The film", "chosen": " was good.", "rejected": " was bad."}]
    assert read(written(tmp_path / "c.jsonl", labelled)) == [f"The film was good.{end}"]


def test_held_out_prompts_are_known_in_any_kind_and_by_their_group(tokenizer: Any, tmp_path: Path) -> None:
    """Texts beside training data that is messages become messages, as `ppo.prompts` does with them."""
    held = [{"role": "user", "content": "Held out"}]
    held_out = [PreferenceRow(prompt_id(held), held, ["x", "y"], [], group="one talk")]
    encoder = text_encoder(tokenizer, held)
    pairs = [
        {"prompt": "Held out", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Much like it", "chosen": "Yes.", "rejected": "No.", "group": "one talk"},
        {"prompt": "Another", "chosen": "Yes.", "rejected": "No.", "group": "two"},
    ]
    completions = [{"prompt": p["prompt"], "completion": " Yes.", "group": p.get("group")} for p in pairs]
    expected = encoder.encode([{"role": "user", "content": "Another"}], ["Yes."], 40).tree
    for rows in (pairs, completions):
        trees, line = texts_of_source(written(tmp_path / "t.jsonl", rows), held_out, encoder, (40, 40), 0)
        assert trees == [expected] and line.endswith(
            "1 texts of " + str(tmp_path / "t.jsonl") + "; left out: 2 held out"
        )
    # A system text is of the prompt, as in the training data.
    told = [{"role": "system", "content": "Be kind."}, *held]
    row = {"prompt": "Held out", "completion": "Yes.", "system": "Be kind."}
    source = written(tmp_path / "s.jsonl", [row, {**row, "prompt": "Another"}])
    of_told = [PreferenceRow(prompt_id(told), told, ["x", "y"], [])]
    [tree], _ = texts_of_source(source, of_told, encoder, (40, 40), 0)
    assert tree == encoder.encode([told[0], {"role": "user", "content": "Another"}], ["Yes."], 40).tree
    # Transcripts are read as the training data is: as messages, or as text.
    talk = "\n\nHuman: Held out\n\nAssistant:"
    transcripts = [
        {"chosen": f"\n\nHuman: {q}\n\nAssistant: Yes.", "rejected": f"\n\nHuman: {q}\n\nAssistant: No."}
        for q in ("Held out", "Another")
    ]
    source = written(tmp_path / "h.jsonl", transcripts)
    assert texts_of_source(source, held_out, encoder, (40, 40), 0)[0] == [expected]
    of_text = [PreferenceRow(prompt_id(talk), talk, ["x", "y"], [])]
    [tree], _ = texts_of_source(source, of_text, text_encoder(tokenizer, talk), (40, 40), 0)
    assert tokenizer.decode(tree.prompt_ids) == "\n\nHuman: Another\n\nAssistant:"


def test_of_a_prompt_without_comparisons_no_text_is_mixed_in(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "The film", "responses": [" was good.", " was bad."], "comparisons": []},
        {"prompt": "The soup", "responses": [" was hot.", " was cold."], "comparisons": [{"winner": 1, "loser": 0}]},
    ]
    encoder = text_encoder(tokenizer, "The film")
    source = written(tmp_path / "t.jsonl", rows)
    trees, line = texts_of_source(source, [], encoder, (40, 40), 0)
    assert trees == [encoder.encode("The soup", [" was cold."], 40).tree]
    assert line.endswith("left out: 1 without a preferred response")
    read = [PreferenceRow("a", "The film", [" was good.", " was bad."], [])]
    with pytest.raises(DataError, match="no training prompt has a preferred response"):
        imitated_texts(read, "preferred", encoder, 40, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": " "}], "no text is left"),
        ([{"question": "a"}], "the columns are"),
        ([{"text": "a"}, {"text": 3}], "line 2"),
        ([{"prompt": "a", "completion": ["b"]}], "line 1"),
        ([{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}], "assistant"),
        ([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}], "the prompt is chat messages"),
    ],
)
def test_wrong_sources_name_the_place(rows: list[dict[str, Any]], message: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        texts_of_source(written(tmp_path / "t.jsonl", rows), [], text_encoder(tokenizer, "x"), (9, 9), 0)
    assert "t.jsonl" in str(caught.value)
