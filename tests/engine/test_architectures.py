"""Models that cannot take a tree, or only so far: what happens instead, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.small_models import (
    SMALL,
    Trees,
    assert_same,
    assert_same_gradients,
    classifier,
    engine,
    gradients,
    llama,
    loss_of,
    one_response,
    oracle,
    random_model,
    score_oracle,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    FalconH1Config,
    GPT2Config,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from toolkit.engine.engine import Engine
from toolkit.errors import ModelError
from toolkit.models.encoding import Tree
from toolkit.models.inspect import learned_positions, other_layers

pytestmark = pytest.mark.invariant

# ---------------------------------------------------------------- models that cannot take the mask


class DeafLlama(LlamaForCausalLM):
    """Reads a row from left to right and ignores a block mask, as a recurrent model would."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        whole = self.model.forward

        def forward(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
            if attention_mask is not None and attention_mask.dim() == 4:
                attention_mask = None
            return whole(*args, attention_mask=attention_mask, **kwargs)

        self.model.forward = forward  # type: ignore[method-assign]


FallsBack = Callable[[Any, list[Tree]], None]


@pytest.fixture
def assert_falls_back(caplog: pytest.LogCaptureFixture) -> FallsBack:
    def check(model: Any, trees: list[Tree]) -> None:
        scorer = engine(model, token_budget=80)
        logps = scorer.logps(trees)
        assert scorer.row_per_response is True
        assert_same(logps, oracle(model, trees))
        scorer.logps(trees[:1])
        assert caplog.text.count("does not take the tree mask") == 1  # it is said once

    return check


@pytest.mark.parametrize("k", [1, 3])
def test_a_model_that_ignores_the_mask_falls_back(make_trees: Trees, assert_falls_back: FallsBack, k: int) -> None:
    assert_falls_back(random_model(LlamaConfig(**SMALL), DeafLlama), make_trees(4, 64, k=k, shortest=3))


def test_a_sliding_window_that_bites_falls_back(make_trees: Trees, assert_falls_back: FallsBack) -> None:
    assert_falls_back(random_model(MistralConfig(**SMALL, sliding_window=4)), make_trees(4, 64, shortest=4))


def test_a_sliding_window_that_bites_only_the_longer_trees(make_trees: Trees) -> None:
    """A first, short tree must not decide for the long ones."""
    model = random_model(MistralConfig(**SMALL, sliding_window=16))
    trees = [Tree([5, 6], [[7, 8], [9, 2]]), *make_trees(4, 64, shortest=14, longest=30)]
    assert_same(engine(model).logps(trees), oracle(model, trees))


def test_a_window_that_moves_too_little_for_the_probe(make_trees: Trees, caplog: pytest.LogCaptureFixture) -> None:
    """What lies before a window may be worth less than the probe's limit: the configuration knows about the window."""
    model = random_model(MistralConfig(**SMALL, sliding_window=8))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-4)
    engine(model).pack(make_trees(4, 64, shortest=8))
    assert "a window of 8 tokens, and a response ends at" in caplog.text
    unused = Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=8)
    scorer = engine(random_model(unused))
    scorer.pack(make_trees(4, 64, shortest=8))
    assert scorer.row_per_response is False


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert", "roberta"])
def test_a_response_beyond_the_positions_is_refused(kind: str) -> None:
    """The limit is found by trying: the first length that the model itself cannot read."""
    shape = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "pad_token_id": 1}
    if kind == "gpt2":
        model = random_model(GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    elif kind == "opt":
        model = random_model(OPTConfig(**shape, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=16))
    else:
        config = (BertConfig if kind == "bert" else RobertaConfig)(
            **shape, intermediate_size=8, max_position_embeddings=16, num_labels=1
        )
        model = random_model(
            config, BertForSequenceClassification if kind == "bert" else RobertaForSequenceClassification
        )

    def reads(n: int) -> bool:
        try:
            with torch.no_grad():
                model(input_ids=torch.full((1, n), 5), attention_mask=torch.ones(1, n, dtype=torch.long))
        except (IndexError, RuntimeError):
            return False
        return True

    longest = next(n for n in range(1, 30) if not reads(n + 1))
    scorer = engine(model)
    run = scorer.scores if scorer.classifier else scorer.logps
    run([Tree([5] * 3, [[6] * (longest - 3)])])
    with pytest.raises(ModelError, match=f"has {longest + 1} tokens, and .* has {longest} positions"):
        run([Tree([5] * 3, [[6] * (longest - 2)])])


def test_rotary_positions_have_no_table() -> None:
    assert learned_positions(random_model(LlamaConfig(**SMALL, max_position_embeddings=16))) is None


def test_rows_of_their_own_ask_for_no_logits_of_the_prompt(make_trees: Trees) -> None:
    model, trees = random_model(LlamaConfig(**SMALL)), make_trees(3, 64, seed=4)
    seen, forward = [], model.lm_head.forward
    model.lm_head.forward = lambda states: seen.append(states.shape[:2].numel()) or forward(states)
    scorer = engine(model)
    scorer.row_per_response = True
    assert_same(scorer.logps(trees), oracle(model, trees))
    assert sum(seen[:1]) < scorer.pack(trees).n_tokens


def test_a_state_space_model_falls_back(make_trees: Trees, assert_falls_back: FallsBack) -> None:
    config = MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, pad_token_id=0, eos_token_id=2, initializer_range=0.3
    )
    assert_falls_back(random_model(config), make_trees(3, 64, shortest=3))


# Layers whose state runs through a row, whatever the mask says. In bf16 it moves a response's mean by less than the
# rounding of an honest model may.
HYBRIDS = {
    "conv": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "linear_attention": GraniteMoeHybridConfig(
        **SMALL,
        layer_types=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
        shared_intermediate_size=64,
    ),
    "hybrid": FalconH1Config(
        **SMALL, mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64, mamba_n_groups=1, mamba_d_state=16
    ),
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_layers_other_than_attention_take_rows_of_their_own(
    kind: str, make_trees: Trees, caplog: pytest.LogCaptureFixture
) -> None:
    """The configuration knows of them. Without it, what other tokens beside a response do tells the probe."""
    model, trees = random_model(HYBRIDS[kind]).bfloat16(), make_trees(3, 64, shortest=20, longest=30)
    scorer = Engine(model, 0, dtype=torch.bfloat16)
    scorer.pack(trees)
    assert scorer.row_per_response is True and f"it has layers of the kind {kind}" in caplog.text
    assert other_layers(model) == f"layers of the kind {kind}"
    scorer.other_layers, scorer.row_per_response = None, None
    scorer.pack(trees)
    assert scorer.row_per_response is True
    assert "other tokens beside a response move it by" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_tokens_beside_a_response_do_not_move_it(make_trees: Trees, dtype: torch.dtype) -> None:
    """Not even where tokens share experts."""
    for config in (LlamaConfig(**SMALL), MixtralConfig(**SMALL, num_local_experts=4, sliding_window=None)):
        scorer = Engine(random_model(config).to(dtype), 0, dtype=dtype)
        scorer.pack(make_trees(3, 64, shortest=20, longest=30))
        assert scorer.row_per_response is False


def test_a_model_that_refuses_the_mask_falls_back(make_trees: Trees, assert_falls_back: FallsBack) -> None:
    """BLOOM builds its position bias from a mask of two dimensions."""
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3, pad_token_id=0)
    assert_falls_back(random_model(config), make_trees(3, 64, shortest=3))


def test_the_fallback_has_the_gradients_of_plain_passes(make_trees: Trees) -> None:
    model, trees = random_model(LlamaConfig(**SMALL), DeafLlama), make_trees(3, 64, seed=8)
    scorer = engine(model)
    batch = scorer.pack(trees)
    assert scorer.row_per_response is True
    logps_N, _ = scorer.token_logps(batch)
    loss_of(logps_N, batch.owner).backward()
    fallback_gradients = gradients(model)
    expected = [one_response(model, tree.prompt_ids, ids, 1.0)[0] for tree in trees for ids in tree.response_ids]
    loss_of(torch.cat(expected), batch.owner).backward()
    assert_same_gradients(fallback_gradients, gradients(model))


def test_an_encoder_reward_model_takes_whole_rows(make_trees: Trees) -> None:
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
        initializer_range=0.3,
    )
    model, trees = random_model(config, BertForSequenceClassification), make_trees(3, 64)
    # Prompt and response are the two texts of a pair, which BERT tells apart by their types.
    expected = [
        [
            model(
                input_ids=torch.tensor([tree.prompt_ids + ids]),
                token_type_ids=torch.tensor([[0] * len(tree.prompt_ids) + [1] * len(ids)]),
            ).logits.item()
            for ids in tree.response_ids
        ]
        for tree in trees
    ]
    assert_same(engine(model).scores(trees), expected)
    other = score_oracle(model, trees)
    assert abs(expected[0][0] - other[0][0]) > 1e-3


@pytest.mark.parametrize("rows_apart", [True, False])
def test_a_reward_is_read_at_the_end_whatever_the_configuration_pads_with(make_trees: Trees, rows_apart: bool) -> None:
    """SmolLM2's configuration pads with the EOS: read from there, a score would be that of the token before it."""
    model, trees = classifier(), make_trees(3, 64)
    trees = [Tree(tree.prompt_ids, [[*ids, 2] for ids in tree.response_ids]) for tree in trees]
    expected = score_oracle(model, trees)
    model.config.pad_token_id = 2
    scorer = engine(model)
    scorer.row_per_response = rows_apart
    assert_same(scorer.scores(trees), expected)


def test_a_head_with_a_bias(make_trees: Trees) -> None:
    model, trees = classifier(), make_trees(3, 64)
    model.score = torch.nn.Linear(32, 1)
    assert_same(engine(model).scores(trees), score_oracle(model, trees))


def test_a_head_of_several_layers_takes_the_models_own_way(make_trees: Trees) -> None:
    model, trees = classifier(), make_trees(3, 64)
    model.score = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    assert_same(engine(model).scores(trees), score_oracle(model, trees))


def test_a_reward_model_whose_configuration_names_no_padding(make_trees: Trees) -> None:
    model, trees = classifier(pad_token_id=None), make_trees(3, 64)
    assert_same(engine(model).scores(trees), score_oracle(model, trees))


@pytest.mark.parametrize(("off_by", "falls_back"), [("one token", False), ("every token", True)])
def test_one_token_off_in_bf16_is_rounding(monkeypatch: pytest.MonkeyPatch, off_by: str, falls_back: bool) -> None:
    scorer = Engine(llama().bfloat16(), 0, dtype=torch.bfloat16)
    whole = Engine._probe_values

    def shifted(self: Engine, batch: Any) -> torch.Tensor:
        values = whole(self, batch).clone()
        if batch.attention_mask.dim() == 4:
            values[slice(7, 8) if off_by == "one token" else slice(None)] += 0.6
        return values

    monkeypatch.setattr(Engine, "_probe_values", shifted)
    scorer.probe([Tree([5, 6], [list(range(3, 43)), [7, 8]])])
    assert scorer.row_per_response is falls_back
