"""Where steps end in token ids, scores read there, and running sums along solutions that share steps."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from toolkit.engine.engine import Engine
from toolkit.engine.logps import apply_head, hidden_states, score_head
from toolkit.engine.process import (
    StepEnds,
    along_solutions,
    response_places,
    scored,
    scores_by_token,
    step_trees,
    sums_between,
)
from toolkit.engine.tree import pack
from toolkit.errors import DataError
from toolkit.models.encoding import TextEncoder, Tree
from toolkit.models.load import new_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.solutions import Solution
from toolkit.recipe.training import ModelSection


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(load_tokenizer(resolve("tiny")), False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    model: Any = new_reward_model(resolve("tiny"), ModelSection(name="tiny", dtype="float32", lora=None), 0, 0)
    return Engine(model.eval(), 0, dtype=torch.float32)


def steps_of(encoder: TextEncoder, text: str, separator: str = "\n") -> list[str]:
    """The text up to the end of each step, by the steps' last tokens."""
    [ids], _ = encoder.responses([text], 100)
    return [encoder.decode(ids[: step.last + 1]) for step in StepEnds(encoder, separator)(ids)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("3+5=8\n8-2=6", ["3+5=8", "3+5=8\n8-2=6"]),
        ("\n3+5=8 \n \n8-2=6\n", ["\n3+5=8", "\n3+5=8 \n \n8-2=6"]),
        ("one step", ["one step"]),
        ("", []),
        (" \n ", []),
        ("é ü\n世界", ["é ü", "é ü\n世界"]),
    ],
)
def test_a_step_ends_at_its_last_token_that_is_not_blank(encoder: TextEncoder, text: str, expected: list[str]) -> None:
    assert steps_of(encoder, text) == expected


def test_a_separator_may_be_words_and_the_end_need_not_be_there(encoder: TextEncoder) -> None:
    assert steps_of(encoder, "a; b; c", "; ") == ["a", "a; b", "a; b; c"]
    [ids], cut = encoder.responses(["3+5=8\n8-2=6"], 8)
    assert cut == [True] and StepEnds(encoder, "\n")(ids)[-1] == (7, 7)  # the last token of a truncated response


def test_a_step_is_closed_by_what_says_that_it_is_over(encoder: TextEncoder) -> None:
    """The token that ends the separator, the end of the response, or the last token of a truncated response."""
    for text, separator, closed in (
        ("3+2=5\n5-1=4", "\n", ["3+2=5\n", "3+2=5\n5-1=4<|im_end|>"]),
        ("a ; b\n; c;", ";", ["a ;", "a ; b\n;", "a ; b\n; c;"]),
        ("a; b", "; ", ["a; b", "a; b<|im_end|>"]),  # the blank of this separator is part of the token " b"
        ("a \n\n", "\n", ["a \n"]),
    ):
        [ids], _ = encoder.responses([text], 100)
        decode = encoder.tokenizer.decode
        assert [decode(ids[: step.closed + 1]) for step in StepEnds(encoder, separator)(ids)] == closed


@pytest.mark.invariant
def test_labelled_steps_end_where_sampled_steps_do(encoder: TextEncoder) -> None:
    solution = Solution("p", "3+5-2=", ["3+5=8", "8-2=6"], [True, True])
    [tree], cut = step_trees([solution], encoder, "\n", 100)
    [ids], _ = encoder.responses(["3+5=8\n8-2=6"], 100)
    assert tree.tree.response_ids == [ids[:-1]] and tree.ends == [[step.last for step in StepEnds(encoder, "\n")(ids)]]
    assert tree.tree.prompt_ids == encoder.prompt("3+5-2=") and cut.n_steps == 0


@pytest.fixture(scope="module")
def melting() -> TextEncoder:
    """A tokenizer with a token for a full stop and a line break behind it, as Qwen's and Llama 3's have."""
    vocabulary = {token: i for i, token in enumerate(["<|pad|>", "<|end|>", "\n", ".", *"abcdefghij= ", ".\n"])}
    whole = Tokenizer(BPE(vocabulary, [(".", "\n")]))
    whole.decoder = Fuse()
    return TextEncoder(PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<|end|>", pad_token="<|pad|>"), False)


@pytest.mark.invariant
def test_labelled_steps_end_where_sampled_steps_do_also_where_tokens_melt(melting: TextEncoder) -> None:
    """A step's end is trained on the token at which a policy's text has it, with all that stands before it."""
    solutions = [
        Solution("p", "abc=", ["a=b.", "b=c.", "c=d."], [True, True, False]),
        Solution("p", "abc=", ["a=b.", "b=d."], [True, False], n_shared=1),
        Solution("p", "abc=", ["a=b.", "b=d.\n", "d=e"], [True, False, True], n_shared=1),
    ]
    trees, cut = step_trees(solutions, melting, "\n", 100)
    assert [tree.solutions for tree in trees] == [[0], [1, 2]] and cut.n_steps == 0
    [melted] = melting.continuations([".\n"])
    assert len(melted) == 1
    for tree in trees:
        for number, ids, ends in zip(tree.solutions, tree.tree.response_ids, tree.ends, strict=True):
            solution = solutions[number]
            [sampled], _ = melting.responses(["\n".join(solution.steps)], 100)
            places = [step.last for step in StepEnds(melting, "\n")(sampled)]
            before = [*tree.tree.prompt_ids[len(melting.prompt("abc=")) :], *ids]
            assert before == sampled[: places[-1] + 1]
            assert [end + len(before) - len(ids) for end in ends] == places[solution.n_shared :]
            assert all(sampled[place] == melted[0] for place in places[:-1])
    assert trees[1].tree.prompt_ids[-1] == melted[0]
    cut_trees, cut = step_trees(solutions[:1], melting, "\n", 9)
    assert cut.n_steps == 1 and len(cut_trees[0].tree.response_ids[0]) == 8 and cut_trees[0].ends == [[3, 7]]


def test_a_step_may_hold_the_separator(encoder: TextEncoder) -> None:
    solution = Solution("p", "3+5-2=", ["3+5\n=8", "8-2=6"], [True, True])
    [tree], _ = step_trees([solution], encoder, "\n", 100)
    [ids] = tree.tree.response_ids
    assert [encoder.decode(ids[: end + 1]) for end in tree.ends[0]] == ["3+5\n=8", "3+5\n=8\n8-2=6"]


def test_a_separator_that_the_tokenizer_drops_is_an_error(melting: TextEncoder) -> None:
    with pytest.raises(DataError, match="the solution has 2 steps, and its tokens 1"):
        step_trees([Solution("p", "abc=", ["a=b.", "b=c."], [True, True])], melting, ";", 100)


@pytest.mark.invariant
def test_scores_do_not_depend_on_how_solutions_share_a_tree(encoder: TextEncoder, engine: Engine) -> None:
    """Shared steps are computed once, as part of a tree's prompt; each solution alone has the same scores."""
    solutions = [
        Solution("p", "3+5-2+1=", ["3+5=8", "8-2=6", "6+1=7"], [True, True, True]),
        Solution("p", "3+5-2+1=", ["3+5=8", "8-2=5", "5+1=6"], [True, False, True], n_shared=1),
        Solution("p", "3+5-2+1=", ["3+5=8", "8-2=7"], [True, False], n_shared=1),
        Solution("q", "1+1+1=", ["1+1=2", "2+1=4"], [True, False]),
    ]
    trees, _ = step_trees(solutions, encoder, "\n", 100)
    assert [tree.solutions for tree in trees] == [[0], [1, 2], [3]]
    along = along_solutions(solutions, trees, at_ends(engine, trees))
    alone = [Solution(s.prompt_id, s.prompt, s.steps, s.labels) for s in solutions]
    for solution, values in zip(alone, along, strict=True):
        single, _ = step_trees([solution], encoder, "\n", 100)
        [[expected]] = at_ends(engine, single)
        assert values == pytest.approx(expected, abs=2e-4)
    with_labels = [scored(solution, values) for solution, values in zip(solutions, along, strict=True)]
    assert [s.counted for s in with_labels] == [[0, 1, 2], [1, 2], [1], [0, 1]]
    assert [s.first_error for s in with_labels] == [3, 1, 1, 1]


def at_ends(engine: Engine, trees: Any) -> list[list[list[float]]]:
    by_token = scores_by_token(engine, [tree.tree for tree in trees])
    return [
        [scores[list(ends)].tolist() for scores, ends in zip(of_tree, tree.ends, strict=True)]
        for of_tree, tree in zip(by_token, trees, strict=True)
    ]


@pytest.mark.invariant
@pytest.mark.parametrize("layout", [{}, {"row_per_response": True}, {"padding": False}])
def test_every_token_is_read_at_its_own_state(engine: Engine, layout: dict[str, bool]) -> None:
    trees = [Tree([5, 6, 7], [[8, 9], [10, 11, 12]]), Tree([5], [[13]])]
    batch = pack(trees, 0, **layout)
    if layout.get("padding") is not False:
        assert batch.input_ids.flatten()[response_places(batch)].tolist() == batch.target.tolist()
    scores = scores_by_token(engine, trees)
    for tree, of_tree in zip(trees, scores, strict=True):
        for ids, values in zip(tree.response_ids, of_tree, strict=True):
            single = pack([Tree(tree.prompt_ids, [ids])], 0)
            states = hidden_states(engine.model, single)[len(tree.prompt_ids) :]
            torch.testing.assert_close(values, apply_head(score_head(engine.model), states).detach(), atol=2e-4, rtol=0)


def test_steps_beyond_the_limit_are_cut_and_leave_the_rest_unjudged(encoder: TextEncoder) -> None:
    right = Solution("p", "3+5-2=", ["3+5=8", "8-2=6"], [True, True])
    wrong = Solution("q", "3+5-2=", ["3+5=7", "7-2=5"], [False, True])
    long = Solution("r", "3+5-2=", ["3+5=8 " * 9, "8-2=6"], [True, True])
    trees, cut = step_trees([right, wrong, long], encoder, "\n", 6)
    assert (cut.n_steps, cut.n_solutions) == (4, 1)
    along = along_solutions([right, wrong, long], trees, [[[0.0] * len(ends) for ends in t.ends] for t in trees])
    assert [len(values) for values in along] == [1, 1, 0]
    assert scored(right, along[0]).first_error is None and scored(wrong, along[1]).first_error == 0


def test_sums_between_ends_add_up_to_the_running_sums() -> None:
    values = torch.tensor([0.5, -1.0, 2.0, 0.25])
    own = sums_between(values, [1, 3])
    assert own == [-0.5, 2.25] and list(accumulate(own))[-1] == float(values.sum())
