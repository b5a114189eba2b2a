"""``duel rewards``: the same numbers as one response at a time in fp64, however they are computed, and never twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.running import command, duel, duel_process, environment

from toolkit import implicit_rewards
from toolkit.engine import cache as logp_cache
from toolkit.engine.engine import Engine
from toolkit.measure import explicit
from toolkit.measure import rewards as toolkit_rewards
from toolkit.measure.options import ScoringOptions
from toolkit.measure.reading import ReadingOptions
from toolkit.measure.summary import accuracy_per_token
from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy, new_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.save import merge_and_save, save_policy, write_training_record
from toolkit.models.tokenizer import load_tokenizer
from toolkit.progress import Reporter
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.invariant

Rows = list[dict[str, Any]]


def moved(spec: str, folder: Path, by: float = 0.02) -> Path:
    """A policy that has left its reference, as a folder in fp32."""
    model = load_policy(resolve(spec), ModelSection(name=spec, dtype="float32"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * by * weight.std())
    merge_and_save(model, load_tokenizer(resolve(spec)), folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(moved("tiny", tmp_path_factory.mktemp("policy") / "model"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A cache folder of the test's own; called with a name, another one."""

    def use(name: str) -> None:
        monkeypatch.setenv("DUEL_CACHE", str(tmp_path / name))

    use("cache")
    return use


def rewards(policy: str, reference: str = "tiny", data: str = "reviews", **options: Any) -> dict[str, Any]:
    return implicit_rewards(policy, reference, data, **{"limit": 12, "any_reference": True, "beta": 0.1, **options})


def values(rows: Rows) -> dict[tuple[str, int], float]:
    by_response = {(row["prompt_id"], row["response_index"]): row["implicit_reward"] for row in rows}
    assert len(by_response) == len(rows)
    return by_response


def assert_same(a: Rows, b: Rows, tolerance: float = 1e-5) -> None:
    first, second = values(a), values(b)
    assert first.keys() == second.keys()
    assert max(abs(first[key] - second[key]) for key in first) < tolerance


def naive(model: Any, prompt: list[int], response: list[int]) -> float:
    """One unpadded forward pass of a model in fp64, and a plain softmax."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())


def check_against_fp64(policy: str, reference: str, data: str, **options: Any) -> None:
    summary = rewards(policy, reference, data, with_ids=True, max_response_tokens=200, max_prompt_tokens=300, **options)
    pair = [
        load_policy(resolve(spec), ModelSection(name=spec, dtype="float32")).double().requires_grad_(False)
        for spec in (policy, reference)
    ]
    spread = []
    for row in summary["rows"]:
        policy_logp, reference_logp = (naive(model, row["prompt_ids"], row["response_ids"]) for model in pair)
        assert row["implicit_reward"] == pytest.approx(0.1 * (policy_logp - reference_logp), abs=1e-4)
        spread.append(0.1 * (policy_logp - reference_logp))
    assert np.std(spread) > 0.01  # a policy that is its reference would pass anything


def hh_file() -> str:
    if not os.environ.get("DUEL_REAL_DATA"):
        pytest.skip("DUEL_REAL_DATA is not set")
    return str(Path(os.environ["DUEL_REAL_DATA"]) / "hh_harmless" / "pairs.jsonl.gz")


def test_real_pairs_under_a_trained_model_equal_fp64(stories_folder: Path, tmp_path: Path) -> None:
    policy = moved(str(stories_folder), tmp_path / "policy", 0.1)
    check_against_fp64(str(policy), str(stories_folder), hh_file(), limit=40, plain=True)


@pytest.mark.slow
def test_real_pairs_under_smollm2_equal_fp64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUEL_CACHE")  # the converted weights are in the user's own
    folder = moved("smollm2-135m", tmp_path / "policy", 0.05)
    reference = resolve("smollm2-135m").path
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    check_against_fp64(str(folder), reference, hh_file(), limit=4)


# ---------------------------------------------------------------- nothing but the texts matters


@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_the_batch_changes_nothing(policy: str, cache: Callable[[str], None], batch_tokens: int) -> None:
    expected = rewards(policy)["rows"]
    cache("another")
    assert_same(rewards(policy, batch_tokens=batch_tokens)["rows"], expected)


def test_order_and_company_change_nothing(policy: str, tmp_path: Path, cache: Callable[[str], None]) -> None:
    """The same pairs the other way round, and each response beside two others instead of one."""
    texts = [
        (f"The film number {k} was", f" good {'and long ' * k}.", f" bad {k}.", f" so so {k * k}.") for k in range(9)
    ]
    files = {}
    for name, rows in (
        ("pairs", [{"prompt": p, "responses": [a, b], "ranks": [1, 2]} for p, a, b, _ in texts]),
        ("turned", [{"prompt": p, "responses": [b, a], "ranks": [2, 1]} for p, a, b, _ in reversed(texts)]),
        ("triples", [{"prompt": p, "responses": [a, b, c], "ranks": [1, 2, 3]} for p, a, b, c in texts]),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cache(name)
        files[name] = rewards(policy, data=str(path), with_ids=True)["rows"]

    def by_text(rows: Rows) -> dict[tuple[int, ...], float]:
        return {(*row["prompt_ids"], -1, *row["response_ids"]): row["implicit_reward"] for row in rows}

    expected = by_text(files["pairs"])
    for name in ("turned", "triples"):
        rewards_here = by_text(files[name])
        assert expected.keys() <= rewards_here.keys()
        assert max(abs(rewards_here[key] - value) for key, value in expected.items()) < 1e-5


# ---------------------------------------------------------------- never twice


def test_another_beta_costs_no_pass_of_the_reference(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rewards(policy, beta=0.1)
    n = len(first["rows"])
    assert first["responses_computed"] == {"policy": n, "reference": n}
    scored: list[str] = []
    whole = Engine.logps

    def watched(self: Engine, trees: list[Tree], **more: Any) -> Any:
        scored.append(self.model.name_or_path)
        return whole(self, trees, **more)

    monkeypatch.setattr(Engine, "logps", watched)
    second = rewards(policy, beta=0.3)
    assert scored == [policy]
    assert second["responses_computed"] == {"policy": n, "reference": 0}
    for a, b in zip(first["rows"], second["rows"], strict=True):
        assert b["implicit_reward"] == pytest.approx(3 * a["implicit_reward"], rel=1e-9)
        assert b["reference_logp"] == a["reference_logp"]
    # Other text, another precision, and another model are other results.
    fewer = rewards(policy, limit=11)
    assert fewer["responses_computed"]["reference"] == len(fewer["rows"]) < n
    assert rewards(policy, dtype="bfloat16")["responses_computed"]["reference"] == n
    assert rewards(policy, policy)["responses_computed"]["reference"] == n


def test_blocks_come_back_as_they_were(
    tiny: Any, make_trees: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logp_cache, "BLOCK", 4)
    trees = make_trees(10)
    loads: list[int] = []

    def load() -> Engine:
        loads.append(1)
        return Engine(tiny, 0, dtype=torch.float32)

    def both() -> tuple[list[Any], list[int], list[int]]:
        computed: list[int] = []
        stored: list[int] = []
        results = logp_cache.ResponseCache(tmp_path / "blocks", "key", load)
        blocks = results.logps(trees, advance=computed.append, skip=stored.append)
        return [row for block in blocks for row in block], computed, stored

    first, computed, stored = both()
    assert sum(computed) == 30 and stored == [] and len(loads) == 1
    second, computed, stored = both()
    assert computed == [] and stored == [12, 12, 6] and len(loads) == 1
    expected = Engine(tiny, 0, dtype=torch.float32).logps(trees)
    for row, again, truth in zip(first, second, expected, strict=True):
        for a, b, c in zip(row, again, truth, strict=True):
            assert np.array_equal(a, b)
            np.testing.assert_allclose(a, c.numpy(), atol=1e-5)
    files = sorted((tmp_path / "blocks").glob("*.npy"))
    assert len(files) == 3
    files[0].unlink()
    _, computed, stored = both()
    assert sum(computed) + sum(stored) == 30 and len(loads) == 2 and computed


@pytest.mark.fault
def test_killed_it_goes_on_and_writes_every_row_once(policy: str, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    text = "a long film about a short book "
    data.write_text(
        "".join(
            json.dumps({"prompt": f"{text * 2} {k}", "chosen": f" good {text * 2}{k}", "rejected": f" bad {text}{k}"})
            + "\n"
            for k in range(600)
        )
    )
    arguments = ["rewards", "--policy", policy, "--reference", "tiny"]
    arguments += ["--data", str(data), "--beta", "0.1", "--any-reference", "--json", "--out"]
    out = tmp_path / "killed.parquet"
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(*arguments, str(out)), env=environment(), **nowhere)
    work = tmp_path / ".killed.parquet.partial"
    deadline = time.monotonic() + 120
    while not list(work.glob("*.npy")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    parts = len(list(work.glob("*.npy")))
    assert 0 < parts < 5
    done = duel(*arguments, str(out))
    assert json.loads(done.stdout)["responses_computed"]["policy"] == 1200 - 2 * parts * logp_cache.BLOCK
    assert [path.name for path in tmp_path.glob(".killed*")] == [".killed.parquet.done.json"]
    whole = tmp_path / "whole.parquet"
    duel(*arguments, str(whole))
    assert pq.read_table(out).equals(pq.read_table(whole))
    assert pq.ParquetFile(out).num_row_groups == 5
    assert len(values(pq.read_table(out).to_pylist())) == 1200


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["implicit", "explicit"])
def test_stopped_in_its_last_figures_it_computes_nothing_anew(
    policy: str, tmp_path: Path, tiny_ref: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The table is put in its place last of all: until then the same command goes on from the parts."""
    out = tmp_path / "rewards.parquet"
    tokenizer, section = load_tokenizer(tiny_ref), ModelSection(name="tiny", dtype="float32", lora=None)
    model = new_reward_model(tiny_ref, section, tokenizer.pad_token_id, seed=1)
    save_policy(model, tokenizer, tmp_path / "rm", dtype=torch.float32, base=tiny_ref)

    def call() -> dict[str, Any]:
        if kind == "implicit":
            return rewards(policy, out=out, rm=str(tmp_path / "rm"))
        reading, scoring = ReadingOptions(limit=12), ScoringOptions()
        quiet = Reporter(quiet=True)
        return explicit.explicit_rewards(str(tmp_path / "rm"), "reviews", reading, scoring, out=out, reporter=quiet)

    with monkeypatch.context() as patch:
        module = toolkit_rewards if kind == "implicit" else explicit
        patch.setattr(module, "summarise_rewards", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            call()
    assert not out.exists()
    monkeypatch.setattr(Engine, "map_responses", lambda *_: pytest.fail("a forward pass"))
    assert call()["n_prompts"] == 12 and out.is_file()
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.e2e
def test_two_processes_share_the_work_and_write_the_same(policy: str, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Film number {k}", "chosen": f" good {k}", "rejected": f" bad {k * k}"} for k in range(300)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["rewards", "--policy", policy, "--reference", "tiny", "--json"]
    arguments += ["--data", str(data), "--beta", "0.1", "--any-reference", "--out"]
    launch = ["--", "--num_processes", "2", "--main_process_port", "0"]
    tables = []
    for name, start, behind, n in (("one", duel, [], 600), ("two", duel_process, launch, 2 * (128 + 44))):
        out = tmp_path / f"{name}.parquet"
        done = start(*arguments, str(out), *behind, env={"DUEL_CACHE": str(tmp_path / f"cache-{name}")})
        # Of three parts, the main process has the first and the last.
        assert json.loads(done.stdout)["responses_computed"] == {"policy": n, "reference": n}
        tables.append(pq.read_table(out))
    assert tables[0].equals(tables[1])


# ---------------------------------------------------------------- what is written


def test_reference_free_rewards_say_so(policy: str, tmp_path: Path) -> None:
    out = tmp_path / "free.parquet"
    summary = rewards(policy, "none", out=out, beta=0.5)
    assert summary["reference_free"] is True and summary["responses_computed"]["reference"] == 0
    table = pq.read_table(out)
    assert json.loads(table.schema.metadata[b"duel"])["reference_free"] is True
    for row in table.to_pylist():
        assert row["reference_logp"] is None
        assert row["implicit_reward"] == pytest.approx(0.5 * row["policy_logp"])


def test_the_check_against_an_explicit_reward(policy: str, tmp_path: Path, tiny_ref: Any) -> None:
    tokenizer = load_tokenizer(tiny_ref)
    model = new_reward_model(tiny_ref, ModelSection(dtype="float32"), int(tokenizer.pad_token_id), 0)
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    out = tmp_path / "rewards.parquet"
    summary = rewards(policy, out=out, rm=str(tmp_path / "rm"), limit=20)
    rows = pq.read_table(out).to_pylist()
    check = summary["implicit_vs_explicit"]
    assert set(check["calibration"]) == {"explicit", "implicit"}
    assert set(check["calibration"]["implicit"]) == {"nll", "brier", "ece", "temperature"}
    assert set(check["splits"]) == {"length_difference", "explicit_margin", "implicit_margin"}
    lines = [json.loads(line) for line in Path(summary["disagreements"]).read_text().splitlines()]
    assert len(lines) == summary["n_disagreements"] > 0
    by_key = {(row["prompt_id"], row["response_index"]): row for row in rows}
    texts = {(line["prompt"], line["response_a"], line["response_b"]) for line in lines}
    assert len(texts) == len(lines) and all(all(text for text in entry) for entry in texts)
    share = check["agreement"]["value"]
    assert len(lines) / summary["n_comparisons"] == pytest.approx(1 - share, abs=0.1)  # weights of comparisons differ
    for line in lines:
        assert line["explicit_margin"] * line["implicit_margin"] < 0
        margins = [
            by_key[line["prompt_id"], i]["explicit_reward"] - by_key[line["prompt_id"], j]["explicit_reward"]
            for i in range(6)
            for j in range(6)
        ]
        assert any(abs(m - line["explicit_margin"]) < 1e-9 for m in margins)
    assert summary["accuracy_mean"]["n"] == 20


def test_the_accuracy_of_means_is_that_of_the_column(policy: str, tmp_path: Path) -> None:
    """Of a policy whose reward is a sum over the tokens, and of one whose reward is their mean."""
    means = tmp_path / "ipo"
    shutil.copytree(policy, means)
    write_training_record(means, arm="dpo", beta=0.1, loss_type="ipo")
    of_sums, of_means = (
        rewards(str(name), out=tmp_path / f"{k}.parquet", limit=60) for k, name in enumerate((policy, means))
    )
    assert of_means["accuracy"] != pytest.approx(of_sums["accuracy"])  # where both agree, this shows nothing
    assert of_means["accuracy_mean"] == of_sums["accuracy_mean"]
    assert of_means["accuracy_mean"]["value"] == pytest.approx(of_means["accuracy"])


def test_means_are_not_divided_by_the_length_again() -> None:
    """Chosen: a log-ratio of 30 over 10 tokens. Rejected: 6 over 3."""
    row = SimpleNamespace(lengths=np.array([10.0, 3.0]), row=SimpleNamespace(prompt_id="p"))
    reading: Any = SimpleNamespace(rows=[row], comparisons=[(0, 0, 1, 1.0, 1.0)])
    for values, already_means in (([30.0, 6.0], False), ([3.0, 2.0], True)):
        assert accuracy_per_token(reading, [np.array(values)], already_means=already_means)["value"] == 1.0
