"""Further sampling temperatures of a run: what is sampled, judged and written, from the files of a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.running import SMALL, duel

from toolkit.errors import DuelError
from toolkit.evals.verdict import Judging
from toolkit.files import read_json, read_table
from toolkit.measure.policies import EvaluationSettings, Policy, sample_policy
from toolkit.measure.temperatures import NO_JUDGE, deciding_judges
from toolkit.models.load import load_policy
from toolkit.models.resolve import resolve
from toolkit.preferences.gold import gold_rewards
from toolkit.preferences.samples import Sample, by_policy, read_samples
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe
from toolkit.recipe.training import ModelSection
from toolkit.stages.contexts import EvaluateContext, context_of

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with two further temperatures: the evaluation runs again, nothing else."""
    out = shutil.copytree(small_run, tmp_path_factory.mktemp("temperatures") / "run")
    more = ["--set=evaluate.temperatures=[0.5, 1.5]", "--set=evaluate.samples_per_prompt=2"]
    duel("run", "smoke", "--out", str(out), *SMALL, *more)
    return out


def table(run: Path, temperature: float) -> Path:
    return run / "evaluate" / "temperatures" / str(temperature) / "samples.parquet"


def entry_of(run: Path, temperature: float) -> dict[str, Any]:
    entries = read_json(run / "results.json")["temperatures"]
    return dict(next(entry for entry in entries if entry["temperature"] == temperature))


def test_one_temperature_writes_nothing_new(small_run: Path) -> None:
    results = read_json(small_run / "results.json")
    assert "temperatures" not in results and not (small_run / "evaluate" / "temperatures").exists()


def test_the_verdicts_numbers_stay(small_run: Path, run: Path) -> None:
    """The first sample of each prompt is the one that a run without further temperatures draws."""
    policies = ("sft", "rm_ppo", "dpo", "base")
    kept = [
        {
            (s.prompt_id, s.policy): s.response
            for s in read_samples(folder)
            if s.policy in policies and not s.sample_index
        }
        for folder in (small_run, run)
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 12 * len(policies)


def test_the_main_rows_are_those_of_the_run(run: Path) -> None:
    results = read_json(run / "results.json")
    assert [(e["temperature"], e["verdict"]) for e in results["temperatures"]] == [
        (0.5, False),
        (1.0, True),
        (1.5, False),
    ]
    rows = {(row["policy"], row["baseline"], row["judge"]): row for row in results["win_rates"]}
    compared = [(row["policy"], row["baseline"]) for row in entry_of(run, 1.0)["win_rates"]]
    assert compared == [("rm_ppo", "dpo"), ("rm_ppo", "sft"), ("dpo", "sft")]
    for row in entry_of(run, 1.0)["win_rates"]:
        assert row | {"holm_p": 0} == rows[row["policy"], row["baseline"], "gold"] | {"holm_p": 0}
    policies = {row["policy"]: row for row in results["policies"]}
    for row in entry_of(run, 1.0)["policies"]:
        assert row == {name: policies[row["policy"]][name] for name in row}


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_win_rates_are_those_of_the_written_samples(run: Path, temperature: float) -> None:
    """By hand: gold compares every sample of the one with every sample of the other, and prompts are averaged."""
    entry, samples = entry_of(run, temperature), read_samples(table(run, temperature))
    of_policy = by_policy(samples)
    assert {name: len(rows) for name, rows in of_policy.items()} == {"sft": 24, "rm_ppo": 24, "dpo": 24}
    scores: dict[tuple[str, str], list[float]] = {}
    prompts = {row["prompt_id"]: row["prompt"] for row in read_table(run / "data" / "eval.parquet", error=DuelError)}
    for sample in samples:
        gold = gold_rewards([sample.prompt], [sample.response])[0]
        assert gold == sample.gold_reward and sample.prompt_id in prompts
        scores.setdefault((sample.policy, sample.prompt_id), []).append(gold)
    for row in entry["win_rates"]:
        preferences = [
            np.mean(
                [(np.sign(a - b) + 1) / 2 for a in scores[row["policy"], key] for b in scores[row["baseline"], key]]
            )
            for key in prompts
        ]
        assert row["win_rate"] == pytest.approx(np.mean(preferences), abs=1e-12)
        assert (row["n_prompts"], row["n_judged"], row["judge"]) == (12, 12, "gold")
        assert row["ci_low"] <= row["win_rate"] <= row["ci_high"]
    assert entry["n_prompts"] == 12


def logp(model: Any, prompt: list[int], response: list[int], temperature: float) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / temperature
    return float(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_the_kl_is_from_the_reference_at_the_same_temperature(run: Path, temperature: float) -> None:
    from toolkit.models.encoding import text_encoder
    from toolkit.models.tokenizer import load_tokenizer

    refs = {
        name: resolve(str(run / stage / "model")) for name, stage in (("sft", "sft"), ("rm_ppo", "ppo"), ("dpo", "dpo"))
    }
    section = ModelSection(name="tiny", dtype="float32", lora=None)
    models = {name: load_policy(ref, section).eval() for name, ref in refs.items()}
    of_policy = by_policy(read_samples(table(run, temperature)))
    encoder = text_encoder(load_tokenizer(refs["sft"]), of_policy["sft"][0].prompt, "tiny")

    def kl(sample: Sample) -> float:
        prompt = encoder.prompt(sample.prompt)
        under = [logp(models[name], prompt, sample.response_ids, temperature) for name in (sample.policy, "sft")]
        assert under[0] == pytest.approx(sample.policy_logp, abs=1e-3)
        return under[0] - under[1]

    rows = {row["policy"]: row for row in entry_of(run, temperature)["policies"]}
    for name in ("rm_ppo", "dpo"):
        expected = [kl(sample) for sample in of_policy[name]]
        assert [sample.kl_nats for sample in of_policy[name]] == pytest.approx(expected, abs=2e-3)
        assert rows[name]["kl_nats"] == pytest.approx(np.mean(expected), abs=1e-3)
        assert max(map(abs, expected)) > 0.05
    assert rows["sft"]["kl_nats"] == 0.0 and all(sample.kl_nats == 0.0 for sample in of_policy["sft"])


def test_temperatures_are_independent_draws_and_colder_texts_are_likelier(run: Path) -> None:
    samples = {t: by_policy(read_samples(table(run, t)))["sft"] for t in (0.5, 1.5)}
    samples[1.0] = [s for s in by_policy(read_samples(run))["sft"] if s.sample_index < 2]
    texts = {t: [sample.response for sample in of] for t, of in samples.items()}
    assert texts[0.5] != texts[1.0] != texts[1.5]
    per_token = {t: sum(s.policy_logp or 0.0 for s in of) / sum(s.n_tokens for s in of) for t, of in samples.items()}
    assert per_token[0.5] > per_token[1.0] > per_token[1.5]


def test_a_temperature_is_part_of_the_seeds(run: Path) -> None:
    """The same temperature as the verdict's draws other responses; twice the same draws the same."""
    context = context_of("evaluate", load_recipe("smoke", [text.removeprefix("--set=") for text in SMALL]).recipe)
    assert isinstance(context, EvaluateContext)
    sft = resolve(str(run / "sft" / "model"))
    settings = EvaluationSettings.of(context, from_parquet(run / "data" / "eval.parquet"), sft)
    policy = Policy("sft", "sft", "sft", 0, sft, 1)
    drawn = [
        sample_policy(policy, of, Reporter()) for of in (settings, settings.at_further(1.0), settings.at_further(1.0))
    ]
    texts = [[sample.response for sample in samples] for samples in drawn]
    assert texts[0] != texts[1] == texts[2]


def test_recorded_samples_of_a_temperature_can_be_judged_again(run: Path, tmp_path: Path) -> None:
    folder, out = table(run, 0.5).parent, tmp_path / "judged.parquet"
    judge = ["--policy", "rm_ppo", "--baseline", "dpo", "--judge", "gold", "--out", str(out), "--json"]
    done = json.loads(duel("judge", str(folder), *judge).stdout)
    assert done["win_rates"][0]["win_rate"] == entry_of(run, 0.5)["win_rates"][0]["win_rate"]
    assert "rm_ppo" in duel("winrate", str(folder / "judgements.parquet")).stdout


def test_which_judges_are_asked() -> None:
    judges = ["rm", "gold", "llm:a", "file:votes.parquet"]
    deciding, warnings = deciding_judges(judges, Judging())
    assert deciding == ["gold", "llm:a"]
    assert warnings == ["file:votes.parquet has no judgements of further temperatures: it is left out there"]
    assert deciding_judges(judges, Judging(primary_judge="llm:a"))[0] == ["llm:a"]
    assert deciding_judges(judges, Judging(not_independent={"gold": "trained on"}))[0] == ["llm:a"]
    assert deciding_judges(judges, Judging(primary_judge="Anna"))[0] == []
    assert deciding_judges(["rm", "implicit"], Judging()) == ([], [NO_JUDGE])
