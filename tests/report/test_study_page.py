"""The page of a study: what it says of each kind of study, that nothing empty is drawn, and that names stay texts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.study_documents import ARMS, CASES, document
from support.study_tables import study_rows

from toolkit.errors import StoreError
from toolkit.report import study_tables
from toolkit.report.study_page import build_study, read_study_document, study_page


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], str]:
    made = CASES[request.param]()
    return request.param, made, study_page(made, "A study")


def page(name: str) -> str:
    return study_page(CASES[name](), "A study")


def words(html: str) -> str:
    """The text of the page's body, with single spaces."""
    body = re.sub(r"<script.*?</script>|<style.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def section(html: str, name: str) -> str:
    match = re.search(rf'<section id="{name}".*?</section>', html, re.DOTALL)
    assert match is not None, name
    return words(match.group(0))


def figures_of(html: str) -> dict[str, Any]:
    match = re.search(r'id="figure-data">(.*?)</script>', html, re.DOTALL)
    assert match is not None
    return dict(json.loads(match.group(1))["figures"])


def test_no_page_has_empty_axes_nor_missing_numbers(case: tuple[str, dict[str, Any], str]) -> None:
    _, made, html = case
    text = words(html)
    assert not re.search(r"\b(NaN|nan|None|inf)\b", text)
    figures = figures_of(html)
    assert set(re.findall(r'data-figure="([^"]+)"', html)) == set(figures)
    for figure in figures.values():
        lines = [trace for trace in figure["traces"] if trace.get("fill") is None]
        assert any(value is not None for trace in lines for value in trace["y"])
        for trace in figure["traces"]:
            assert len(trace["x"]) == len(trace["y"]) and len(trace["x"]) > 0
    for name in ("verdict", "frontier", "kl", "compute", "effort", "needed", "trials", "selection", "method"):
        assert len(section(html, name)) > 40
    assert ('id="controls"' in html) == bool(made["controls"])
    for text_of_verdict in (made["verdict"]["sentence"].partition(": ")[0], "A prompt is in one split only: "):
        assert text_of_verdict in text
    assert "http" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


def test_the_decision_has_three_bars_and_the_probability() -> None:
    made = CASES["better"]()
    html = study_page(made, "A study")
    assert "RM + PPO is better" in section(html, "verdict")
    bars = re.findall(r'class="forest c-(\w+)"[^>]*aria-label="RM \+ PPO against DPO, ([^:"]+)', html)
    assert bars == [("rm_ppo", name) for name in ("best against best", "at equal KL", "at equal training tokens")]
    rate = made["verdict"]["matched_kl"]
    assert f"{rate['win_rate']:.1%} {100 * rate['ci_low']:.1f} to {100 * rate['ci_high']:.1f}" in section(
        html, "verdict"
    )
    assert "least sure: >0.99" in section(html, "verdict").replace("&gt;", ">")
    assert "3 seeds · 60 test prompts" in section(html, "verdict")


def test_the_frontier_has_seeds_front_chosen_and_controls() -> None:
    made = CASES["better"]()
    [figure] = [f for name, f in figures_of(study_page(made, "A")).items() if "frontier" in name]
    traces = {trace["name"]: trace for trace in figure["traces"]}
    assert {"RM + PPO, each seed", "DPO, Pareto front", "DPO, chosen", "RLOO", "SFT", "PPO on length alone"} <= set(
        traces
    )
    assert len(traces["DPO"]["x"]) == 6
    assert traces["DPO, each seed"]["x"].count(None) == 9  # 3 settings with 3 seeds each
    for arm, name in (("rm_ppo", "RM + PPO"), ("dpo", "DPO")):
        chosen = traces[f"{name}, chosen"]
        assert (chosen["x"], chosen["y"]) == (
            [made["chosen"][arm]["kl_nats"]],
            [made["chosen"][arm]["test_score"]["score"]],
        )
        points = [p for trial in made["trials"] if trial["arm"] == arm for p in trial["checkpoints"]]
        front = set(traces[f"{name}, Pareto front"]["x"])
        for point in points:  # what is not on the front is beaten on dev at no more KL
            beaten = any(
                p["kl_nats"] <= point["kl_nats"] and p["dev_score"]["score"] > point["dev_score"]["score"]
                for p in points
            )
            assert (round(point["kl_nats"], 4) in front) != beaten


def test_curves_have_a_band_and_a_line_at_one_half() -> None:
    figures = figures_of(page("better"))
    for name in ("study-matched_kl-wins", "study-matched_compute-wins", "study-effort-wins"):
        band, line = figures[name]["traces"]
        assert len(band["x"]) == 2 * len(line["x"]) and band["fill"] == "toself"
        assert figures[name]["layout"]["shapes"][0]["y0"] == 0.5
    one_seed = figures_of(page("one seed"))["study-matched_kl-wins"]
    assert [trace.get("fill") for trace in one_seed["traces"]] == [None]


def test_the_gap_is_a_waterfall_that_ends_at_the_whole_gap() -> None:
    made = CASES["better"]()
    win_rates, scores = study_tables.gaps(made)
    for table in (win_rates, scores):
        total, *way = [bar for bar in table.bars if bar.row["kind"] != "beside"]
        assert (total.start, way[0].start) == (table.zero, table.zero)
        assert [bar.start for bar in way[1:]] == [bar.end for bar in way[:-1]]
        assert way[-1].end == pytest.approx(total.end, abs=0.011)
        assert all(0 <= place <= 100 for bar in table.bars for place in (bar.start, bar.end, bar.low, bar.high))
    text = section(study_page(made, "A"), "controls")
    assert "online DPO → RLOO reinforcement learning in place of the DPO loss" in text and "beside the way" in text
    assert "cannot be split" in section(page("other control"), "controls")


def test_what_lacks_is_said_in_words() -> None:
    kl = section(page("no common KL"), "kl")
    assert "There is no comparison here: the arms share no range of KL" in kl
    one_seed = page("one seed")
    assert "no interval" in section(one_seed, "verdict") and "an arm has one seed" in section(one_seed, "kl")
    assert "Undecided: an arm has one seed." in section(one_seed, "needed")
    one_trial = page("one trial")
    assert "there is no curve over the number of trials" in section(one_trial, "effort")
    assert "At this one point RM + PPO wins" in section(one_trial, "kl")
    few = study_page(document(list(study_rows()), kl_grid=[2.0]), "A")
    assert "fewer than two points of this range, so there is no curve" in section(few, "kl")
    untested = page("untested")
    assert "the best checkpoint of some trial has no test rows" in section(untested, "effort")
    assert "8 of 12 policies have no test rows" in section(untested, "frontier")
    assert "study-frontier-dev-0" in figures_of(untested)


def test_needed_says_how_many_prompts_and_seeds() -> None:
    made = CASES["equal"]()
    made["verdict"]["needed"]["best"] |= {"n_prompts": 1234, "n_prompts_reason": None, "n_seeds": None}
    made["verdict"]["needed"]["best"] |= {"n_seeds_reason": "not even 100 seeds would do with 60 prompts"}
    text = section(study_page(made, "A"), "needed")
    assert "about 1,234 test prompts in place of 60, with the same seeds. Not even 100 seeds would do" in text
    decided = section(page("better"), "needed")
    assert "The end of its interval that is nearest to one half is" in decided
    assert "With the said number, 80% of studies" in text and "With the said number" not in decided


def test_trials_are_listed_with_the_chosen_one_first_in_its_arm() -> None:
    rows = study_tables.trials(CASES["diverged"]())
    assert [row.arm for row in rows] == ["rm_ppo"] * 3 + ["dpo"] * 3
    assert [row.chosen for row in rows] == [True, False, False] * 2
    assert sum(row.n_diverged for row in rows) == 1
    assert rows[0].budget == "200k"
    by_dev = [row.dev[0] for row in rows if row.arm == "dpo"]
    assert by_dev == sorted(by_dev, reverse=True)


def test_judges_stand_side_by_side_and_signals_are_marked() -> None:
    html = page("judges")
    assert "signal" in section(html, "verdict")
    assert {"study-frontier-test-0", "study-frontier-test-1"} <= set(figures_of(html))
    assert "mean score on dev prompts" in section(html, "selection")  # one judge decides
    assert "with a KL of at most 2.5 nats" in section(page("equal"), "selection")


def test_many_warnings_are_folded() -> None:
    made = CASES["equal"]()
    made["warnings"] = [f"warning {k}" for k in range(9)]
    html = study_page(made, "A")
    assert "5 more warnings" in section(html, "verdict") and html.count("<li>warning ") == 9


def test_names_from_the_table_stay_texts() -> None:
    bad = "</script><img src=x onerror=alert(1)>"
    rows = [{**row, "setting": f"{row['setting']} {bad}", "judge": bad} for row in study_rows(arms=(*ARMS, bad))]
    html = study_page(document(rows), bad)
    assert "<img" not in re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)


def write(folder: Path, made: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(made))
    return folder


def test_a_folder_is_read_and_damage_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "pilot", CASES["equal"]())
    assert "<title>Study pilot: RM + PPO against DPO</title>" in build_study(folder)
    assert "<title>Mine</title>" in build_study(folder, title="Mine")
    for report, title in (({}, "Study seven: RM + PPO against DPO"), ({"title": "Ours"}, "Ours")):
        made = CASES["equal"]() | {"recipe": {"name": "seven", "report": report}}
        (folder / "study.json").write_text(json.dumps(made))
        assert f"<title>{title}</title>" in build_study(folder)
        assert "<title>Mine</title>" in build_study(folder, title="Mine")
    for change in ({"schema_version": 99}, {"gap": None}):
        made = CASES["equal"]() | change
        if made["gap"] is None:
            del made["gap"]
        (folder / "study.json").write_text(json.dumps(made))
        with pytest.raises(StoreError, match="another version of duel"):
            read_study_document(folder)
    (folder / "study.json").write_text("{")
    with pytest.raises(StoreError, match=r"study\.json"):
        read_study_document(folder)
