"""Kinds of reward models: ensembles by seed, data and head, averaged weights, heads of annotators, other bases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.comparisons import batch_of, examples
from support.running import SMALL
from support.small_models import engine, save_bert

from toolkit.engine.reward_model import load_scorer
from toolkit.errors import ModelError, RecipeError
from toolkit.models.encoding import Tree, text_encoder
from toolkit.models.load import load_reward_model, new_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.reward_head import RewardHead, SampleLaw, reward_head
from toolkit.models.tokenizer import load_tokenizer
from toolkit.ppo.assembly import models_of_run
from toolkit.ppo.models import AdapterModels
from toolkit.ppo.rewards import EnsembleScores, Responses
from toolkit.preferences.annotators import annotators_of
from toolkit.preferences.rows import Comparison, PreferenceRow
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe
from toolkit.recipe.training import ModelSection, RewardModelSection
from toolkit.stages import reward_model as stage
from toolkit.stages.contexts import RewardModelContext, context_of
from toolkit.training.reward_model import bradley_terry, examples_by_annotator, members_to_train

FP32 = ModelSection(name="tiny", dtype="float32", lora=None)
FEW = ["reward_model.max_steps=2", "data.max_response_tokens=12"]


def context_with(*sets: str) -> RewardModelContext:
    settings = [setting.removeprefix("--set=") for setting in SMALL]
    context = context_of("reward_model", load_recipe("smoke", [*settings, *FEW, *sets]).recipe)
    assert isinstance(context, RewardModelContext)
    return context


def train(small_run: Path, out: Path, *sets: str) -> tuple[RewardModelContext, dict[str, Any]]:
    context = context_with(*sets)
    inputs = {name: small_run / name for name in ("data", "sft")}
    return context, stage.run(context, inputs, out, Reporter(quiet=True))


def trees_of(small_run: Path, tokenizer: Any) -> list[Tree]:
    rows = from_parquet(small_run / "data" / "eval.parquet")[:4]
    encoder = text_encoder(tokenizer, rows[0].prompt)
    return [encoder.encode(row.prompt, row.responses, 12).tree for row in rows]


@pytest.mark.invariant
@pytest.mark.parametrize("annotated", [False, True])
def test_several_heads_have_the_losses_of_single_ones(tiny_ref: Any, make_trees: Any, annotated: bool) -> None:
    """All heads train on all comparisons, by the mean of their losses; that of an annotator on the annotator's own."""
    model = new_reward_model(tiny_ref, FP32, pad_token_id=0, seed=1, n_outputs=3).eval()
    chosen = examples(make_trees)
    outputs = [tuple(i % 3 for i in range(len(example.pairs))) for example in chosen]
    if annotated:
        chosen = [replace(example, outputs=numbers) for example, numbers in zip(chosen, outputs, strict=True)]
    scorer = engine(model)
    loss, _ = bradley_terry(scorer, 0.01, batch_of(scorer, list(enumerate(chosen))))
    total = torch.zeros(())
    for example, numbers in zip(chosen, outputs, strict=True):
        prompt = example.tree.prompt_ids
        r = [model(input_ids=torch.tensor([prompt + ids])).logits[0] for ids in example.tree.response_ids]
        weight_sum = sum(w for *_, w in example.pairs)
        for (i, j, p, weight), number in zip(example.pairs, numbers, strict=True):
            margins, sums = r[i] - r[j], r[i] + r[j]
            terms = -p * torch.log(torch.sigmoid(margins)) - (1 - p) * torch.log(torch.sigmoid(-margins))
            terms = terms + 0.01 * sums**2
            total = total + weight / weight_sum / len(chosen) * (terms[number] if annotated else terms.mean())
    assert loss.item() == pytest.approx(total.item(), abs=1e-5)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "sets",
    [
        ("reward_model.differ_by=seed", "reward_model.combine=uwo", "model.lora={r: 2, alpha: 4}"),
        ("reward_model.differ_by=data", "reward_model.combine=wco"),
        ("reward_model.differ_by=head", "reward_model.combine=uwo", "model.lora={r: 2, alpha: 4}"),
    ],
)
def test_an_ensemble_is_its_members_combined(small_run: Path, tmp_path: Path, sets: tuple[str, ...]) -> None:
    """One pass over the folder gives what each member gives by itself, combined by hand; and a rerun trains nothing."""
    context, took = train(small_run, tmp_path, "reward_model.members=2", *sets)
    folder = tmp_path / "model"
    ref, head = resolve(str(folder)), reward_head(folder)
    tokenizer = load_tokenizer(ref)
    trees = trees_of(small_run, tokenizer)
    whole = load_scorer(ref, context.model, tokenizer)
    if head.members:
        alone = [load_reward_model(resolve(str(folder / name)), context.model) for name in head.members]
        columns = [engine(model).scores(trees) for model in alone]
        outputs = [np.stack(of_tree, axis=1) for of_tree in zip(*columns, strict=True)]
        assert abs(np.concatenate(outputs)[:, 0] - np.concatenate(outputs)[:, 1]).max() > 1e-3
    else:
        model = load_reward_model(ref, context.model)
        outputs = [np.array(of_tree) for of_tree in engine(model).outputs(trees)]
    scores = whole.scores(trees)
    for values, of_tree in zip(outputs, scores, strict=True):
        a, b = (values - np.array(head.means)).T
        by_hand = np.minimum(a, b) if head.combine == "wco" else (a + b) / 2 - 0.5 * ((a - b) / 2) ** 2
        np.testing.assert_allclose(of_tree, by_hand - head.mean, atol=1e-4)
    assert head.samples == SampleLaw(1.0, 12) and took["response_tokens_trained"] > 0
    if head.members:
        assert len(took["members"]) == 2
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
        _, again = train(small_run, tmp_path, "reward_model.members=2", *sets)
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
        assert again == took and reward_head(folder) == head
        if "model.lora={r: 2, alpha: 4}" in sets:
            check_ppo(small_run, folder, context, trees, scores)


def check_ppo(small_run: Path, folder: Path, context: RewardModelContext, trees: list[Tree], scores: Any) -> None:
    """PPO scores with the members as adapters on the policy's base, and tells how far they disagree."""
    sft = resolve(str(small_run / "sft" / "model"))
    tokenizer = load_tokenizer(sft)
    models, reward = models_of_run(sft, resolve(str(folder)), context.model, tokenizer, value_head_init="reward_model")
    assert isinstance(models, AdapterModels) and len(models.reward_heads) == 2
    n = [len(tree.response_ids) for tree in trees]
    responses = Responses(["p" for k in n for _ in range(k)], [""] * sum(n), [False] * sum(n), trees)
    given = reward(responses)
    assert isinstance(given, EnsembleScores) and min(given.disagreement) > 0
    np.testing.assert_allclose(given, [score for of_tree in scores for score in of_tree], atol=1e-4)


@pytest.mark.e2e
@pytest.mark.parametrize("lora", ["null", "{r: 2, alpha: 4}"])
def test_averaged_weights_are_the_mean_of_the_members(small_run: Path, tmp_path: Path, lora: str) -> None:
    sets = ("reward_model.members=3", "reward_model.combine=average_weights", f"model.lora={lora}")
    context, took = train(small_run, tmp_path, *sets)

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        model: Any = load_reward_model(resolve(str(folder)), context.model, dtype=torch.float32)
        return dict((model.merge_and_unload() if lora != "null" else model).state_dict())

    members = [weights(tmp_path / "trainer" / f"member-{number}" / "model") for number in range(3)]
    for name, weight in weights(tmp_path / "model").items():
        if weight.is_floating_point():
            mean = torch.stack([member[name] for member in members]).mean(0)
            torch.testing.assert_close(weight, mean, rtol=0, atol=2e-6)
    assert any(bool((members[0][name] != members[1][name]).any()) for name in members[0])
    # Its centring is its own: samples of SFT have a mean of 0 under it.
    head = reward_head(tmp_path / "model")
    assert head.n_outputs == 1 and head.samples is not None and head.mean != 0.0
    # A stage that was killed after its members were trained goes on from them.
    (tmp_path / "model" / "reward_head.json").unlink()
    assert train(small_run, tmp_path, *sets)[1] == took and reward_head(tmp_path / "model") == head


@pytest.fixture
def encoder_folder(tmp_path: Path, small_run: Path) -> Path:
    """A BERT with random weights and a vocabulary of the data's words."""
    rows = from_parquet(small_run / "data" / "train.parquet")
    words = sorted({word for row in rows for text in (row.prompt, *row.responses) for word in str(text).split()})
    return save_bert(tmp_path / "bert", words, positions=128)


@pytest.mark.e2e
@pytest.mark.parametrize("lora", ["null", "{r: 2, alpha: 4}"])
def test_an_encoder_reads_prompt_and_response_as_a_pair(
    small_run: Path, tmp_path: Path, encoder_folder: Path, lora: str
) -> None:
    context, _ = train(small_run, tmp_path, f"reward_model.base={encoder_folder}", f"model.lora={lora}")
    ref = resolve(str(tmp_path / "model"))
    tokenizer = load_tokenizer(ref)
    [row, *_] = from_parquet(small_run / "data" / "eval.parquet")
    encoder = text_encoder(tokenizer, row.prompt, pair=True)
    scorer = load_scorer(ref, context.model, tokenizer)
    assert scorer.reads_pairs
    ours = scorer.scores([encoder.encode(row.prompt, row.responses, 100).tree])[0]
    model: Any = load_reward_model(ref, context.model)
    with torch.no_grad():
        theirs = [
            model(**tokenizer(str(row.prompt), text, return_tensors="pt")).logits.item() - scorer.head.mean
            for text in row.responses
        ]
    assert ours == pytest.approx(theirs, abs=1e-4)
    # PPO reads the policy's text in the encoder's tokens, and cuts what goes beyond its positions.
    sft = resolve(str(small_run / "sft" / "model"))
    models, reward = models_of_run(sft, ref, context.model, load_tokenizer(sft), value_head_init="reward_model")
    n, long = len(row.responses), "good " * 500
    given = reward(
        Responses([row.prompt] * (n + 1), [*row.responses, long], [False] * (n + 1), [Tree([5], [[6]] * (n + 1))])
    )
    assert list(given)[:n] == pytest.approx(theirs, abs=1e-4) and np.isfinite(given[n])
    assert models.has_critic


@pytest.mark.fault
def test_an_encoder_with_too_few_positions_is_refused(small_run: Path, tmp_path: Path, encoder_folder: Path) -> None:
    save_bert(encoder_folder, ["Soup"], positions=8)
    with pytest.raises(RecipeError, match=r"than .* has positions \(8\)"):
        train(small_run, tmp_path, f"reward_model.base={encoder_folder}", "model.lora=null")


def judged(*annotators: str) -> PreferenceRow:
    return PreferenceRow("p", "q", ["a", "b"], [Comparison(0, 1, annotator=name) for name in annotators])


@pytest.mark.fault
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([judged("x", "")], "1 of 2 comparisons name no annotator"),
        ([judged("x"), judged("x")], "one annotator compared all responses, 'x'"),
        ([judged("x"), judged("y")], "no pair of responses has the comparisons of two of the 2 annotators"),
    ],
)
def test_rows_that_cannot_train_a_head_for_each_annotator(rows: list[PreferenceRow], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        annotators_of(rows)


def test_each_annotators_comparisons_train_their_head(tokenizer: Any) -> None:
    rows = [
        PreferenceRow(
            "p",
            "q",
            ["a", "b"],
            [Comparison(0, 1, annotator="x"), Comparison(1, 0, annotator="y"), Comparison(0, 1, annotator="y")],
        )
    ]
    encoder = text_encoder(tokenizer, "q")
    [example] = examples_by_annotator(rows, ["x", "y"], encoder, 8)
    assert example.pairs == [(0, 1, 1.0, 1.0), (0, 1, 0.5, 2.0)] and example.outputs == (0, 1)
    section = RewardModelSection(annotators="heads", annotator="y")
    [member], head = members_to_train(section, rows, encoder, 8, 0)
    assert member.n_outputs == 2 and head.outputs == ["x", "y"]
    np.testing.assert_allclose(head.scores([[1.0, 3.0]]), [3.0])
    with pytest.raises(RecipeError, match="no annotator 'z'"):
        members_to_train(section.model_copy(update={"annotator": "z"}), rows, encoder, 8, 0)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["members=2", "trainer=trl"], "TRL's trainer trains one score"),
        (["members=2", "annotators=heads"], "a member for each annotator already"),
        (["combine=uwo"], "one member leaves nothing to combine"),
        (["members=2", "combine=average_weights", "differ_by=head"], "no weights to average"),
        (["annotator=x"], "a pooled reward model has no head of an annotator"),
    ],
)
def test_kinds_that_exclude_each_other(sets: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("smoke", [f"reward_model.{each}" for each in sets])


def test_ppo_against_an_ensemble_that_nobody_trains() -> None:
    assert load_recipe("smoke", ["ppo.reward=ensemble", "reward_model.members=2"]).recipe.ppo.reward == "ensemble"
    with pytest.raises(RecipeError, match="the reward model has one output"):
        load_recipe("smoke", ["ppo.reward=ensemble"])


@pytest.mark.fault
def test_a_damaged_ensemble_is_named(tmp_path: Path) -> None:
    RewardHead(outputs=["member-0", "member-1"], members=["member-0", "member-1"]).write(tmp_path)
    with pytest.raises(ModelError, match="lacks its member 'member-0'"):
        resolve(str(tmp_path))
    for values, message in (
        ('{"mean": 0, "outputs": ["a"], "means": [1, 2]}', "one for each output"),
        ('{"mean": 0, "members": ["../x"], "outputs": ["../x"]}', "folders beside it"),
        ('{"mean": 0, "combine": "median"}', "no combination 'median'"),
        ('{"mean": 0, "annotator": "z", "outputs": ["a", "b"]}', "no output 'z'"),
    ):
        (tmp_path / "reward_head.json").write_text(values, encoding="utf-8")
        with pytest.raises(ModelError, match=message):
            reward_head(tmp_path)
