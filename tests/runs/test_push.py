"""What ``duel push`` makes stands alone: plain libraries load it in a fresh process, and it says what was measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import constants
from support.hub_standin import TOKEN, Hub, standin
from support.running import duel, duel_process

from toolkit.errors import StoreError
from toolkit.files import read_json
from toolkit.preferences.rows import Comparison, PreferenceRow
from toolkit.runs import push
from toolkit.runs.model_cards import POLICY_OF

pytestmark = pytest.mark.e2e

ONLINE = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
PLAIN = """
import json, sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
import torch
where, probe = sys.argv[1], json.load(open(sys.argv[2]))
def name(part):
    return f"{where}{part}"
found = {"greedy": {}}
for part in ("sft", "ppo", "dpo"):
    tokenizer = AutoTokenizer.from_pretrained(name(part))
    model = AutoModelForCausalLM.from_pretrained(name(part), dtype="auto").eval()
    inputs = tokenizer(probe["prompt"], return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    found["greedy"][part] = out[0, inputs["input_ids"].shape[1]:].tolist()
tokenizer = AutoTokenizer.from_pretrained(name("reward-model"))
model = AutoModelForSequenceClassification.from_pretrained(name("reward-model"), dtype=torch.float32).eval()
scores = []
for row in probe["rows"]:
    ids = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    scores.append(model(torch.tensor([ids + [tokenizer.eos_token_id]])).logits[0, 0].item())
found["scores"], found["labels"] = scores, model.config.num_labels
pairs = load_dataset(name("preferences"), split="train")
found["pairs"] = {"columns": pairs.column_names, "n": len(pairs)}
ranked = load_dataset(name("preferences"), "ranked")
found["ranked"] = {split: len(rows) for split, rows in ranked.items()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with standin() as started:
        yield started


@pytest.fixture(scope="module")
def local(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("pushed") / "all"
    printed = json.loads(duel("push", str(small_run), "--to", str(to), "--json").stdout)
    assert printed == {"pushed": {part: str(to / part) for part in push.ARTIFACTS}}
    return to


@pytest.fixture(scope="module")
def probe(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt, and held-out responses that end by themselves with the score that the run gave them."""
    rows = pq.read_table(small_run / "samples.parquet").to_pylist()
    finished = [row for row in rows if row["policy"] == "base" and not row["truncated"]] or [
        row for row in rows if not row["truncated"]
    ]
    path = tmp_path_factory.mktemp("probe") / "probe.json"
    path.write_text(json.dumps({"prompt": rows[0]["prompt"], "rows": finished[:6]}))
    return path


def reach(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says to a new process, for this one."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def loaded(where: str, probe: Path, **environment: str) -> dict:
    command = [sys.executable, "-c", PLAIN, where, str(probe)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict, small_run: Path, probe: Path) -> None:
    rows = json.loads(probe.read_text())["rows"]
    mean = read_json(small_run / "reward_model" / "model" / "reward_head.json")["mean"]
    assert found["labels"] == 1 and len(rows) >= 3
    assert found["scores"] == pytest.approx([row["explicit_reward"] + mean for row in rows], abs=1e-4)
    assert all(len(ids) > 0 for ids in found["greedy"].values())
    assert found["pairs"]["columns"] == ["prompt", "chosen", "rejected", "agreement"] and found["pairs"]["n"] > 24
    assert found["ranked"] == {"train": 24, "test": 12}


def test_plain_libraries_load_the_folders(local: Path, small_run: Path, probe: Path, tmp_path: Path) -> None:
    check(loaded(f"{local}/", probe, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)), small_run, probe)


def test_a_merged_policy_is_the_one_that_was_trained(local: Path, small_run: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    pushed = AutoModelForCausalLM.from_pretrained(local / "dpo").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(small_run / "dpo" / "model").state_dict()
    start = AutoModelForCausalLM.from_pretrained(local / "sft").state_dict()
    assert all(torch.equal(pushed[name], trained[name]) for name in trained)
    assert any(not torch.equal(pushed[name], start[name]) for name in trained)


def test_the_hub_gets_repositories_that_load_from_it(
    hub: Hub, small_run: Path, probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), **ONLINE}
    printed = duel_process("push", str(small_run), "me/pair", env=environment).stdout
    assert f"{hub.endpoint}/me/pair-dpo" in printed
    kinds = {name: kind for kind, name in hub.repositories}
    assert kinds == {f"me/pair-{part}": "datasets" if part == "preferences" else "models" for part in push.ARTIFACTS}
    assert all(repository.private for repository in hub.repositories.values())
    check(loaded("me/pair-", probe, **environment), small_run, probe)
    card = hub.repositories["models", "me/pair-dpo"].files["README.md"].decode()
    assert "base_model: me/pair-sft" in card and "- me/pair-preferences" in card
    before = {name: repository.sha for name, repository in hub.repositories.items()}
    reach(hub.endpoint, monkeypatch)
    duel("push", str(small_run), "me/pair", "--only", "dpo", env={"HF_TOKEN": TOKEN})
    assert {name: repository.sha for name, repository in hub.repositories.items()} == before


def test_cards_say_what_was_measured(local: Path, small_run: Path) -> None:
    results = read_json(small_run / "results.json")
    for part, policy in ((part, POLICY_OF[part]) for part in ("sft", "ppo", "dpo")):
        text = (local / part / "README.md").read_text()
        facts = yaml.safe_load(text.split("---")[1])
        values = {m["type"]: m["value"] for r in facts["model-index"][0]["results"] for m in r["metrics"]}
        row = next(row for row in results["policies"] if row["policy"] == policy)
        assert values["kl_nats"] == pytest.approx(row["kl_nats"], abs=1e-5)
        assert facts["pipeline_tag"] == "text-generation" and facts["library_name"] == "transformers"
        gold = row["gold_reward"]
        assert f"{gold['value']:.3f} | {gold['ci_low']:.3f} to {gold['ci_high']:.3f}" in text
        for rate in results["win_rates"]:
            if rate["policy"] == policy and "@" not in rate["baseline"]:
                assert f"{rate['win_rate']:.1%} | {rate['ci_low']:.1%} to {rate['ci_high']:.1%}" in text
        assert (
            results["verdict"]["sentence"] in text and "data.train_prompts" not in text and "train_prompts: 24" in text
        )
    text = (local / "reward-model" / "README.md").read_text()
    accuracy = results["rm_quality"]["explicit"]["accuracy"]
    assert f"{accuracy['value']:.1%} | {accuracy['ci_low']:.1%} to {accuracy['ci_high']:.1%}" in text
    assert "AutoModelForSequenceClassification" in text
    for part in push.ARTIFACTS:
        code = (local / part / "README.md").read_text().split("```python\n")[1].split("```")[0]
        compile(code, part, "exec")


def test_a_link_that_leads_out_of_the_run_is_not_published(tmp_path: Path) -> None:
    run, secret = tmp_path / "run", tmp_path / "secret"
    model = run / "sft" / "model"
    model.mkdir(parents=True)
    secret.mkdir()
    (secret / "key").write_text("sk-canary")
    (model / "config.json").write_text("{}")
    (run / "inside").symlink_to(model)
    push.refuse_links_out(run)
    for link, target in (("notes.txt", secret / "key"), ("more", secret), ("up", Path("../../../secret/key"))):
        (model / link).symlink_to(target)
        with pytest.raises(StoreError, match="leads out of the run") as caught:
            push.refuse_links_out(run)
        assert "sk-canary" not in str(caught.value)
        (model / link).unlink()
    (run / "manifest.json").write_text("{}")
    (run / "results.json").symlink_to(secret / "key")
    with pytest.raises(StoreError, match="leads out of the run"):
        push.read_finished(run)


def test_what_a_user_put_beside_a_model_is_not_published(small_run: Path, tmp_path: Path) -> None:
    run, to = tmp_path / "run", tmp_path / "all"
    shutil.copytree(small_run, run)
    for name in ("modeling_mine.py", "notes/key.txt"):
        (run / "dpo" / "model" / name).parent.mkdir(exist_ok=True)
        (run / "dpo" / "model" / name).write_text("mine")
    duel("push", str(run), "--to", str(to), "--only", "dpo")
    published = {path.relative_to(to / "dpo").as_posix() for path in (to / "dpo").rglob("*") if path.is_file()}
    assert published == {path.name for path in (small_run / "dpo" / "model").iterdir()} | {"README.md"}


def test_pairs_in_trl_s_format() -> None:
    comparisons = [Comparison(0, 1), Comparison(0, 1), Comparison(1, 0), Comparison(2, 0), *_tie(1, 2)]
    chat = [{"role": "user", "content": "hello"}]
    for prompt in ("say", chat):
        found = push.trl_pairs([PreferenceRow("p", prompt, ["a", "b", "c"], comparisons)])
        side = (lambda text: text) if prompt == "say" else (lambda text: [{"role": "assistant", "content": text}])
        assert found == [
            {"prompt": prompt, "chosen": side("a"), "rejected": side("b"), "agreement": pytest.approx(2 / 3)},
            {"prompt": prompt, "chosen": side("c"), "rejected": side("a"), "agreement": 1.0},
        ]


def _tie(i: int, j: int) -> list[Comparison]:
    return [Comparison(i, j, 0.5), Comparison(j, i, 0.5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["me/pair", "--to", "x"], "say where to push"),
        ([], "say where to push"),
        (["pair"], "write it as USER/NAME"),
        (["me/pair", "--only", "dp"], "did you mean 'dpo'?"),
    ],
)
def test_wrong_words(small_run: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in duel("push", str(small_run), *arguments, cwd=tmp_path, check=2).stderr


def test_an_unfinished_run_a_taken_folder_and_a_hub_that_refuses(
    hub: Hub, local: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no finished run" in duel("push", str(tmp_path), "me/pair", check=2).stderr
    assert "the folder exists" in duel("push", str(small_run), "--to", str(local), check=2).stderr
    reach(hub.endpoint, monkeypatch)
    other = ["push", str(small_run), "me/other", "--only", "preferences"]
    refused = duel(*other, env={"HF_TOKEN": "hf_another"}, check=2).stderr
    assert "the hub refused" in refused and "Traceback" not in refused
    reach("http://127.0.0.1:9", monkeypatch)
    away = duel(*other, env={"HF_TOKEN": TOKEN}, check=2).stderr
    assert "the hub cannot be reached" in away
