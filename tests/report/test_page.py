"""The HTML report: what is on the page, what is left out, and that texts of models and data stay texts."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from support.report_page import ALL_SECTIONS, build, data_of, sections, text_of, warnings_of, without_plotly
from support.run_folder import HOSTILE, write_run

from toolkit.cli.tables import result_tables
from toolkit.errors import StoreError
from toolkit.evals.best_of_n import best_of_n_curve
from toolkit.evals.judge_tests import LabelledPair, judge_test
from toolkit.evals.label_references import label_references
from toolkit.evals.overoptimization import fit_overoptimization
from toolkit.evals.temperatures import side_by_side
from toolkit.progress import Reporter
from toolkit.recipe.schema import ReportSection
from toolkit.report import plots, provenance, reading, tables
from toolkit.report.names import policy_name
from toolkit.report.page import page_of
from toolkit.report.render import embedded
from toolkit.stages import report as report_stage
from toolkit.stages.contexts import ReportContext

# ---------------------------------------------------------------- what is shown


def test_every_section_of_a_full_run(run):
    html = build(run)
    assert sections(html) == ALL_SECTIONS
    assert re.findall(r'<li><a href="#([^"]+)"', html) == ALL_SECTIONS
    wanted = set(re.findall(r'data-figure="([^"]+)"', html))
    assert wanted == set(data_of(html, "figure-data")["figures"]) and len(wanted) > 20


def test_the_numbers_are_those_of_results_json(run):
    html, results = build(run), json.loads((run / "results.json").read_text())
    rates = text_of(html, "win-rates")
    assert len(results["win_rates"]) > 10
    for row in results["win_rates"]:
        interval = f"{100 * row['ci_low']:.1f} to {100 * row['ci_high']:.1f}"
        assert f"{row['win_rate']:.1%} {interval}" in rates
    verdict = text_of(html, "verdict")
    for row in results["policies"]:
        if row["kind"] == "final":
            assert f"{row['explicit_reward']['value']:.2f}".replace("-", "−") in verdict
    assert text_of(html, "win-rates").count("vs SFT") + 2 == len(results["win_rates"])  # 2 judges on the arms


def test_the_confidence_of_the_intervals_has_all_its_digits(copy, run):
    results = json.loads((copy / "results.json").read_text())
    results["recipe"]["evaluate"]["confidence"] = 0.975
    (copy / "results.json").write_text(json.dumps(results))
    assert "its 97.5% interval over prompts" in " ".join(build(copy).split())
    assert "its 95% or 97.5% interval over prompts" in " ".join(build(run, copy).split())


def test_tokens_that_differ_in_kind_are_not_added_up(run):
    results = json.loads((run / "results.json").read_text())["cost"]
    cost = text_of(build(run), "cost")
    assert "tokens trained" in cost and "33,000" in cost and "24,000" in cost
    total = sum(row["tokens"] for row in results["stages"])
    assert f"{total:,}" not in cost and "in all 5m 39s –" in cost


def test_data_model_and_seed_are_in_the_title_or_below_it(run, no_gold, copy):
    below = '\n<p class="subject">reviews, tiny, seed 0</p>'
    assert f"<h1>Smoke test: DPO and RM + PPO on the tiny model</h1>{below}" in build(run)  # the recipe's title
    assert f"<h1>mine</h1>{below}" in build(run, title="mine")
    assert '<p class="subject">reviews, tiny, seed 0 · reviews, tiny, seed 1</p>' in build(run, no_gold)
    results = json.loads((copy / "results.json").read_text())
    results["recipe"]["data"]["source"] = "/home/me/data/pairs.jsonl"
    results["recipe"]["model"]["name"] = "org/model"
    (copy / "results.json").write_text(json.dumps(results))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["recipe"]["report"]["title"] = None
    (copy / "manifest.json").write_text(json.dumps(manifest))
    html, title = build(copy), "DPO and RM + PPO on data/pairs.jsonl, org/model, seed 0"
    assert f"<title>{title}</title>" in html and f"<h1>{title}</h1>" in html and 'class="subject"' not in html


def test_the_verdict_names_the_cost_and_what_to_do_next(run, no_gold, copy):
    verdict = text_of(build(run), "verdict")
    cost = (
        "RM + PPO took 230 s (its reward model included), DPO 40 s. "
        "They trained on 33,000 and 24,000 response tokens (each pass counts)."
    )
    results = json.loads((run / "results.json").read_text())
    assert cost == results["cost"]["sentence"] and cost in verdict
    assert f"Next: {results['verdict']['next_step']}" in verdict
    assert "Next: Name an independent judge" in text_of(build(no_gold), "verdict")
    for part, key in (("cost", "sentence"), ("verdict", "next_step")):  # as a run of an earlier duel
        del results[part][key]
    (copy / "results.json").write_text(json.dumps(results))
    assert "Next:" not in text_of(build(copy), "verdict")


def test_what_the_arms_differ_in_stands_at_the_verdict_and_not_among_the_warnings(run, copy):
    html, results = build(run), json.loads((run / "results.json").read_text())
    verdict, warnings = text_of(html, "verdict"), warnings_of(html)
    labels = [row["label"] for row in results["arm_differences"]]
    assert labels[0].startswith("the KL that they reached") and labels[1].startswith("the weight of the KL")
    places = [verdict.index(label) for label in labels]
    assert places == sorted(places) and "112 200 differs" in verdict and "1 1 equal" in verdict
    assert sum(text.startswith("the arms differ") for text in results["warnings"]) > 3
    assert "the arms differ" not in warnings and "a &lt;b&gt;warning" in warnings
    del results["arm_differences"]  # as a run of an earlier duel
    (copy / "results.json").write_text(json.dumps(results))
    html = build(copy)
    assert "what the verdict compares" not in html and "the arms differ in" in warnings_of(html)


def test_beside_the_win_rate_stands_that_of_the_prompts_that_both_ended(run):
    html, results = build(run), json.loads((run / "results.json").read_text())
    rows, verdict = results["verdict"]["both_ended"], text_of(html, "verdict")
    assert [row["judge"] for row in rows] == ["gold", "rm"]
    for row in rows:
        shown = f"{row['win_rate']:.1%} {100 * row['ci_low']:.1f} to {100 * row['ci_high']:.1f} · {row['n_judged']}"
        assert 0 < row["n_judged"] < 24 and f"where both ended their responses: {shown} prompts" in verdict


def test_checkpoints_on_fewer_prompts_are_said_once_beside_the_frontier(run, copy):
    results = json.loads((copy / "results.json").read_text())
    most = max(row["n_prompts"] for row in results["policies"])
    for row in results["policies"]:
        row["n_prompts"] = 5 if row["kind"] in ("base", "checkpoint") else row["n_prompts"]
    (copy / "results.json").write_text(json.dumps(results))
    html = build(copy)
    assert f"Means over prompts: checkpoints on 5 of {most}." in text_of(html, "frontier")
    assert f"on 5 of {most}" not in text_of(html, "verdict")  # its table has a column of prompts
    assert "Means over prompts" not in build(run)


def test_a_length_controlled_rate_says_which_one_it_is_or_why_there_is_none(copy):
    results = json.loads((copy / "results.json").read_text())
    rates = text_of(build(copy), "win-rates")
    assert "at equal length by length alone" in rates and "No length-controlled win rate" not in rates
    row = results["win_rates"][0]
    results["win_rates"][0] = {
        **row,
        "lc_win_rate": None,
        "lc_ci_low": None,
        "lc_ci_high": None,
        "lc_reason": "no overlap",
    }
    (copy / "results.json").write_text(json.dumps(results))
    where = f"{policy_name(row['policy'])} against {policy_name(row['baseline'])}, judge {row['judge']}"
    assert f"No length-controlled win rate: no overlap ({where})." in text_of(build(copy), "win-rates")


def test_the_verdict_is_the_sentence_of_the_results(copy):
    results = json.loads((copy / "results.json").read_text())
    facts = {"judge": "gold", "win_rate": 0.52, "ci_low": 0.4, "ci_high": 0.64, "p_value": 0.7, "n_judged": 100}
    sentence = "Undecided: the interval contains one half. 100 prompts see a difference of 14.0 points or more."
    results["verdict"] = {**facts, "winner": "undecided", "sentence": sentence}
    (copy / "results.json").write_text(json.dumps(results))
    verdict = text_of(build(copy), "verdict")
    assert "The interval contains one half. 100 prompts see a difference of 14.0 points or more." in verdict


def test_without_a_neutral_judge_the_judges_are_shown_as_signals(no_gold):
    result = tables.verdict(reading.read_run(no_gold))
    assert result.winner == "undecided"
    assert [row.signal != "" for row in result.judges] == [True, True]


def test_a_judges_test_and_the_warnings_stand_beside_the_verdict(copy):
    results = json.loads((copy / "results.json").read_text())
    assert results["judge_tests"] == []  # this folder is made without judges
    pairs = [LabelledPair(f"p{k}", 1.0, 1.0) for k in range(40)]
    tests = [
        judge_test("gold", pairs, [(1.0, 0.0)] * 20 + [(1.0, 1.0)] * 20, n_resamples=100),
        judge_test("rm", pairs, [(1.0,)] * 40, n_resamples=100),
    ]
    results |= {"judge_tests": [asdict(test) for test in tests], "warnings": ["the reward model is no better"]}
    (copy / "results.json").write_text(json.dumps(results))
    html = build(copy)
    verdict, rates = text_of(html, "verdict"), text_of(html, "win-rates")
    assert "the reward model is no better" in verdict
    assert "right on 75.0%" in verdict and "of held-out labels" in verdict and "right on 100.0%" in verdict
    assert "gold 75.0%" in rates and "passed" in rates and "50.0%" in rates
    printed = result_tables(results)
    assert "Judges on held-out labels" in printed and re.search(r"gold +75\.0% .*50\.0%.* 40\n", printed)
    assert re.search(r"judge +test\ngold +passed\n", printed)  # folded below: the table is wider than the page


@pytest.mark.usefixtures("wide_terminal")
def test_accuracies_and_losses_have_their_references_beside_them(copy):
    quality = text_of(build(copy), "quality")
    assert "explicit reward implicit reward gold reward a coin" in quality and "accuracy against gold" in quality
    assert "no pair has labels that disagree" in quality  # labels by one annotator
    results = json.loads((copy / "results.json").read_text())
    soft = label_references([(0, 0, 1, 0.5, 2.0), (1, 0, 1, 1.0, 2.0)], [[0.0, 0.0]] * 2, n_resamples=50)
    for part in ("explicit", "implicit"):
        results["rm_quality"][part]["references"] = soft
    (copy / "results.json").write_text(json.dumps(results))
    html = build(copy)
    assert "best on these labels a coin" in text_of(html, "quality") and "0.693" in text_of(html, "quality")
    assert "best accuracy that the labels allow 75.0%" in text_of(html, "agreement")
    printed = result_tables(results)
    assert re.search(r"best on these labels +75\.0% .*0\.347 +0\.125 +0\.000", printed)
    assert re.search(r"a coin +50\.0% .*0\.693 +0\.250 +0\.000", printed)
    assert re.search(r"gold +100\.0%", printed)  # these labels are gold's
    del results["rm_quality"]["explicit"]["references"], results["rm_quality"]["gold"]  # as an earlier duel wrote
    (copy / "results.json").write_text(json.dumps(results))
    assert "a coin" not in text_of(build(copy), "quality") and "a coin " not in result_tables(results)


def test_a_run_without_gold(no_gold, run):
    heads = [
        result_tables(json.loads((folder / "results.json").read_text())).splitlines()[1] for folder in (no_gold, run)
    ]
    assert [line.split()[1] for line in heads] == ["RM", "gold"]
    html = build(no_gold)
    assert sections(html) == ALL_SECTIONS
    shown = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert "gold reward" not in shown and "largest gold margin" not in shown
    assert not re.search(r">\s*(None|nan|NaN|null|undefined)\s*<", shown)
    browser = data_of(html, "sample-data")
    assert browser["flags"]["gold"] == 0 and browser["rows"][0]["cells"][0][0][3] is None
    assert "frontier-gold_reward" not in html and "run0-frontier-explicit_reward" in html


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (["sft", "reward_model", "ppo", "dpo"], {"training"}),
        (["manifest.json", "data", "evaluate/data_report.json"], {"reproduction"}),
        (["judgements.parquet"], set()),
    ],
)
def test_a_section_without_data_is_left_out(copy, missing, gone):
    for name in missing:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    html = build(copy)
    assert set(sections(html)) == set(ALL_SECTIONS) - gone
    assert not any(f'href="#{name}"' in html for name in gone)


@pytest.mark.parametrize(
    ("key", "empty", "gone"),
    [
        ("cost", None, "cost"),
        ("recipe", None, "settings"),
        ("hacking", {}, "drift"),
        ("rm_quality", {}, "quality"),
        ("implicit_vs_explicit", None, "agreement"),
        ("overoptimization", {}, "overoptimization"),
        ("frontier", [], "frontier"),
        ("win_rates", [], "win-rates"),
    ],
)
def test_an_empty_part_of_results_is_left_out(copy, key, empty, gone):
    results = json.loads((copy / "results.json").read_text())
    results[key] = empty
    (copy / "results.json").write_text(json.dumps(results))
    assert gone not in sections(build(copy)) and "verdict" in sections(build(copy))


NOISE = {"explicit": 1.0, "implicit": 3.0}


def best_of_n_results(n_max: int = 64, *, exact: bool = False) -> list[dict[str, Any]]:
    """Both rewards pick among 64 samples for each of 12 prompts; gold and the rewards measure."""
    generator = np.random.default_rng(0)
    gold = generator.normal(size=(12, n_max))
    values = {name: gold + noise * generator.normal(size=gold.shape) for name, noise in NOISE.items()}
    kl_nats = [0.1 * n for n in range(n_max)] if exact else None
    return [
        {"picked_by": picks, "measured_by": measures, **point.as_dict()}
        for picks, picked in values.items()
        for measures, measured in {"gold": gold, **values}.items()
        for point in best_of_n_curve(picked, measured, n_max, exact_kl_nats=kl_nats, n_resamples=200)
    ]


@pytest.mark.parametrize("exact", [False, True])
def test_the_best_of_n_is_drawn_against_its_kl(copy, exact):
    assert "best-of-n" not in sections(build(copy))
    path = copy / "results.json"
    rows = best_of_n_results(exact=exact)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"best_of_n": rows}))
    html = build(copy)
    assert "best-of-n" in sections(html)
    drawn = plots.best_of_n(reading.read_run(copy))
    assert [figure.name for figure in drawn] == [f"best-of-n-{name}_reward" for name in ("gold", *NOISE)]
    for figure in drawn:
        assert [trace["name"] for trace in figure.traces] == [f"picked by the {name} reward" for name in NOISE]
    [by_explicit, _] = drawn[0].traces
    of_line = [row for row in rows if (row["picked_by"], row["measured_by"]) == ("explicit", "gold")]
    assert by_explicit["text"] == ["1", "2", "4", "8", "16", "32", "64"] == [str(row["n"]) for row in of_line]
    assert by_explicit["x"] == pytest.approx([row["kl_nats"] for row in of_line], rel=1e-4)
    assert by_explicit["y"] == pytest.approx([row["value"] for row in of_line], rel=1e-4)
    assert by_explicit["marker"]["symbol"] == ("circle" if exact else "circle-open")
    assert "An open point stands at an upper bound of its KL" in text_of(html, "best-of-n")
    assert by_explicit["hovertext"][-1].count("at most") == (not exact)
    top = of_line[-1]["ci_high"] - of_line[-1]["value"]
    assert by_explicit["error_y"]["array"][-1] == pytest.approx(top)


@pytest.mark.usefixtures("wide_terminal")
def test_win_rates_by_sampling_temperature(copy):
    """A run with one temperature has no such section; with several, the terminal and the page show them alike."""
    assert "temperatures" not in sections(build(copy))
    path = copy / "results.json"
    results = json.loads(path.read_text())
    rates = [row for row in results["win_rates"] if row["policy"] in ("rm_ppo", "dpo") and row["judge"] == "gold"]
    entry = {"n_prompts": 24, "policies": results["policies"], "win_rates": rates}
    colder = [
        row | ({"win_rate": 0.31, "ci_low": 0.2, "ci_high": 0.42} if row["baseline"] == "dpo" else {}) for row in rates
    ]
    entries = [entry | {"temperature": 1.0}, entry | {"temperature": 0.7, "win_rates": colder}]
    results["temperatures"], _ = side_by_side(entries, 1.0, "gold")
    path.write_text(json.dumps(results))
    page, terminal = text_of(build(copy), "temperatures"), result_tables(results)
    assert (
        "0.7 gold DPO ½ RM + PPO" not in page
        and "0.7 gold 31.0% 20.0 to 42.0" in page
        and "1.0 the verdict's gold" in page
    )
    assert "At temperature 0.7 DPO is ahead (RM + PPO wins 31.0%, 20.0% to 42.0%), at 1.0 RM + PPO is (" in page
    row = next(line for line in terminal.splitlines() if line.startswith("0.7 "))
    assert row.split()[1:6] == ["gold", "31.0%", "20.0%", "to", "42.0%"]
    assert any(line.startswith("1.0* ") for line in terminal.splitlines())
    change = results["temperatures"][0]["order_change"]  # the interval at 1.0 contains one half
    assert not change["sure"] and f"note: {change['sentence']}" in " ".join(terminal.split())
    change["sure"] = True  # then it is one of the warnings, and is not said twice
    assert "note: at temperature" not in result_tables(results)
    for part in results["temperatures"]:
        part["win_rates"] = []
    path.write_text(json.dumps(results))
    assert "None" not in text_of(build(copy), "temperatures") and "0.7  " in result_tables(results)


def test_nulls_of_a_single_prompt_run(tmp_path):
    one = write_run(tmp_path / "one", n_prompts=2, checkpoints=1)
    results = json.loads((one / "results.json").read_text())
    for row in results["win_rates"]:
        row |= dict.fromkeys(
            ("win_rate", "win", "tie", "loss", "ci_low", "ci_high", "p_value", "holm_p", "detectable_effect")
        )
    (one / "results.json").write_text(json.dumps(results))
    html = build(one)
    assert (
        "No curve is fitted to RM + PPO (gold reward, explicit reward, implicit reward) or DPO (gold reward, "
        "explicit reward): a fit of two parameters takes at least 4 policies that are more than 0.05 nats from SFT, "
        "and here 1 is." in text_of(html, "overoptimization")
    )
    assert "–" in text_of(html, "win-rates") and "None" not in text_of(html, "win-rates")


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([1.0, 1.0221, 0.8910, 0.3633], "the fitted curve peaks at 1.65 nats, and the arm went to 9.00."),
        ([1.0, 1.3, 1.7, 2.3], "the fitted curve still rises at 9.00 nats, where the arm ends."),
        (
            [-0.1, -0.4, -1.0, -2.0],
            "the reward falls almost from the start: the fitted curve peaks at 0.08 nats, and the arm went to 9.00.",
        ),
        ([1.0, 1.6, 2.8, 5.0], "the fitted curve has no peak."),
        ([-1.0, -1.3, -1.5, -1.2], "the fitted curve has no peak: it is below SFT at 9.00 nats, where the arm ends."),
    ],
)
def test_a_fitted_curve_in_words(gains, words, copy):
    results = json.loads((copy / "results.json").read_text())
    part = results["overoptimization"]["rm_ppo"]
    part["fits"]["gold_reward"]["rl"] = fit_overoptimization([1.0, 2.0, 4.0, 9.0], gains, kind="rl")
    part["rows"][-1] |= {"kl_nats": 9.0, "sqrt_kl": 3.0}
    (copy / "results.json").write_text(json.dumps(results))
    assert f"RM + PPO, gold reward: {words}" in text_of(build(copy), "overoptimization")


def test_the_drift_table_has_the_range_of_what_differs_by_policy(copy):
    results = json.loads((copy / "results.json").read_text())
    for name, rows in results["hacking"].items():
        of_sft = {"distinct_1": 0.9 if name == "dpo" else 0.95, "n_words": 12.0}
        for row in rows:
            row["sft"] = of_sft.get(row["feature"], row["sft"])
    (copy / "results.json").write_text(json.dumps(results))
    drift = text_of(build(copy), "drift")
    assert "distinct words in a response 90.0% to 95.0%" in drift and "length in words 12.00 " in drift


def test_settings_that_changed_after_the_evaluation_are_named(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["recipe"]["dpo"]["beta"] = 0.7
    manifest["recipe"]["report"]["max_samples"] = 3
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert reading.outdated(reading.read_run(copy)) == ["dpo"]
    assert "recipe has changed since (dpo)" in text_of(build(copy), "verdict")


def test_differences_between_the_arms(run):
    result = provenance.settings(reading.read_run(run))
    assert result is not None
    assert [row.name for row in result.shared if row.differs] == ["learning_rate", "adam_epsilon"]
    assert "beta" in dict(result.dpo) and "kl_coef" in dict(result.ppo)


# ---------------------------------------------------------------- untrusted text, size, no request


def test_hostile_text_stays_text(hostile):
    html = build(hostile, title="<i>&\"' {{ 7 * 7 }}")
    plain = without_plotly(html)
    assert len(re.findall(r"<script", plain, re.IGNORECASE)) == 4 == len(re.findall(r"</script", plain, re.IGNORECASE))
    assert "<img" not in plain and "<i>&" not in plain and "<!-- <script" not in plain
    assert "<title>&lt;i&gt;&amp;&#34;&#39; {{ 7 * 7 }}</title>" in plain
    assert "a &lt;b&gt;warning&lt;/b&gt;" in plain
    browser = data_of(html, "sample-data")
    for row, text in zip(browser["rows"], HOSTILE, strict=False):
        assert row["cells"][0][0][0] == text  # whole, not cleaned


def test_a_normal_run_stays_below_6_mb_and_asks_nobody(tmp_path):
    folder = write_run(tmp_path / "run", n_prompts=300, words=60, judge_names=("gold",), checkpoints=1)
    html = build(folder)
    assert len(html.encode()) < 6_000_000
    page = re.sub(r'<script type="application/json".*?</script>', "", without_plotly(html), flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!\#|data:)""", page)
    assert not re.search(r"https?://|@import|url\(|\bfetch\(|XMLHttpRequest|import\(", page)


def test_at_most_so_many_prompts(run):
    html = build(run, max_samples=5)
    browser = data_of(html, "sample-data")
    assert len(browser["rows"]) == 5 and browser["total"] == 24
    assert "The first 5 of 24 held-out prompts" in text_of(html, "samples")


def test_as_many_prompts_as_the_newest_recipe_says(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["recipe"]["report"] |= {"max_samples": 3, "title": "The newest title"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    html = build(copy, max_samples=None)
    assert len(data_of(html, "sample-data")["rows"]) == 3 and "<h1>The newest title</h1>" in html
    assert len(data_of(build(copy, max_samples=5), "sample-data")["rows"]) == 5


# ---------------------------------------------------------------- errors and the stage


def test_a_folder_without_an_evaluation(tmp_path):
    with pytest.raises(StoreError, match="no finished evaluation"):
        build(tmp_path)
    with pytest.raises(StoreError, match="no run folder"):
        build()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", b"{", "damaged"),
        ("manifest.json", b"\xff\xfe", "damaged"),
        ("samples.parquet", b"no table", "cannot be read"),
        ("samples.parquet", None, "missing"),
    ],
)
def test_damaged_files_are_named(copy, name, content, message):
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    with pytest.raises(StoreError, match=message) as caught:
        build(copy)
    assert name in caught.value.where


def test_the_stage_writes_the_page(run, tmp_path, capsys):
    context = ReportContext(name="smoke", report=ReportSection(title="A <title>", max_samples=4))
    names = ("data", "sft", "reward_model", "ppo", "dpo", "evaluate", "results.json", "manifest.json")
    inputs = {name: run / name for name in (*names, "recipe.resolved.yaml")}
    assert report_stage.run(context, inputs, tmp_path, Reporter()) == {"tokens": 0}
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>A &lt;title&gt;</h1>" in html and len(data_of(html, "sample-data")["rows"]) == 4
    assert capsys.readouterr().err == ""


def test_a_page_has_the_samples_that_fit_into_its_size(run, monkeypatch):
    whole = build(run)
    rows = data_of(whole, "sample-data")["rows"]
    assert len(rows) == 24
    monkeypatch.setattr("toolkit.report.page.LARGEST", len(whole.encode()) - 1)
    fewer = data_of(build(run), "sample-data")
    assert fewer["rows"] == rows[:23] and fewer["total"] == 24 and "The first 23 of 24 held-out prompts" in build(run)
    half = len(whole.encode()) - sum(len(json.dumps(row, ensure_ascii=False).encode()) for row in rows) // 2
    monkeypatch.setattr("toolkit.report.page.LARGEST", half)
    assert len(build(run).encode()) <= half and 2 <= len(data_of(build(run), "sample-data")["rows"]) < 23
    monkeypatch.setattr("toolkit.report.page.LARGEST", 1000)
    assert data_of(build(run), "sample-data")["rows"] == rows[:1]


@pytest.mark.parametrize("response", ["plain", "<p>&" * 200, "\u8a9e" * 200])
def test_samples_count_with_the_bytes_that_they_take_on_the_page(run, monkeypatch, response):
    [loaded] = reading.read_runs([run])
    loaded.samples[:] = [replace(sample, response=response) for sample in loaded.samples]
    whole = page_of([loaded], None, 500)
    rows = data_of(whole, "sample-data")["rows"]
    largest = len(whole.encode()) - sum(len(embedded(row).encode()) for row in rows[-3:])
    monkeypatch.setattr("toolkit.report.page.LARGEST", largest)
    html = page_of([loaded], None, 500)
    # One more than these three: that it has the first of them only is said on the page, too.
    assert len(html.encode()) <= largest and data_of(html, "sample-data")["rows"] == rows[:-4]
