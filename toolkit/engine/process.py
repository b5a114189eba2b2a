"""Steps inside responses: where each ends, what a process reward model says there, and what a policy says up to there.

A step ends at the token that has its last character that is no blank: the token before the separator, before the end
of the response, or the last one of a truncated response. A process reward model's score at that token is the logit of
the step being right.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import torch

from toolkit.engine.engine import Engine
from toolkit.engine.logps import apply_head, hidden_states, score_head
from toolkit.engine.tree import TreeBatch
from toolkit.errors import DataError, ModelError
from toolkit.evals.process import ScoredSolution
from toolkit.models.encoding import TextEncoder, Tree
from toolkit.preferences.solutions import Solution

Advance = Callable[[int], None]
StepProbabilities = list[tuple[int, float]]
"""Of each step of a response the position of the token that closes it, and the probability that it is right."""


class StepEnd(NamedTuple):
    """Positions in a response: of a step's last token that is not blank, and of the token that closes the step.

    Only the latter says that the step is over: it ends the separator, or the response.
    """

    last: int
    closed: int


@dataclass(frozen=True)
class StepEnds:
    """Finds the steps of responses as token ids, by the text of the tokens."""

    encoder: TextEncoder
    separator: str
    _texts: dict[int, str] = field(default_factory=dict)

    def __call__(self, ids: Sequence[int]) -> list[StepEnd]:
        """The steps of a response in their order. Blank steps are none."""
        texts = [self._text(i) for i in ids]
        ends = list(accumulate(map(len, texts)))
        steps, start = [], 0
        for part in "".join(texts).split(self.separator):
            behind = start + len(part) + len(self.separator)
            if written := part.rstrip():
                # Without a separator behind it, the step is closed where the response stops.
                closed = bisect_left(ends, behind) if behind <= ends[-1] else len(ids) - 1
                steps.append(StepEnd(bisect_left(ends, start + len(written)), closed))
            start = behind
        return steps

    def probabilities(self, ids: Sequence[int], scores: torch.Tensor) -> StepProbabilities:
        """Of a response, from the process reward model's scores by token."""
        steps = self(ids)
        probabilities = probabilities_at(scores, [step.last for step in steps])
        return [(step.closed, p) for step, p in zip(steps, probabilities, strict=True)]

    def _text(self, i: int) -> str:
        if i not in self._texts:
            self._texts[i] = self.encoder.decode([i])
        return self._texts[i]


def token_scores(engine: Engine, batch: TreeBatch) -> torch.Tensor:
    """[N] a reward model's score at every response token, with gradients, under the caller's autocast.

    Raises ModelError for a model that pools a whole row, as encoders do: it would see the steps behind a step.
    """
    if engine.pools_rows:
        raise ModelError(
            "a process reward model reads a score behind every step, and this architecture reads one for a whole text",
            where="reward_model.kind: process",
            fix="a decoder",
        )
    head = score_head(engine.model)
    assert head is not None
    return apply_head(head, hidden_states(engine.model, batch)[response_places(batch)])


def response_places(batch: TreeBatch) -> torch.Tensor:
    """[N] flat index (into ``input_ids``) of every response token itself."""
    assert batch.last is not None
    lengths = torch.bincount(batch.owner, minlength=batch.n_responses)
    before = lengths.cumsum(0) - lengths  # tokens of the responses before
    within = torch.arange(len(batch.owner), device=batch.owner.device) - before[batch.owner]
    return batch.last[batch.owner] - lengths[batch.owner] + 1 + within


def by_tokens(values_N: torch.Tensor, batch: TreeBatch) -> list[torch.Tensor]:
    """Of each response its [n_tokens] values, on the CPU."""
    lengths = torch.bincount(batch.owner, minlength=batch.n_responses).tolist()
    # Copies: a view that is sent to another process takes the whole batch with it.
    return [values_n.clone() for values_n in torch.split(values_N.float().cpu(), lengths)]


def scores_by_token(engine: Engine, trees: Sequence[Tree], advance: Advance | None = None) -> list[list[torch.Tensor]]:
    """For every tree, for every response, the reward model's score at each of its tokens."""
    return engine.map_responses(
        trees, lambda batch: by_tokens(token_scores(engine, batch), batch), advance, last_tokens=True
    )


def probabilities_at(scores: torch.Tensor, ends: Sequence[int]) -> list[float]:
    """The probabilities that the steps with these ends are right, from a response's scores by token.

    >>> probabilities_at(torch.tensor([0.0, 9.0, 0.0]), [0, 2])
    [0.5, 0.5]
    """
    return [float(p) for p in torch.sigmoid(scores[list(ends)].double())]


# ---------------------------------------------------------------------------------------------------- labelled steps
@dataclass(frozen=True)
class StepTree:
    """Solutions of one prompt that begin with the same steps, as one tree: these steps are part of its prompt.

    ``solutions[k]`` has the number of a solution in the data, and ``ends[k]`` the last token of each of the steps that
    it does not share, in response k.
    """

    tree: Tree
    solutions: list[int]
    ends: list[list[int]]

    def __len__(self) -> int:
        return len(self.tree)


@dataclass(frozen=True)
class CutSteps:
    """Steps that a limit on tokens leaves out, and solutions of which nothing is left."""

    n_steps: int
    n_solutions: int


def step_trees(
    solutions: Sequence[Solution], encoder: TextEncoder, separator: str, max_response_tokens: int, widest: int = 8
) -> tuple[list[StepTree], CutSteps]:
    """Solutions as token ids, each step once, in trees of at most ``widest`` solutions; steps beyond the limit are cut.

    The whole text is tokenised, as a policy writes it, and a step ends as :class:`StepEnds` finds it there: a token
    that holds the end of a step may hold the separator, too. Raises DataError where a solution cannot be read so.
    """
    ids_of = encoder.continuations([separator.join(solution.steps) for solution in solutions])
    find = StepEnds(replace(encoder, conversational=False), separator)
    groups: dict[tuple[object, ...], list[int]] = {}
    cut_steps = cut_solutions = 0
    ends_of: list[list[int]] = []  # of the steps that fit
    for number, (solution, ids) in enumerate(zip(solutions, ids_of, strict=True)):
        ends = [end for end in _ends_of_steps(solution, ids, find) if end < max_response_tokens]
        ends_of.append(ends)
        cut_steps += len(solution.steps) - max(len(ends), solution.n_shared)
        if len(ends) <= solution.n_shared:
            cut_solutions += 1
            continue
        groups.setdefault((solution.prompt_id, *ids[: _n_before(solution, ends)]), []).append(number)
    trees = []
    for members in groups.values():
        first, prompt = members[0], encoder.prompt(solutions[members[0]].prompt)
        n_before = _n_before(solutions[first], ends_of[first])
        for start in range(0, len(members), widest):
            some = members[start : start + widest]
            responses = [ids_of[number][n_before : ends_of[number][-1] + 1] for number in some]
            own = [[end - n_before for end in ends_of[number][solutions[number].n_shared :]] for number in some]
            trees.append(StepTree(Tree([*prompt, *ids_of[first][:n_before]], responses), some, own))
    return trees, CutSteps(cut_steps, cut_solutions)


def _n_before(solution: Solution, ends: Sequence[int]) -> int:
    """How many tokens the steps have that the solution shares. One token may end a shared step and the next one."""
    n = solution.n_shared
    return min(ends[n - 1] + 1, ends[n]) if n else 0


def _ends_of_steps(solution: Solution, ids: Sequence[int], find: StepEnds) -> list[int]:
    """The token that ends each step, in a solution's ids. A step of the data may hold the separator.

    Raises DataError where the text of the tokens has other steps.
    """
    ends = [step.last for step in find(ids)]
    parts = [sum(bool(part.strip()) for part in step.split(find.separator)) for step in solution.steps]
    if sum(parts) != len(ends):
        raise DataError(
            f"between separators {find.separator!r} the solution has {sum(parts)} steps, and its tokens {len(ends)}",
            where=f"reward_model.steps, row {solution.source_row}",
            fix="another reward_model.step_separator, which the tokenizer keeps",
        )
    return [ends[n - 1] for n in accumulate(parts)]


def along_solutions(
    solutions: Sequence[Solution], trees: Sequence[StepTree], values: Sequence[Sequence[Sequence[float]]]
) -> list[list[float]]:
    """For every solution the values of its steps, from those by tree and response: shared steps have their first value.

    A solution whose steps were cut has fewer values, and one that was left out has none.
    """
    unshared: list[list[float]] = [[] for _ in solutions]
    for tree, of_tree in zip(trees, values, strict=True):
        for number, of_solution in zip(tree.solutions, of_tree, strict=True):
            unshared[number] = list(of_solution)
    first: dict[tuple[object, ...], float] = {}
    out = []
    for solution, latest in zip(solutions, unshared, strict=True):
        paths = [(solution.prompt_id, *solution.steps[: k + 1]) for k in range(len(solution.steps))]
        whole = [first[path] for path in paths[: solution.n_shared]] + latest if latest else []
        for path, value in zip(paths, whole, strict=False):
            first.setdefault(path, value)
        out.append(whole)
    return out


def sums_between(values: torch.Tensor, ends: Sequence[int]) -> list[float]:
    """The sum of a response's values by token inside each step that ends at ``ends``.

    A separator counts in the step behind it, unless a token has it together with the end of the step before.

    >>> sums_between(torch.tensor([1.0, 2.0, 4.0]), [0, 2])
    [1.0, 6.0]
    """
    running = values.double().cumsum(0)[list(ends)].tolist()
    return [total - before for total, before in zip(running, [0.0, *running], strict=False)]


def scored(solution: Solution, values: Sequence[float]) -> ScoredSolution:
    """The solution with the values of its steps. Steps that were cut leave the rest of it unjudged."""
    n = len(values)
    labels = solution.labels[:n]
    whole = n == len(solution.steps) or False in labels
    rest: tuple[list[bool | None], list[float]] = ([], []) if whole else ([None], [0.0])
    return ScoredSolution(solution.prompt_id, [*labels, *rest[0]], solution.n_shared, [*values, *rest[1]])
