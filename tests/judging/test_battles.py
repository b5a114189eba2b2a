"""Battles in the columns of published files become judgements with one unit for each prompt."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.known_sets import KNOWN_SETS, QUESTIONS
from support.running import duel

from toolkit.errors import DataError
from toolkit.evals.winrate import win_rate
from toolkit.judging.records import Judgement, read_judgements, read_recorded, text_measures
from toolkit.judging.win_rates import winrate_report


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def summary(path: Path, rows: list[dict[str, Any]], **options: Any) -> list[tuple[str, float | None, int | None]]:
    """(prompt's id, preference, order) of each judgement."""
    recorded = read_recorded([jsonl(path / "b.jsonl", rows)], **options)
    return [(j.prompt_id, j.preference, j.order) for j in recorded.judgements]


# ------------------------------------------------------------------------------------------------- layouts
def test_plain_pairs_with_a_winner(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q{k}?", "response_a": "yes", "response_b": "no, not", "winner": winner}
        for k, winner in enumerate(["A", "b", "tie", "response_a", "model_b", 1, 2, 0])
    ]
    recorded = read_recorded([jsonl(tmp_path / "b.jsonl", rows)])
    assert [j.preference for j in recorded.judgements] == [1.0, 0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.5]
    first = recorded.judgements[0]
    assert (first.policy, first.baseline, first.judge, first.order) == ("response_a", "response_b", "recorded", None)
    assert (first.policy_length, first.baseline_length) == (3, 7)
    [read] = recorded.columns_read
    assert (read.prompt, read.systems, read.winner) == ("prompt", "response_a and response_b", "winner")


def test_systems_are_turned_one_way_round_and_the_left_one_is_first(tmp_path: Path) -> None:
    base = {"prompt": "Q?", "response_a": "x", "response_b": "yy", "judge": "ann"}
    rows = [
        {**base, "model_a": "ppo", "model_b": "dpo", "winner": "model_a"},
        {**base, "model_a": "dpo", "model_b": "ppo", "winner": "model_a"},
        {**base, "model_a": "dpo", "model_b": "ppo", "winner": "ppo"},  # by the system's name
    ]
    judgements = read_judgements([jsonl(tmp_path / "b.jsonl", rows)])
    assert {(j.policy, j.baseline, j.judge) for j in judgements} == {("ppo", "dpo", "ann")}
    assert [(j.preference, j.order, j.policy_length) for j in judgements] == [(1.0, 0, 1), (0.0, 1, 2), (1.0, 1, 2)]


def test_chatbot_arena_and_its_later_forms(tmp_path: Path) -> None:
    for name, wins in (
        ("lmsys/chatbot_arena_conversations", [1.0, 0.0, 1.0, 0.0, 0.5]),
        ("lmarena-ai/arena-human-preference-140k", [1.0, 0.0, 1.0, 0.5, 0.5]),
        ("lmarena-ai/arena-human-preference-55k", [1.0, 0.0, 1.0, 0.5, 1.0]),
        ("lmsys/mt_bench_human_judgments", [1.0, 0.0, 1.0, 0.0, 0.5]),  # both turns of a question are there
    ):
        judgements = read_judgements([jsonl(tmp_path / "b.jsonl", KNOWN_SETS[name].records)])
        assert [j.preference for j in judgements] == wins, name
        assert len({j.prompt_id for j in judgements}) == 5
        assert judgements[0].policy == KNOWN_SETS[name].records[0]["model_a"]


def test_prompts_that_came_in_both_orders_by_chance_drop_no_other(tmp_path: Path) -> None:
    def battle(prompt: str, left: str, right: str) -> dict[str, Any]:
        return {"question_id": prompt, "model_a": left, "model_b": right, "winner": "model_a"}

    drawn = [battle("p0", "x", "y"), battle("p0", "y", "x")]
    drawn += [battle(f"p{k}", *("xy" if k % 2 else "yx")) for k in range(1, 6)]
    [row] = winrate_report([jsonl(tmp_path / "b.jsonl", drawn)], n_resamples=50)["win_rates"]
    assert (row["n_prompts"], row["n_judged"], row["win_rate"], row["first_slot_rate"]) == (6, 6, (0.5 + 3) / 6, 1.0)
    planned = [battle(f"p{k}", *pair) for k in range(5) for pair in (("x", "y"), ("y", "x"))][:-1]
    [row] = winrate_report([jsonl(tmp_path / "b.jsonl", planned)], n_resamples=50)["win_rates"]
    assert (row["n_prompts"], row["n_judged"], row["position_consistency"]) == (5, 4, 0.0)  # p4 lacks an order


def test_a_judge_that_likes_the_left_side_is_no_win_rate(tmp_path: Path) -> None:
    """It saw x on the left on all prompts, and y there too on some: the orders say that these alone are judged."""
    sides = [(k, pair) for k in range(50) for pair in ("xy", "yx")[: 2 if k < 20 else 1]]
    rows = [{"question_id": f"p{k}", "model_a": a, "model_b": b, "winner": "model_a"} for k, (a, b) in sides]
    [row] = winrate_report([jsonl(tmp_path / "b.jsonl", rows)], n_resamples=50)["win_rates"]
    assert (row["n_prompts"], row["n_judged"], row["win_rate"], row["first_slot_rate"]) == (50, 20, 0.5, 1.0)
    own = [
        {"prompt_id": f"p{k}", "policy": "x", "baseline": "y", "judge": "recorded", "preference": float(a == "x"),
         "order": int(a == "y")} for k, (a, _) in sides
    ]  # fmt: skip
    assert winrate_report([jsonl(tmp_path / "own.jsonl", own)], n_resamples=50)["win_rates"] == [row]


def test_a_prompts_own_id_comes_before_its_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Go on.", "prompt_id": f"turn {k}", "model_a": "a", "model_b": "b", "winner": "model_a"}
        for k in range(3)
    ]
    assert [prompt for prompt, _, _ in summary(tmp_path, rows)] == ["turn 0", "turn 1", "turn 2"]
    for row in rows:
        row["question"] = row.pop("prompt")
    assert len({prompt for prompt, _, _ in summary(tmp_path, rows, columns={"prompt": "question"})}) == 1
    rows[1]["prompt_id"] = ""
    with pytest.raises(DataError, match="'prompt_id' is empty"):
        summary(tmp_path, rows)


def test_chosen_and_rejected_responses_stood_in_no_order(tmp_path: Path) -> None:
    """Two labels of ten prompts, which differ on six: the first column has the winner, not what was shown first."""

    def pair(prompt: int, chosen: str, rejected: str) -> dict[str, Any]:
        texts = {"chosen": f"{chosen} says", "rejected": f"{rejected} says"}
        return {"prompt": f"Q{prompt}?", **texts, "chosen_model": chosen, "rejected_model": rejected}

    rows = [pair(k, "m", "n") for k in range(10)]
    rows += [pair(k, "n", "m") if k < 6 else pair(k, "m", "n") for k in range(10)]
    [row] = winrate_report([jsonl(tmp_path / "b.jsonl", rows)], n_resamples=50)["win_rates"]
    assert (row["policy"], row["win_rate"], row["n_judged"], row["n_failed"]) == ("m", 0.7, 10, 0)
    assert (row["first_slot_rate"], row["position_consistency"]) == (None, None)


def test_a_crowd_of_judges_is_one(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q{k % 4}", "model_a": "a", "model_b": "b", "winner": "model_a", "judge": f"arena_user_{k}"}
        for k in range(12)
    ]
    recorded = read_recorded([jsonl(tmp_path / "b.jsonl", rows)])
    assert {j.judge for j in recorded.judgements} == {"12 judges"}
    assert {j.source for j in recorded.judgements} == {f"arena_user_{k}" for k in range(12)}
    assert recorded.columns_read[0].note == "12 judges in 'judge' are read as one"


def test_a_crowds_places_were_drawn_whatever_one_of_it_saw(tmp_path: Path) -> None:
    """One voter met a pair on both sides: their other votes count as those of all others do."""

    def vote(who: int, prompt: int, left: str) -> dict[str, Any]:
        right = "n" if left == "m" else "m"
        return {"question_id": f"p{prompt}", "model_a": left, "model_b": right, "winner": "m", "judge": f"user_{who}"}

    rows = [vote(0, 0, "m"), vote(0, 0, "n"), vote(0, 1, "m"), vote(0, 2, "m")]
    rows += [vote(k, 10 + k, "mn"[k % 2]) for k in range(1, 13)]
    [row] = winrate_report([jsonl(tmp_path / "b.jsonl", rows)], n_resamples=50)["win_rates"]
    assert (row["judge"], row["n_prompts"], row["n_judged"], row["n_failed"]) == ("13 judges", 15, 15, 0)


def test_arena_hards_games(tmp_path: Path) -> None:
    def game(score: str | None) -> dict[str, Any]:
        return {"user_prompt": "...", "judgment": "...", "score": score}

    rows = [
        {
            "question_id": "q1",
            "model": "m",
            "judge": "gpt-4",
            "games": [game("A>>B"), game("B>A")],
        },  # the baseline twice
        {"question_id": "q2", "model": "m", "judge": "gpt-4", "games": [game("B>A"), game("A=B")]},
        {"question_id": "q3", "model": "m", "judge": "gpt-4", "games": [game("A>B"), game("A>B")]},  # the first place
        {"question_id": "q4", "model": "m", "judge": "gpt-4", "games": [game(None), game("A>B")]},
    ]
    assert summary(tmp_path, rows) == [
        ("q1", 0.0, 1), ("q1", 0.0, 0), ("q2", 1.0, 1), ("q2", 0.5, 0), ("q3", 0.0, 1), ("q3", 1.0, 0),
        ("q4", None, 1), ("q4", 1.0, 0),
    ]  # fmt: skip
    [row] = winrate_report([tmp_path / "b.jsonl"], n_resamples=100)["win_rates"]
    assert (row["policy"], row["baseline"], row["judge"]) == ("m", "baseline", "gpt-4")
    assert (row["n_prompts"], row["n_judged"], row["n_failed"], row["win_rate"]) == (4, 3, 1, (0 + 0.75 + 0.5) / 3)
    assert (row["position_consistency"], row["first_slot_rate"]) == (1 / 3, (1 / 2 + 1 / 4 + 1) / 3)
    with pytest.raises(DataError, match="score 'C' of a game"):
        summary(tmp_path, [{"question_id": "q", "model": "m", "games": [game("C")]}])


def test_battles_of_one_prompt_are_one_unit(tmp_path: Path) -> None:
    """Arena-Hard writes a clear win as three battles, and both orders as further ones: none of them adds a prompt."""
    prompts = [("q1", ["model_b"] * 4), ("q2", ["model_a", "tie"]), ("q3", ["model_b", "model_a"]), ("q4", ["tie"])]
    rows = [
        {"question_id": q, "model_a": "gpt-4-0314", "model_b": "m", "winner": winner}
        for q, winners in prompts
        for winner in winners
    ]
    [row] = winrate_report([jsonl(tmp_path / "b.jsonl", rows)], n_resamples=300)["win_rates"]
    expected = win_rate([0.0, 0.75, 0.5, 0.5], policy="gpt-4-0314", baseline="m", judge="recorded", n_resamples=300)
    for name in ("win_rate", "standard_error", "ci_low", "ci_high", "p_value", "n_prompts"):
        assert row[name] == pytest.approx(getattr(expected, name)), name
    assert row["first_slot_rate"] is None  # model_a is always the baseline: nothing says who was shown first


def test_mt_bench_by_a_model_in_both_orders(tmp_path: Path) -> None:
    rows = [
        {"question_id": 81, "model_1": "a", "model_2": "b", "g1_winner": "model_1", "g2_winner": "tie",
         "judge": ["gpt-4", "pair-v2"], "turn": 1},
        {"question_id": 81, "model_1": "a", "model_2": "b", "g1_winner": "error", "g2_winner": "model_2",
         "judge": ["gpt-4", "pair-math-v1"], "turn": 2},
    ]  # fmt: skip
    assert summary(tmp_path, rows) == [("81", 1.0, 0), ("81", 0.5, 1), ("81", None, 0), ("81", 0.0, 1)]
    judgements = read_judgements([tmp_path / "b.jsonl"])
    assert {j.judge for j in judgements} == {"gpt-4"} and judgements[2].error == "no verdict recorded"


def test_pandalm_names_its_systems_in_one_column(tmp_path: Path) -> None:
    judgements = read_judgements([jsonl(tmp_path / "b.jsonl", KNOWN_SETS["PandaLM"].records)])
    assert {(j.policy, j.baseline) for j in judgements} == {("opt-7b", "pythia-6.9b")}
    assert [j.judge for j in judgements[:3]] == ["annotator1", "annotator2", "annotator3"]
    assert [j.preference for j in judgements[::3]] == [1.0, 0.0, 1.0, 0.0, 0.5]


@pytest.mark.parametrize("name", ["allenai/reward-bench", "allenai/llama-3.1-tulu-3-8b-preference-mixture"])
def test_preference_sets_that_name_their_models(tmp_path: Path, name: str) -> None:
    judgements = read_judgements([jsonl(tmp_path / "b.jsonl", KNOWN_SETS[name].records)])
    assert {(j.policy, j.baseline, j.preference, j.order) for j in judgements} == {("m", "n", 1.0, None)}


def test_two_scores_and_strengths(tmp_path: Path) -> None:
    rows = [{"prompt": str(s), "model_a": "a", "model_b": "b", "score_a": s, "score_b": 3} for s in (5, 3, None, 1)]
    assert [p for _, p, _ in summary(tmp_path, rows)] == [1.0, 0.5, None, 0.0]
    helpsteer = KNOWN_SETS["nvidia/HelpSteer2 (preference)"].records
    assert [p for _, p, _ in summary(tmp_path, helpsteer)] == [1.0, 0.0, 1.0, 0.0, 0.5]


# ------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "p", "response_a": "a", "response_b": "b", "winner": "C"}], "label 'C'"),
        ([{"prompt": "p", "model_a": "m", "model_b": "m", "winner": "model_a"}], "compared with itself"),
        ([{"model_a": "m", "model_b": "n", "winner": "model_a"}], "--column prompt=NAME"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], "two systems"),
        ([{"q": "p", "left": "a", "right": "b", "who": "left"}], "'q', 'left', 'right', 'who'"),
        ([{"prompt": "p", "response_a": "a", "response_b": "b", "label": k % 2} for k in range(8)], "is 0 or 1"),
    ],
)
def test_what_says_nothing_is_refused(tmp_path: Path, rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_judgements([jsonl(tmp_path / "b.jsonl", rows)])
    assert words in caught.value.render()


def test_other_names_are_mapped_and_the_columns_are_said(tmp_path: Path) -> None:
    rows = [{"q": f"p{k}", "left": "a", "right": "b", "who": "AB"[k % 2]} for k in range(4)]
    path = jsonl(tmp_path / "b.jsonl", rows)
    mapped = ["--column=prompt=q", "--column=response_a=left", "--column=response_b=right", "--column=winner=who"]
    document = json.loads(duel("winrate", str(path), *mapped, "--json").stdout)
    assert document["win_rates"][0]["win_rate"] == 0.5
    assert document["columns_read"] == [
        {"file": str(path), "prompt": "prompt", "systems": "response_a and response_b", "winner": "winner",
         "judge": "none is named", "n_judgements": 4, "note": ""}
    ]  # fmt: skip
    shown = " ".join(duel("winrate", str(path), *mapped).stdout.split())
    assert "prompt = prompt, systems = response_a and response_b, winner = winner" in shown
    assert "there is no column 'wo'" in duel("winrate", str(path), "--column=winner=wo", check=2).stderr


def test_slices_by_a_column_of_the_file(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{k}", "model_a": "a", "model_b": "b", "winner": "model_a", "language": "en" if k else "de"}
        for k in range(4)
    ]
    rates = winrate_report([jsonl(tmp_path / "b.jsonl", rows)], by="language", n_resamples=50)["win_rates"]
    assert [(row["slice"], row["n_prompts"]) for row in rates] == [(None, 4), ("language=de", 1), ("language=en", 3)]


# ------------------------------------------------------------------------------------------------- people's votes
def files(folder: Path, n: int = 60, voted: int = 30, seed: int = 0) -> tuple[Path, Path]:
    """A judge's file on n prompts, and people's votes on some of them, with the systems the other way round."""
    rng = np.random.default_rng(seed)
    judge = [{"prompt": f"p{k}", "model_a": "x", "model_b": "y", "winner": "AB"[int(rng.random() < 0.4)], "judge": "j"}
             for k in range(n)]  # fmt: skip
    votes = [
        {"prompt": row["prompt"], "model_a": "y", "model_b": "x", "judge": f"person {k % 2}",
         "winner": "AB"[int((row["winner"] == "A") != (rng.random() < 0.2))]}
        for k, row in enumerate(judge[:voted])
    ]  # fmt: skip
    return jsonl(folder / "judge.jsonl", judge), jsonl(folder / "votes.jsonl", votes)


def test_votes_correct_a_judge(tmp_path: Path) -> None:
    judged, votes = files(tmp_path)
    document = json.loads(duel("winrate", str(judged), f"--human={votes}", "--json").stdout)
    [row] = document["prediction_powered"]
    assert (row["policy"], row["baseline"], row["judge"]) == ("x", "y", "j")
    assert (row["n_human"], row["n_judge_only"]) == (30, 30)
    people = [json.loads(line)["winner"] == "B" for line in votes.read_text().splitlines()]  # B is x there
    assert row["human_win_rate"] == pytest.approx(np.mean(people))
    assert 0 < row["judge_weight"] < 1 and row["ci_low"] < row["win_rate"] < row["ci_high"]
    assert len(document["columns_read"]) == 2
    assert "Corrected by people's votes" in duel("winrate", str(judged), f"--human={votes}").stdout


def test_the_command_prints_what_votes_correct(tmp_path: Path) -> None:
    judged, votes = files(tmp_path)
    shown = duel("winrate", str(judged), "--human", str(votes)).stdout
    assert "Corrected by people's votes" in shown and "30 of 60" in shown


def test_columns_are_mapped_in_the_files_that_have_them(tmp_path: Path) -> None:
    judged, votes = files(tmp_path)
    command = ["winrate", str(judged), f"--human={votes}", "--json"]
    expected = json.loads(duel(*command).stdout)["prediction_powered"]
    for file, name in ((votes, "who"), (judged, "decided")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        jsonl(file, [{name: row["winner"], **{k: v for k, v in row.items() if k != "winner"}} for row in rows])
        assert json.loads(duel(*command, f"--column=winner={name}").stdout)["prediction_powered"] == expected
        assert "there is no column 'whom'" in duel(*command, "--column=winner=whom", check=2).stderr
        jsonl(file, rows)


def test_votes_on_a_prompts_text_are_known_by_the_responses(tmp_path: Path) -> None:
    """A run's conversation has the id of its messages, and a vote that of their text."""
    judged, votes = tmp_path / "judged.jsonl", tmp_path / "votes.jsonl"
    texts = [(f"{k} is it.", f"It is {k}.") for k in range(30)]
    rows = [Judgement(f"id {k}", "x", "y", "j", float(k % 3 > 0), **text_measures(*texts[k])) for k in range(30)]
    jsonl(judged, [asdict(row) for row in rows])
    jsonl(votes, [
        {"prompt": f"p{k}", "model_a": "y", "model_b": "x", "response_a": b, "response_b": a, "winner": "AB"[k % 2]}
        for k, (a, b) in enumerate(texts[:20])
    ])  # fmt: skip
    [row] = winrate_report([judged], human=votes, n_resamples=50)["prediction_powered"]
    assert (row["n_human"], row["n_judge_only"], row["human_win_rate"]) == (20, 10, 0.5)


def test_votes_on_other_systems_or_prompts_are_refused(tmp_path: Path) -> None:
    judged, _ = files(tmp_path)
    other = jsonl(tmp_path / "o.jsonl", [{"prompt": "p1", "model_a": "v", "model_b": "w", "winner": "A"}])
    refused = duel("winrate", str(judged), f"--human={other}", check=2)
    assert "people compared v against w, the judge x against y" in refused.stderr
    few = jsonl(tmp_path / "f.jsonl", [{"prompt": "p1", "model_a": "x", "model_b": "y", "winner": "A"}])
    refused = duel("winrate", str(judged), f"--human={few}", check=2)
    assert "on 10 of its judged prompts; the most are on 1" in refused.stderr


def test_a_pair_with_few_votes_is_left_out_by_name(tmp_path: Path) -> None:
    judged, votes = files(tmp_path)
    other = {"model_a": "x", "model_b": "z", "winner": "A"}
    more = [{"prompt": f"p{k}", **other, "judge": "j"} for k in range(20)]
    judged.write_text(judged.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    few = [{"prompt": f"p{k}", **other, "judge": "person 0"} for k in range(9)]
    votes.write_text(votes.read_text() + "".join(json.dumps(row) + "\n" for row in few))
    document = json.loads(duel("winrate", str(judged), f"--human={votes}", "--json").stdout)
    assert [(row["policy"], row["baseline"]) for row in document["prediction_powered"]] == [("x", "y")]
    left_out = document["prediction_powered_left_out"]
    assert left_out == [{"policy": "x", "baseline": "z", "judge": "j", "n_votes": 9}]
    shown = " ".join(duel("winrate", str(judged), f"--human={votes}").stdout.split())
    assert "x against z, judge j, is not corrected: people voted on 9 of its prompts, and it takes 10" in shown


def test_the_prompts_of_texts_and_messages_are_one() -> None:
    from toolkit.judging.prompt_ids import plain_prompt

    assert plain_prompt([{"role": "user", "content": QUESTIONS[0]}]) == QUESTIONS[0]
    longer = [{"role": "system", "content": "s"}, {"role": "user", "content": QUESTIONS[0]}]
    assert plain_prompt(longer) == longer
