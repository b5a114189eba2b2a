"""Several runs on one page."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from plotly.offline import get_plotlyjs
from support.report_page import ALL_SECTIONS, build, data_of, sections, text_of

from toolkit.errors import StoreError
from toolkit.report import plots, reading
from toolkit.report.figures import overlaid
from toolkit.report.writing import write_page


def test_two_runs_side_by_side(run, no_gold):
    html = build(run, no_gold, title="both")
    assert sections(html) == ["verdict", "between", *ALL_SECTIONS[1:]]
    between = text_of(html, "between")
    assert "dpo.beta 0.1 0.2" in between and "seed 0 1" in between and "ppo." not in between
    browser = data_of(html, "sample-data")
    assert browser["runs"] == ["run", "other"] and len(browser["columns"]) == 12
    assert {c["label"] for c in browser["columns"] if c["shown"]} == {
        *("RM + PPO · run", "DPO · run", "RM + PPO · other", "DPO · other")
    }
    assert all(cell is not None for cell in browser["rows"][0]["cells"])
    figures = data_of(html, "figure-data")["figures"]
    assert {name[:4] for name in figures} == {"all-", "run0", "run1"}
    assert html.count(get_plotlyjs()[:2000]) == 1


def test_a_sweeps_folder_stands_for_its_runs_wherever_it_lies(run, no_gold, tmp_path):
    for name, folder in (("beta=0.1", run), ("beta=0.2", no_gold)):
        shutil.copytree(folder, tmp_path / name)
    runs = [{"out": f"/somewhere/else/{name}"} for name in ("beta=0.1", "beta=0.2")]
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    page = write_page([tmp_path], None, None, 10, False)
    assert page == tmp_path / "report.html"
    alone = build(tmp_path / "beta=0.1", tmp_path / "beta=0.2")
    assert data_of(page.read_text(encoding="utf-8"), "figure-data") == data_of(alone, "figure-data")
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": []}))
    with pytest.raises(StoreError, match="no finished run"):
        write_page([tmp_path], None, None, 10, False)


def test_runs_of_one_name_are_told_apart(run):
    names = [loaded.name for loaded in reading.read_runs([run, run])]
    assert names == ["run (1)", "run (2)"]


def test_runs_side_by_side_stand_in_one_frontier_each_with_its_dash(run, no_gold):
    figures = data_of(build(run, no_gold), "figure-data")["figures"]
    alone = [data_of(build(folder), "figure-data")["figures"] for folder in (run, no_gold)]
    assert not any(name.startswith(("run0-frontier", "run1-frontier", "run0-length")) for name in figures)
    together, first, second = (
        page[f"{prefix}-frontier-explicit_reward"]["traces"]
        for prefix, page in (("all", figures), ("run0", alone[0]), ("run0", alone[1]))
    )
    assert [(t["x"], t["y"], t["error_y"]) for t in together] == [
        (t["x"], t["y"], t["error_y"]) for t in first + second
    ]
    assert [trace["meta"] for trace in together] == ["run"] * len(first) + ["other"] * len(second)
    assert [trace["name"] for trace in together] == [trace["name"] for trace in first + second]
    for name, dash in (("run", "solid"), ("other", "dash")):
        lines = [trace for trace in together if "lines" in trace["mode"] and trace["meta"] == name]
        assert {trace["line"]["dash"] for trace in lines} == {dash}
    assert "all-frontier-gold_reward" in figures  # one of the runs has gold


def test_a_judges_figure_has_the_runs_that_it_judged(run, no_gold):
    """The first judge of one is gold, that of the other is rm."""
    together = overlaid({folder.name: plots.frontier(reading.read_run(folder)) for folder in (run, no_gold)})
    runs_of = {figure.title: {trace["meta"] for trace in figure.traces} for figure in together}
    title = "Win rate over SFT against KL, judge "
    assert {name.removeprefix(title): runs for name, runs in runs_of.items() if name.startswith(title)} == {
        "gold": {"run"},
        "rm": {"run", "other"},
        "implicit": {"other"},
    }
    assert len({figure.id for figure in together}) == len(together)


def test_every_figure_of_two_runs_is_one_but_for_the_margins_which_share_their_axes(run, no_gold):
    page = build(run, no_gold)
    figures = data_of(page, "figure-data")["figures"]
    alone = data_of(build(run), "figure-data")["figures"]
    assert {name for name in figures if name.startswith("run")} == {"run0-margins", "run1-margins"}
    names = {*alone, *data_of(build(no_gold), "figure-data")["figures"]}
    assert {name.removeprefix("run0-") for name in names} - {"margins"} == {
        name.removeprefix("all-") for name in figures if name.startswith("all-")
    }
    first, second = (figures[f"run{k}-margins"] for k in (0, 1))
    for axis in ("xaxis", "yaxis"):
        assert first["layout"][axis]["range"] == second["layout"][axis]["range"]
    low, high = first["layout"]["yaxis"]["range"]
    assert all(low < value < high for trace in (*first["traces"], *second["traces"]) for value in trace["y"])
    ranges = [
        data_of(build(folder), "figure-data")["figures"]["run0-lengths"]["layout"]["xaxis"]["range"]
        for folder in (run, no_gold)
    ]
    assert figures["all-lengths"]["layout"]["xaxis"]["range"] == [0, max(high for _, high in ranges)]
    for section in ("frontier", "overoptimization", "quality", "lengths", "training"):
        body = page.split(f'<section id="{section}"')[1].split("</section>")[0]
        assert body.count('data-run="run"') == 1 == body.count('data-run="other"')
    kl = figures["all-ppo-objective-kl"]
    assert [(trace["name"], trace["meta"], trace["line"]["dash"]) for trace in kl["traces"]] == [
        ("KL", "run", "solid"),
        ("KL", "other", "dash"),
    ]


def test_what_runs_have_in_common_is_shown_once(run, copy, no_gold):
    page = build(run, copy, no_gold)
    quality = text_of(page, "quality")
    assert quality.count("accuracy on the labels") == 2 and "run · copy" in quality
    assert text_of(build(run, copy), "quality").count("accuracy on the labels") == 1
    assert "The same in both runs" in text_of(build(run, copy), "drift")
    figures = data_of(page, "figure-data")["figures"]
    assert {name for name in figures if name.startswith("run")} == {"run0-margins", "run2-margins"}


def test_more_than_two_runs_have_a_row_each_and_a_choice_whose_tables_to_show(run, copy, no_gold):
    page = build(run, copy, no_gold)
    verdict = text_of(page, "verdict")
    results = json.loads((run / "results.json").read_text())["verdict"]
    row = f"run {results['sentence'].partition(': ')[0]} gold {results['win_rate']:.1%}"
    assert row in verdict and "other Undecided –" in verdict
    assert re.findall(r'<option value="(\d*)"', page.split('id="run-choice"')[1].split("</select>")[0]) == ["", *"012"]
    assert 'id="run-choice"' not in build(run, no_gold)
