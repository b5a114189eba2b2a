"""The tree batch gives what one unpadded forward pass per response gives, however it is packed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
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
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from toolkit.engine.engine import Engine
from toolkit.engine.fast.attention import GROUPED_QUERY
from toolkit.engine.logps import LOGIT_ROWS, SOFTMAX_ROWS, branch_scores, by_response, token_logps
from toolkit.engine.tree import Pieces, batches, pack
from toolkit.models.encoding import Tree

pytestmark = pytest.mark.invariant

# ---------------------------------------------------------------- packing


def test_the_layout_by_hand() -> None:
    batch = pack([Tree([5, 6], [[7, 2], [8]]), Tree([9], [[3]])], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2, 8], [9, 3, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert batch.predictor.tolist() == [1, 2, 1, 5]
    assert batch.target.tolist() == [7, 2, 8, 3]
    assert batch.owner.tolist() == [0, 0, 1, 2]
    assert batch.last.tolist() == [3, 4, 6]
    assert batch.tree.tolist() == [0, 0, 1]
    assert batch.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert (batch.n_responses, batch.n_tokens) == (3, 10)
    assert by_response(torch.tensor([1.0, 2.0, 4.0, 8.0]), batch).tolist() == [3.0, 4.0, 8.0]


def test_short_trees_share_a_row() -> None:
    batch = pack([Tree([4], [[2]]), Tree([5, 6], [[7, 2], [8]]), Tree([9, 3], [[1]])], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2, 8], [9, 3, 1, 4, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 0, 1]]
    assert batch.predictor.tolist() == [8, 1, 2, 1, 6]
    assert batch.target.tolist() == [2, 7, 2, 8, 1]
    assert batch.owner.tolist() == [0, 1, 1, 2, 3]
    assert batch.last.tolist() == [9, 3, 4, 7]
    assert batch.tree.tolist() == [0, 1, 1, 2]
    assert batch.attention_mask[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_the_layout_without_padding_by_hand() -> None:
    trees = [Tree([5, 6], [[7, 2], [8]]), Tree([9], [[3]])]
    batch, padded = pack(trees, pad_id=0, padding=False), pack(trees, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2, 8, 9, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert (batch.predictor.tolist(), batch.last.tolist()) == ([1, 2, 1, 5], [3, 4, 6])
    assert batch.padding_map is not None and batch.padding_map.place_of_token.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.padding_map.token_of_place.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6, 6]
    assert torch.equal(batch.attention_mask, padded.attention_mask)
    assert all(torch.equal(getattr(batch, n), getattr(padded, n)) for n in ("target", "owner", "tree"))
    assert pack(trees[:1], pad_id=0, padding=False).padding_map is None  # there is no padding


def test_a_row_for_each_response_by_hand() -> None:
    batch = pack([Tree([5, 6], [[7, 2], [8]])], pad_id=0, row_per_response=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [5, 6, 8, 0]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, True, False]]
    assert (batch.predictor.tolist(), batch.last.tolist(), batch.tree.tolist()) == ([1, 2, 5], [3, 6], [0, 0])


def test_the_layout_without_last_tokens_by_hand() -> None:
    """A last token is predicted, and nothing from it; what is predicted, and its order, stay."""
    trees = [Tree([5, 6], [[7, 2], [8]]), Tree([9], [[3, 4, 1]])]
    batch, whole = pack(trees, pad_id=0, last_tokens=False), pack(trees, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [9, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.predictor.tolist() == [1, 2, 1, 3, 4, 5]
    assert batch.last is None and batch.n_responses == 3
    assert all(torch.equal(getattr(batch, name), getattr(whole, name)) for name in ("target", "owner", "tree"))
    assert batch.attention_mask[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    flat = pack([Tree([5], [[8], [3]]), *trees], pad_id=0, last_tokens=False, padding=False)
    assert flat.input_ids.tolist() == [[5, 6, 7, 9, 3, 4, 5]]
    assert flat.predictor.tolist() == [6, 6, 1, 2, 1, 3, 4, 5]
    assert pack(trees, pad_id=0, row_per_response=True, last_tokens=False).input_ids.tolist() == [
        [5, 6, 7],
        [5, 6, 0],
        [9, 3, 4],
    ]


def test_rewards_alone_need_the_last_tokens(make_trees: Trees) -> None:
    trees = make_trees(4, 64, k=3)
    policy, reward = engine(llama()).pack(trees), engine(classifier()).pack(trees)
    assert policy.last is None and reward.last is not None
    assert policy.attention_mask.sum() < reward.attention_mask.sum()


@pytest.mark.parametrize("layout", ["padded", "unpadded", "row_per_response"])
def test_responses_of_a_single_token(layout: str) -> None:
    """As judges and classifiers give them: a tree is no more than its prompt."""
    trees = [Tree([5, 6, 7], [[8], [9]]), Tree([4], [[3]]), Tree([11, 12], [[13], [14, 15]])]
    model = random_model(LlamaConfig(**SMALL), attn_implementation=GROUPED_QUERY if layout == "unpadded" else "eager")
    scorer = engine(model)
    scorer.row_per_response, scorer.padding, scorer.probed = layout == "row_per_response", layout != "unpadded", 100
    assert_same(scorer.logps(trees), oracle(model, trees))


@pytest.mark.parametrize("tree", [Tree([], [[1]]), Tree([1], [[2], []])])
def test_nothing_to_predict_is_refused(tree: Tree) -> None:
    with pytest.raises(ValueError, match="at least one"):
        pack([tree], 0)


def test_batches_hold_each_tree_once_within_the_budget(make_trees: Trees) -> None:
    trees = make_trees(30)
    for budget, rows_apart, last_tokens in product((1, 60, 100, 10_000), (False, True), (False, True)):
        packed = list(batches(trees, budget, row_per_response=rows_apart, last_tokens=last_tokens))
        assert sorted(i for part in packed for i in part) == list(range(30))
        for part in packed:
            batch = pack([trees[i] for i in sorted(part)], 0, row_per_response=rows_apart, last_tokens=last_tokens)
            # One tree, or one row of them, may take more.
            assert batch.n_tokens <= budget or (len(part) == 1 if rows_apart else len(batch.input_ids) == 1)
    filled = sum(map(len, trees)) / sum(pack([trees[i] for i in part], 0).n_tokens for part in batches(trees, 100))
    assert filled > 0.95


@pytest.mark.parametrize(("prompt", "lengths"), [(25, [40] * 13), (1, [5] * 60), (400, [30] * 6), (30, [300, 2, 2, 2])])
def test_narrower_trees_keep_the_responses_in_order_and_cost_what_the_best_number_of_them_costs(
    prompt: int, lengths: list[int]
) -> None:
    limit = 700
    tree = Tree([1] * prompt, [[2 + k] * n for k, n in enumerate(lengths)])
    narrower = list(Pieces([tree], limit))
    assert [ids for piece in narrower for ids in piece.response_ids] == tree.response_ids
    assert all(piece.prompt_ids == tree.prompt_ids and piece.response_ids for piece in narrower)

    def cost(rows: Sequence[int]) -> float:
        return sum(width + width**2 / limit for width in rows)

    even = [cost([prompt + sum(lengths) / n] * n) for n in range(1, len(lengths) + 1)]
    assert cost([len(piece) for piece in narrower]) < 1.15 * max(min(even), cost([prompt + max(lengths)]))


def test_a_wide_tree_gives_the_same_numbers_as_several(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trees = [
        Tree([9, 8, 7], [[(7 * k + i) % 90 + 3 for i in range(3 + k % 5)] for k in range(40)]),
        Tree([5], [[6, 7]]),
    ]
    packed: list[int] = []
    steps: list[int] = []
    scorer = engine(tiny)
    take = scorer.pack
    monkeypatch.setattr(scorer, "pack", lambda parts, **layout: packed.extend(map(len, parts)) or take(parts, **layout))
    logps = scorer.logps(trees, advance=steps.append)
    assert len(packed) > 3 and max(packed) < len(trees[0])
    assert sum(steps) == sum(len(tree.response_ids) for tree in trees)
    assert_same(logps, oracle(tiny, trees))


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tiny_log_probabilities(tiny: Any, make_trees: Trees, temperature: float) -> None:
    trees = make_trees(6, seed=1)
    scorer = engine(tiny)
    assert_same(scorer.logps(trees, temperature=temperature), oracle(tiny, trees, temperature))
    assert scorer.row_per_response is False


def test_trained_log_probabilities(stories: Any, make_trees: Trees) -> None:
    trees = make_trees(6, seed=2, longest=60)
    scorer = engine(stories)
    assert_same(scorer.logps(trees), oracle(stories, trees))
    assert scorer.row_per_response is False


def test_eager_attention_and_one_long_response_beside_short_ones(make_trees: Trees) -> None:
    model = random_model(LlamaConfig(**SMALL), attn_implementation="eager")
    trees = [Tree([5], [[2], list(range(3, 60)), [7, 2]]), *make_trees(3, 64)]
    assert_same(engine(model).logps(trees), oracle(model, trees))


def test_scores(make_trees: Trees) -> None:
    model, trees = classifier(), make_trees(5, 64)
    scorer = engine(model)
    assert_same(scorer.scores(trees), score_oracle(model, trees))
    assert scorer.row_per_response is False


@pytest.mark.parametrize("budget", [1, 40, 97, 100_000])
def test_the_token_budget_changes_nothing(tiny: Any, make_trees: Trees, budget: int) -> None:
    trees = make_trees(9, seed=3)
    assert_same(engine(tiny, token_budget=budget).logps(trees), engine(tiny).logps(trees), 3e-5)


def test_the_order_of_trees_changes_nothing(tiny: Any, make_trees: Trees) -> None:
    trees = make_trees(9, seed=4)
    order = [4, 8, 0, 2, 6, 1, 3, 7, 5]
    there = engine(tiny, token_budget=90).logps([trees[i] for i in order])
    here = engine(tiny, token_budget=90).logps(trees)
    assert_same(there, [here[i] for i in order], 3e-5)


def test_siblings_change_nothing(tiny: Any, make_trees: Trees) -> None:
    """K responses together, alone, in another order, and beside copies of themselves."""
    [tree] = make_trees(1, seed=5, k=4)
    [together] = engine(tiny).logps([tree])
    alone = engine(tiny).logps([Tree(tree.prompt_ids, [ids]) for ids in tree.response_ids])
    [turned] = engine(tiny).logps([Tree(tree.prompt_ids, tree.response_ids[::-1])])
    [doubled] = engine(tiny).logps([Tree(tree.prompt_ids, [ids for ids in tree.response_ids for _ in range(2)])])
    assert_same([together], [[row[0] for row in alone]], 3e-5)
    assert_same([together], [turned[::-1]], 3e-5)
    assert_same([together], [doubled[::2]], 3e-5)
    assert_same([together], [doubled[1::2]], 3e-5)


def test_siblings_change_no_score(make_trees: Trees) -> None:
    [tree] = make_trees(1, 64, seed=5, k=4)
    model = classifier()
    alone = engine(model).scores([Tree(tree.prompt_ids, [ids]) for ids in tree.response_ids])
    assert_same(engine(model).scores([tree]), [[row[0] for row in alone]], 3e-5)


def test_the_padding_id_changes_nothing(tiny: Any, make_trees: Trees) -> None:
    trees = make_trees(4, seed=6)
    results = []
    for pad_id in (0, 2, 77):
        scorer = Engine(tiny, pad_id, dtype=torch.float32)
        results.append(scorer.logps(trees))
    assert_same(results[0], results[1], 3e-5)
    assert_same(results[0], results[2], 3e-5)


def test_bf16_stays_near(tiny: Any, make_trees: Trees) -> None:
    trees = make_trees(4, seed=7)
    scorer = Engine(tiny, 0, dtype=torch.bfloat16)
    logps = scorer.logps(trees)
    assert scorer.row_per_response is False
    assert all(values.dtype == torch.float32 for row in logps for values in row)
    assert_same(logps, oracle(tiny, trees), 0.2)


def test_an_adapter_counts(make_trees: Trees) -> None:
    model = get_peft_model(
        llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    trees = make_trees(4, 64)
    with_adapter = engine(model).logps(trees)
    assert_same(with_adapter, oracle(model, trees))
    with model.disable_adapter():
        without = engine(model).logps(trees)
        assert_same(without, oracle(model, trees))
    assert abs(float(with_adapter[0][0].sum() - without[0][0].sum())) > 0.1


# ---------------------------------------------------------------- gradients, chunks, entropy


SHAPES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "gemma2": lambda: random_model(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=3.0)),
    "granite": lambda: random_model(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "cohere": lambda: random_model(CohereConfig(**SMALL, logit_scale=0.25)),
}


@pytest.mark.parametrize("rows", [1024, 3, 1])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained-head", "frozen-head"])
@pytest.mark.parametrize("name", ["llama", "granite", "cohere", "gemma2"])
def test_gradients_equal_those_of_plain_passes(
    make_trees: Trees, monkeypatch: pytest.MonkeyPatch, name: str, frozen: bool, rows: int
) -> None:
    """In chunks of logits: computed again in the backward pass where the head trains, and not at all where it does
    not."""
    monkeypatch.setitem(LOGIT_ROWS, "cpu", rows)
    monkeypatch.setitem(SOFTMAX_ROWS, "cpu", min(rows, 2))
    model, trees = SHAPES[name](), make_trees(3, 64, seed=8)
    model.get_output_embeddings().requires_grad_(not frozen)
    batch = engine(model).pack(trees)
    logps_N, entropy = token_logps(model, batch, temperature=0.8, with_entropy=True)
    loss_of(logps_N, batch.owner).backward()
    tree_gradients = gradients(model)
    pairs = [one_response(model, tree.prompt_ids, ids, 0.8) for tree in trees for ids in tree.response_ids]
    expected = torch.cat([logps for logps, _ in pairs])
    loss_of(expected, batch.owner).backward()
    assert_same_gradients(tree_gradients, gradients(model))
    assert_same([[logps_N.detach()]], [[expected]])
    assert entropy is not None and not entropy.requires_grad
    assert_same([[entropy]], [[torch.cat([entropies for _, entropies in pairs])]])


@pytest.mark.parametrize("frozen", [False, True], ids=["trained-head", "frozen-head"])
def test_chunks_of_logits_are_not_kept(make_trees: Trees, monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    monkeypatch.setitem(LOGIT_ROWS, "cpu", 2)
    model = random_model(LlamaConfig(**(SMALL | {"vocab_size": 70})))  # no other width is 70
    model.get_output_embeddings().requires_grad_(not frozen)
    batch = pack(make_trees(2, 64), 0)
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    saved: list[weakref.ref[torch.Tensor]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps, _ = token_logps(model, batch)
    alive = [tensor for reference in saved if (tensor := reference()) is not None]
    assert alive and not [tensor.shape for tensor in alive if tensor.shape[-1:] == (70,) and tensor.shape[0] != 32]
    forward = len(calls)
    assert max(calls) <= 2 and sum(calls) == batch.target.numel()
    logps.sum().backward()
    assert len(calls) == forward if frozen else 2 * forward
    calls.clear()
    with torch.no_grad():
        token_logps(model, batch)
    assert len(calls) == forward


def test_gradients_of_scores_equal_those_of_plain_passes(make_trees: Trees) -> None:
    model, trees = classifier(), make_trees(3, 64, seed=9)
    batch = engine(model).pack(trees)
    scores_R = branch_scores(model, batch)
    weights_R = torch.linspace(-1, 2, scores_R.numel())
    (weights_R * scores_R).sum().backward()
    tree_gradients = gradients(model)
    one_by_one = [
        model(input_ids=torch.tensor([tree.prompt_ids + ids])).logits[0, 0]
        for tree in trees
        for ids in tree.response_ids
    ]
    (weights_R * torch.stack(one_by_one)).sum().backward()
    assert_same_gradients(tree_gradients, gradients(model))


def test_entropy_lies_between_zero_and_log_of_the_vocabulary(tiny: Any, make_trees: Trees) -> None:
    scorer = engine(tiny)
    batch = scorer.pack(make_trees(6, seed=10))
    _, hot = scorer.token_logps(batch, temperature=100.0, with_entropy=True)
    _, cold = scorer.token_logps(batch, temperature=1e-3, with_entropy=True)
    assert hot is not None and cold is not None
    limit = torch.tensor(float(tiny.config.vocab_size)).log()
    for entropy in (hot, cold):
        assert bool((entropy >= 0).all()) and bool((entropy <= limit + 1e-4).all())
    assert bool((hot > 0.99 * limit).all())
    assert float(cold.mean()) < 0.05


# ---------------------------------------------------------------- heads that scale or cap their logits


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=3.0),
        GraniteConfig(**SMALL, logits_scaling=4.0),
        CohereConfig(**SMALL, logit_scale=0.25),
    ],
    ids=lambda config: config.model_type,
)
def test_scaled_and_capped_logits(config: Any, make_trees: Trees) -> None:
    model, trees = random_model(config), make_trees(4, 64)
    scorer = engine(model)
    assert_same(scorer.logps(trees), oracle(model, trees))
    assert scorer.row_per_response is False  # so it is the engine's reading of the head that is right


@pytest.mark.parametrize(
    "config",
    [GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)],
    ids=lambda config: config.model_type,
)
def test_learned_positions(config: Any, make_trees: Trees) -> None:
    model, trees = random_model(config), make_trees(4, 64)
    assert_same(engine(model).logps(trees), oracle(model, trees))


# ---------------------------------------------------------------- with and without padding


def test_grouped_attention_sees_no_padding(make_trees: Trees) -> None:
    """Where the model takes our attention; and a batch goes on to a model that takes another."""
    model = random_model(LlamaConfig(**SMALL), attn_implementation=GROUPED_QUERY)
    trees = make_trees(5, 64, k=3)
    scorer, other = engine(model), engine(llama())
    batch = scorer.pack(trees)
    assert batch.padding_map is not None and batch.n_tokens == sum(
        len(tree.inputs(last_tokens=False)) for tree in trees
    )
    assert scorer.adopt(batch) is batch
    assert_same(scorer.logps(trees), oracle(model, trees))
    passed_on = other.adopt(batch)
    assert passed_on.padding_map is None and passed_on.attention_mask.dim() == 4 and passed_on.last is None
    torch.testing.assert_close(other.token_logps(passed_on)[0], scorer.token_logps(batch)[0], rtol=0, atol=1e-4)
    assert other.padding and not scorer.padding


def test_scores_without_padding(make_trees: Trees) -> None:
    model, trees = classifier(), make_trees(5, 64, k=3)
    model.set_attn_implementation(GROUPED_QUERY)
    scorer = engine(model)
    assert scorer.pack(trees).padding_map is not None
    assert_same(scorer.scores(trees), score_oracle(model, trees))
    with_padding = engine(classifier()).pack(trees)
    assert scorer.adopt(with_padding) is with_padding
    torch.testing.assert_close(scorer.branch_scores(with_padding), scorer.branch_scores(scorer.pack(trees)))


class ForgetfulLlama(LlamaForCausalLM):
    """Hands nothing on to its attention that it does not know."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        whole = self.model.forward
        self.model.forward = lambda *args, padding_map=None, **kwargs: whole(*args, **kwargs)  # type: ignore[method-assign]


def test_a_model_that_loses_the_rows_keeps_its_padding(make_trees: Trees, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(LlamaConfig(**SMALL), ForgetfulLlama)
    model.set_attn_implementation(GROUPED_QUERY)
    scorer, trees = engine(model), make_trees(4, 64, k=2)
    assert_same(scorer.logps(trees), oracle(model, trees))
    assert scorer.padding and scorer.row_per_response is False and caplog.text == ""
