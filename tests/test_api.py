"""duel from Python, as in a notebook: results are mappings, and show themselves as tables."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.finished_study import SMALL_STUDY
from support.running import ROOT, SMALL, duel
from support.running import python as python_process

import toolkit
from toolkit.errors import ModelError
from toolkit.files import file_hash, read_json
from toolkit.progress import Reporter
from toolkit.storage.integrity import read_sealed

pytestmark = pytest.mark.e2e

SETTINGS = {name: int(value) for name, value in (text.removeprefix("--set=").split("=") for text in SMALL)}
RECORDS = [
    {"prompt": f"I thought that the film number {k} was", "chosen": " good <b>fun</b>.", "rejected": " a long bore."}
    for k in range(6)
]


def cells(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_importing_the_package_is_light() -> None:
    code = "import sys, toolkit; print(dir(toolkit)); print({'torch', 'pandas', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[1] == "set()" and "'implicit_rewards'" in done.stdout
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        _ = toolkit.train


def test_run_continues_a_run_of_the_command_line(small_run: Path) -> None:
    result = toolkit.run("smoke", out=small_run, settings=SETTINGS)
    results = json.loads((small_run / "results.json").read_text())
    assert {key: result[key] for key in results} == results
    assert (result["out"], result["status"]) == (str(small_run), "done")
    html = result._repr_html_()
    assert results["verdict"]["sentence"] in html and "<script" not in html
    row = next(row for row in results["policies"] if row["policy"] == "dpo")
    assert ["DPO", f"{row['gold_reward']['value']:.3f}"] in [row[:2] for row in cells(html)]
    assert str(result).endswith(results["verdict"]["sentence"]) and f"{row['kl_nats']:.2f}" in str(result)


def test_a_run_records_the_call_that_makes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything that was given: the data, which lies in the run folder, the folder and where it stops."""
    monkeypatch.chdir(tmp_path)
    settings = {"data.eval_fraction": 0.4}
    toolkit.run("smoke", data=RECORDS, out=Path("mine"), settings=settings, until="data", reporter=Reporter(quiet=True))
    python, option, code = read_json(Path("mine/manifest.json"))["command"]
    assert (python, option) == ("python", "-c") and "data='mine/records.jsonl', out='mine'" in code
    made = file_hash(Path("mine/data/train.parquet"))
    shutil.rmtree("mine/data")
    python_process(option, code)
    manifest = read_json(Path("mine/manifest.json"))
    assert file_hash(Path("mine/data/train.parquet")) == made and list(manifest["stages"]) == ["data"]
    assert manifest["command"][-1] == code and not Path("runs").exists()


def test_rewards_of_records(small_run: Path, tmp_path: Path) -> None:
    policy, reference = (str(small_run / arm / "model") for arm in ("dpo", "sft"))
    result = toolkit.implicit_rewards(policy, reference, RECORDS, beta=0.5)
    (tmp_path / "records.jsonl").write_text("the user's own", encoding="utf-8")
    written = toolkit.implicit_rewards(policy, reference, RECORDS, beta=0.5, out=tmp_path / "kept.parquet")
    assert written["rows"] == result["rows"]
    assert (tmp_path / "records.jsonl").read_text(encoding="utf-8") == "the user's own"
    assert result["n_prompts"] == 6 and result["beta"] == 0.5 and result["out"] is None
    assert [row["label"] for row in result["rows"][:2]] == ["chosen", "rejected"]
    first = result["rows"][0]
    expected = 0.5 * (first["policy_logp"] - first["reference_logp"])
    assert first["implicit_reward"] == pytest.approx(expected)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    command = ["rewards", "--policy", policy, "--reference", reference, "--data", str(tmp_path / "pairs.jsonl")]
    duel(*command, "--beta", "0.5", "--out", str(tmp_path / "rewards.parquet"))
    summary = json.loads((tmp_path / "rewards.summary.json").read_text())
    assert summary["accuracy"] == result["accuracy"]
    assert ["pairwise accuracy", f"{result['accuracy']:.1%}"] in [row[:2] for row in cells(result._repr_html_())]
    with pytest.raises(ModelError, match="trained against a reference"):
        toolkit.implicit_rewards(policy, str(small_run / "dpo" / "model"), RECORDS)


def test_compare_and_what_it_leaves_behind(small_run: Path, tmp_path: Path) -> None:
    policies = [str(small_run / arm / "model") for arm in ("dpo", "sft")]
    options = {"judge": "gold", "max_new_tokens": 8, "limit": 4}
    result = toolkit.compare(*policies, data="reviews", **options)
    assert [(row["policy"], row["baseline"], row["n_prompts"]) for row in result["win_rates"]] == [(*policies, 4)]
    assert len(result["samples"]) == 8 and {row["policy"] for row in result["samples"]} == set(policies)
    written = toolkit.compare(*policies, data="reviews", out=tmp_path / "kept", **options)
    assert written == result and (tmp_path / "kept" / "judgements.parquet").is_file()
    shorter = toolkit.compare(*policies, data="reviews", out=tmp_path / "kept", **{**options, "limit": 2})
    assert len(shorter["samples"]) == 4  # not those of the earlier call, which lie there too
    assert f"{result['win_rates'][0]['win_rate']:.1%}" in result._repr_html_()


def test_texts_stay_texts() -> None:
    from toolkit.api import Result
    from toolkit.report.sheets import Sheet

    shown = Result({}, [Sheet("<i>", ["<b>"], [("<script>alert(1)</script>",)])], "a & b")._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "a &amp; b" in shown and "<i>" not in shown


def test_study_goes_on_with_one_of_the_command_line(
    small_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(small_study, tmp_path / "study")
    settings = dict(text.removeprefix("--set=").split("=") for text in SMALL_STUDY if text.startswith("--set="))
    numbers = {name: int(value) for name, value in settings.items() if value.isdigit()}
    result = toolkit.study(
        "study-tiny",
        out=out,
        settings={**numbers, "study.controls": ["online_dpo"], "study.seeds": 2, "study.trials": 2},
    )
    written = read_sealed(out / "study.json")
    assert {key: result[key] for key in written} == written and result["out"] == str(out)
    assert str(result).endswith(written["verdict"]["sentence"]) and "Chosen on dev prompts" in str(result)
    html = result._repr_html_()
    best = written["verdict"]["best"]
    assert f"{best['win_rate']:.1%}" in html and "<caption>Where the gap comes from" in html
    lines = capsys.readouterr().err
    assert "cached" not in lines and "taken from" not in lines  # all is there, and nobody needs to be told 40 times
