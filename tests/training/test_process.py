"""The loss on labelled steps: by hand, over any split of an optimiser step, and data that teaches nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.small_models import assert_same_gradients, classifier, engine, gradients

from toolkit.engine.process import StepTree
from toolkit.errors import DataError
from toolkit.models.encoding import Tree
from toolkit.preferences.solutions import Solution
from toolkit.recipe.training import Training
from toolkit.training.checkpoints import last_checkpoint
from toolkit.training.process import StepExample, StepTrainer, step_batches, step_examples, step_loss
from toolkit.training.trainer import training_arguments

EXAMPLES = [
    StepExample(Tree([5, 6], [[7, 8, 9], [10, 11]]), (), labels=[(0, 0, True), (0, 2, False), (1, 1, True)]),
    StepExample(Tree([4], [[3, 12]]), (), labels=[(0, 1, False)]),
    StepExample(Tree([9, 8, 7], [[6]]), (), labels=[(0, 0, True)]),
]


def test_the_loss_is_the_mean_cross_entropy_at_the_steps_last_tokens() -> None:
    model = classifier()
    small = engine(model)
    [batch] = step_batches(small, EXAMPLES, 5)
    loss, metrics = step_loss(small, batch)
    losses = []
    for example in EXAMPLES:
        for response, position, right in example.labels:
            ids = [*example.tree.prompt_ids, *example.tree.response_ids[response][: position + 1]]
            states = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            logit = model.score(states)[0]
            losses.append(F.binary_cross_entropy_with_logits(logit, torch.tensor(float(right))))
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert metrics["accuracy"].numel() == 5 and metrics["accuracy_wrong_steps"].numel() == 2


@pytest.mark.invariant
def test_the_gradient_does_not_depend_on_the_split() -> None:
    whole, split = classifier(), classifier()
    split.load_state_dict(whole.state_dict())
    for batch in step_batches(engine(whole), EXAMPLES, 5):
        step_loss(engine(whole), batch)[0].backward()
    small = engine(split, token_budget=4)
    batches = [batch for example in EXAMPLES for batch in step_batches(small, [example], 5)]
    assert len(batches) == 3
    for batch in batches:
        step_loss(small, batch)[0].backward()
    assert_same_gradients(gradients(split), gradients(whole))


def test_examples_have_each_label_once_and_need_both_kinds() -> None:
    solutions = [
        Solution("p", "q", ["a", "b"], [True, None]),
        Solution("p", "q", ["a", "c"], [True, False], n_shared=1),
        Solution("r", "s", ["d"], [None]),
    ]
    trees = [
        StepTree(Tree([1], [[2, 3]]), [0], [[0, 1]]),
        StepTree(Tree([1, 2], [[4]]), [1], [[0]]),
        StepTree(Tree([5], [[6]]), [2], [[0]]),
    ]
    examples = step_examples(trees, solutions)
    assert [list(example.labels) for example in examples] == [[(0, 0, True)], [(0, 0, False)]]
    solutions[1] = replace(solutions[1], labels=[True, True])
    with pytest.raises(DataError, match="not both right and wrong"):
        step_examples(trees, solutions)


@pytest.mark.invariant
def test_a_training_that_has_ended_takes_no_further_step(tmp_path: Path) -> None:
    """Two steps end in the middle of an epoch of three; a kill may come behind the last checkpoint."""
    section = Training(
        learning_rate=1e-2, lr_scheduler_type="constant", per_device_train_batch_size=1, max_steps=2, logging_steps=1
    )
    ends = []
    for _ in range(2):
        model = classifier()
        small = engine(model)
        arguments = training_arguments(section, tmp_path, seed=0, dtype="float32", steps=2)
        trainer = StepTrainer(small, arguments, EXAMPLES, partial(step_loss, small))
        trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path))
        assert trainer.state.global_step == 2
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        ends.append((logged, trainer.spending.tokens, {k: v.clone() for k, v in model.state_dict().items()}))
    (logged, tokens, weights), (again, tokens_again, weights_again) = ends
    assert again == logged and len(logged) == 2 and tokens_again == tokens > 0
    assert all(torch.equal(weight, weights_again[name]) for name, weight in weights.items())
