"""The loss on labelled steps: by hand, over any split of an optimiser step, and data that teaches nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.small_models import assert_same_gradients, classifier, engine, gradients

from toolkit.engine.process import StepTree
from toolkit.errors import DataError
from toolkit.models.encoding import Tree
from toolkit.preferences.steps import Solution
from toolkit.training.process import StepExample, step_batches, step_examples, step_loss

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
