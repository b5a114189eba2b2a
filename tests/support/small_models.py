"""Small random models, and what the engine must give for them: one response at a time, by the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from toolkit.engine.engine import Engine
from toolkit.models.encoding import Tree

Trees = Callable[..., list[Tree]]


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,  # large, so that what a model does differently moves the result by nats
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(config: Any, cls: Any = AutoModelForCausalLM.from_config, **more: Any) -> Any:
    torch.manual_seed(0)
    return cls(config, **more).eval()


def llama(**more: Any) -> Any:
    return random_model(LlamaConfig(**SMALL, **more))


def classifier(**more: Any) -> Any:
    return random_model(LlamaConfig(**(SMALL | {"num_labels": 1} | more)), LlamaForSequenceClassification)


def engine(model: Any, **more: Any) -> Engine:
    return Engine(model, 0, dtype=torch.float32, **more)


def oracle(model: Any, trees: Sequence[Tree], temperature: float = 1.0) -> list[list[torch.Tensor]]:
    """One response at a time, without padding, mask or positions, through the model's own head; softmax in fp64."""
    return [[one_response(model, tree.prompt_ids, ids, temperature)[0] for ids in tree.response_ids] for tree in trees]


def one_response(
    model: Any, prompt: list[int], ids: list[int], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    log_p = (logits.double() / temperature).log_softmax(-1)
    return log_p.gather(1, torch.tensor(ids)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def score_oracle(model: Any, trees: Sequence[Tree]) -> list[list[float]]:
    return [
        [model(input_ids=torch.tensor([tree.prompt_ids + ids])).logits.item() for ids in tree.response_ids]
        for tree in trees
    ]


def assert_same(ours: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]], tolerance: float = 1e-4) -> None:
    assert [len(row) for row in ours] == [len(row) for row in expected]
    for row, expected_row in zip(ours, expected, strict=True):
        for a, b in zip(row, expected_row, strict=True):
            a, b = torch.as_tensor(a).double(), torch.as_tensor(b).detach().double()
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
            assert abs(float(a.sum() - b.sum())) < 5 * tolerance


def loss_of(logps_N: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Weighs every response and token differently, so that a mix-up shows."""
    weights = torch.linspace(-1, 1, logps_N.numel(), dtype=logps_N.dtype) * (1 + owner)
    return (weights * logps_N).sum()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys() and ours
    for name, gradient in ours.items():
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 1e-3, name


def adapter(model: Any, **more: Any) -> PeftModel:
    """A LoRA adapter that changes the model at once."""
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    wrapped = get_peft_model(model, LoraConfig(**(config | more))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    return wrapped


def save_bert(folder: Path, words: Iterable[str], *, positions: int) -> Path:
    """Write a BERT with random weights and a vocabulary of these words, and return its folder."""
    folder.mkdir(exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=positions, initializer_range=0.5, **shape)
    random_model(config, BertModel).save_pretrained(folder)
    return folder
