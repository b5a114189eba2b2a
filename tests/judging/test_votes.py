"""People's votes in their memory: what they are on, whichever response stood first, and whatever was added since."""

from __future__ import annotations

import random
from pathlib import Path

from toolkit.judging import human
from toolkit.judging.answers import Answer, Memory, Question, remembering
from toolkit.judging.responses import PolicyResponses
from toolkit.preferences.rows import Prompt

N = 12
CHATS: list[Prompt] = [[{"role": "user", "content": f"prompt {i}"}] for i in range(N)]
TEXTS: list[Prompt] = [f"prompt {i}" for i in range(N)]


def ballots(prompts: list[Prompt], numbers: list[int], seed: int = 0) -> human.Ballots:
    texts = {name: [[f"{name} {i}"] for i in numbers] for name in ("ppo", "sft")}
    return human.Ballots("ppo", "sft", PolicyResponses([f"p{i}" for i in numbers], prompts, texts), seed)


def vote_for_the_policy(of: human.Ballots, memory: Memory, annotator: str = "ann") -> None:
    for pair in of.of(annotator):
        memory.keep(pair.question, Answer(1.0 if pair.question.first.startswith("ppo") else 0.0))


def test_votes_stay_when_prompts_come_before_and_go(tmp_path: Path) -> None:
    """A pair's order was drawn by its place: with other prompts the votes on half of the pairs were gone."""
    first, then = ballots(TEXTS, [*range(N)]), ballots(TEXTS[N // 2 :] + ["new"], [*range(N // 2, N), N + 7])
    with remembering(tmp_path / "votes.sqlite") as memory:
        vote_for_the_policy(first, memory)
        assert (len(human.votes(first, memory)), human.n_other_votes(first, memory)) == (N, 0)
        kept = human.votes(then, memory)
        assert {(j.prompt_id, j.preference) for j in kept} == {(f"p{i}", 1.0) for i in range(N // 2, N)}
        assert human.n_other_votes(then, memory) == N // 2
    orders = {pair.blank.prompt_id: pair.blank.order for pair in first.of("ann")}
    assert {*orders.values()} == {0, 1}
    again = {pair.blank.prompt_id: pair.blank.order for pair in then.of("ann")}
    assert all(orders[key] == again[key] for key in orders.keys() & again.keys())


def test_votes_of_earlier_versions_count(tmp_path: Path) -> None:
    """They drew another order, and showed a conversation of one message with its role or as its text."""
    rng = random.Random(1)
    for prompts, shown in ((TEXTS, "prompt {}"), (CHATS, "user: prompt {}"), (CHATS, "prompt {}")):
        of = ballots(prompts, [*range(N)])
        with remembering(tmp_path / f"{shown[:4]}-{prompts is CHATS}.sqlite") as memory:
            for i in range(N):
                texts, ppo_first = [f"ppo {i}", f"sft {i}"], rng.randrange(2)
                question = Question("human:ann", "vote", shown.format(i), *(texts if ppo_first else texts[::-1]))
                memory.keep(question, Answer(float(ppo_first)))
            votes = human.votes(of, memory)
            assert len(votes) == N and {(j.preference, j.judge) for j in votes} == {(1.0, "human:ann")}
            assert {j.order for j in votes} == {0, 1} and human.n_other_votes(of, memory) == 0
            state = human.Poll(of, memory).next_pair("ann")
            assert b'"pair": null' in state and b'"voted": 12, "total": 12' in state


def test_votes_of_earlier_versions_on_whole_conversations_count(tmp_path: Path) -> None:
    """They had the messages of files of outputs in the question, as they are."""
    rest = [{"role": "assistant", "content": "?"}, {"role": "user", "content": "again"}]
    talk: list[Prompt] = [[{"role": "user", "content": f"prompt {i}"}, *rest] for i in range(N)]
    with remembering(tmp_path / "votes.sqlite") as memory:
        for i, prompt in enumerate(talk):
            memory.keep(Question("human:ann", "vote", prompt, f"sft {i}", f"ppo {i}"), Answer(0.0))
        of = ballots(talk, [*range(N)])
        assert [j.preference for j in human.votes(of, memory)] == [1.0] * N and human.n_other_votes(of, memory) == 0
