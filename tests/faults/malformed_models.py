"""Malformed models: folders, weights, adapters, tokenizers and GGUF files."""

from __future__ import annotations

import functools
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from faults.malformed import Malformed, jsonl, parquet
from faults.malformed_data import DEEP, OK, messages, sample
from safetensors.torch import load_file, save_file

from toolkit.models.load import load_policy, new_reward_model, trainable
from toolkit.models.resolve import resolve
from toolkit.models.save import save_policy
from toolkit.models.tokenizer import load_tokenizer
from toolkit.recipe.training import Lora, ModelSection

Change = Callable[[Path], None]
SECTION = ModelSection(name="tiny", dtype="float32", lora=None)
TINY = Path(resolve("tiny").path)
SAMPLES = {"s.parquet": parquet(sample(), sample("b", response="no"))}
DATA = {"d.jsonl": jsonl(*OK), "p.txt": b"Hi\n"} | SAMPLES
REWARDS = "rewards|--policy|m|--reference|tiny|--any-reference|--data|d.jsonl|--limit|2|--out|out.parquet"
SCORE = "score|--rm|m|--data|d.jsonl|--limit|2|--out|out.parquet"
COMPARE = "compare|m|tiny|--data|p.txt|--judge|gold|--max-new-tokens|2|--out|out"


@functools.cache
def _made(kind: str) -> Path:
    """A whole model to be broken: a reward model, or an adapter of a policy (on the shipped model)."""
    folder = Path(tempfile.mkdtemp(prefix="duel-malformed-")) / kind
    tokenizer = load_tokenizer(resolve("tiny"))
    if kind == "reward":
        model: Any = new_reward_model(resolve("tiny"), SECTION, 0, seed=0)
    else:
        model = trainable(load_policy(resolve("tiny"), SECTION), Lora(r=2), task="CAUSAL_LM")
    save_policy(model, tokenizer, folder, dtype=torch.float32, base=resolve("tiny"))
    return folder


def _copied(change: Change, kind: str = "policy") -> Change:
    """Copies a whole model to ``m`` and changes it."""

    def make(folder: Path) -> None:
        source = TINY if kind == "policy" else _made(kind)
        (folder / "m").mkdir()
        for file in source.iterdir():
            (folder / "m" / file.name).symlink_to(file)  # weights are large; a change replaces the link
        change(folder / "m")

    return make


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def replaced(name: str, content: bytes) -> Change:
    return lambda folder: _write(folder / name, content)


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def unrecorded(change: Change) -> Change:
    """Changes an adapter that has no record of its base, by which it would be found."""

    def make(folder: Path) -> None:
        removed("base.json")(folder)
        change(folder)

    return make


def cut(name: str, share: float = 0.5) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        _write(folder / name, content[: int(len(content) * share)])

    return change


def edited(file: str, /, **values: object) -> Change:
    def change(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        document |= values
        _write(folder / file, json.dumps(document).encode())

    return change


def weights(act: Callable[[dict[str, torch.Tensor]], None], name: str = "model.safetensors") -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        act(tensors)
        (folder / name).unlink()
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return change


def _first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def _drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[_first(tensors, part)]

    return change


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"x.{name}"] = tensors.pop(name)


def _instead(name: str, content: bytes) -> Change:
    """Other weights in the place of the model's file."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        _write(folder / name, content)

    return change


def _set(part: str, act: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = _first(tensors, part)
        tensors[name] = act(tensors[name]).contiguous()

    return weights(change)


def _index(target: str, outside: bool) -> Change:
    """Weights behind an index; ``outside``: the file lies beside the folder."""

    def change(folder: Path) -> None:
        names = list(load_file(folder / "model.safetensors"))
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").unlink()
        if outside:
            (folder.parent / "secret.safetensors").write_bytes(content)
        _write(
            folder / "model.safetensors.index.json",
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, target)}).encode(),
        )

    return change


def _header(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def folder_changes() -> dict[str, Change]:
    config = json.loads((TINY / "config.json").read_text())
    deep = b"[" * DEEP
    return {
        "config/removed": removed("config.json"),
        "config/empty": replaced("config.json", b""),
        "config/not_json": replaced("config.json", b"{oops"),
        "config/list": replaced("config.json", b"[1]"),
        "config/null": replaced("config.json", b"null"),
        "config/number": replaced("config.json", b"5"),
        "config/deep": replaced("config.json", deep),
        "config/latin_1": replaced("config.json", b'{"a": "\xe9"}'),
        "config/bom": replaced("config.json", b"\xef\xbb\xbf" + json.dumps(config).encode()),
        "config/nul": replaced("config.json", b"\0" * 100),
        "config/empty_object": replaced("config.json", b"{}"),
        "config/unknown_type": edited("config.json", model_type="foo"),
        "config/type_number": edited("config.json", model_type=5),
        "config/no_type": edited("config.json", model_type=None),
        "config/auto_map": edited("config.json", model_type="foo", auto_map={"AutoConfig": "a.B"}),
        "config/hidden_text": edited("config.json", hidden_size="large"),
        "config/hidden_zero": edited("config.json", hidden_size=0),
        "config/hidden_negative": edited("config.json", hidden_size=-8),
        "config/hidden_other": edited("config.json", hidden_size=64),
        "config/heads_zero": edited("config.json", num_attention_heads=0),
        "config/heads_three": edited("config.json", num_attention_heads=3),
        "config/layers_text": edited("config.json", num_hidden_layers="x"),
        "config/layers_more": edited("config.json", num_hidden_layers=9),
        "config/layers_400": replaced(
            "config.json",
            json.dumps(config | {"num_hidden_layers": 0})
            .replace('hidden_layers": 0', 'hidden_layers": ' + "9" * 400)
            .encode(),
        ),
        "config/vocabulary_less": edited("config.json", vocab_size=10),
        "config/act": edited("config.json", hidden_act="foo"),
        "config/architecture_text": edited("config.json", architectures=5),
        "config/encoder": edited("config.json", model_type="bert", architectures=["BertModel"]),
        "config/dtype": edited("config.json", dtype="foo"),
        "weights/removed": removed("model.safetensors"),
        "weights/empty": replaced("model.safetensors", b""),
        "weights/cut": cut("model.safetensors"),
        "weights/cut_header": cut("model.safetensors", 0.0005),
        "weights/foreign": replaced("model.safetensors", b"PK\x03\x04" * 100),
        "weights/header_huge": replaced("model.safetensors", _header(b"{}", 2**62)),
        "weights/header_not_json": replaced("model.safetensors", _header(b"{oops")),
        "weights/header_list": replaced("model.safetensors", _header(b"[1, 2]")),
        "weights/header_empty": replaced("model.safetensors", _header(b"{}")),
        "weights/header_deep": replaced("model.safetensors", _header(deep)),
        "weights/offsets": replaced(
            "model.safetensors", _header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 99999]}}')
        ),
        "weights/dtype": replaced(
            "model.safetensors", _header(b'{"a": {"dtype": "F9", "shape": [2], "data_offsets": [0, 8]}}') + b"\0" * 8
        ),
        "weights/git_lfs": replaced(
            "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n"
        ),
        "weights/shape": _set("mlp.up_proj", lambda t: t[:-1]),
        "weights/integers": _set("mlp.up_proj", lambda t: t.to(torch.int64)),
        "weights/booleans": _set("mlp.up_proj", lambda t: t > 0),
        "weights/nan": _set("mlp.up_proj", lambda t: t * float("nan")),
        "weights/infinite": _set("mlp.up_proj", lambda t: t / 0.0),
        "weights/one_missing": weights(_drop("mlp.up_proj")),
        "weights/names": weights(_renamed),
        "weights/pickle": _instead("pytorch_model.bin", b"\x80\x02cos\nsystem\n."),
        "index/outside": _index("../secret.safetensors", True),
        "index/absolute": _index("/etc/passwd", False),
        "index/missing": _index("part-1.safetensors", False),
        "index/not_json": _instead("model.safetensors.index.json", b"{oops"),
        "index/no_map": _instead("model.safetensors.index.json", b"{}"),
        "index/list": _instead("model.safetensors.index.json", b"[]"),
        "index/map_numbers": _instead("model.safetensors.index.json", b'{"metadata": {}, "weight_map": {"a": 5}}'),
        "index/deep": _instead("model.safetensors.index.json", deep),
        "tokenizer/removed": _no_tokenizer,
        "tokenizer/json_removed": removed("tokenizer.json"),
        "tokenizer/empty": replaced("tokenizer.json", b""),
        "tokenizer/not_json": replaced("tokenizer.json", b"{oops"),
        "tokenizer/empty_object": replaced("tokenizer.json", b"{}"),
        "tokenizer/list": replaced("tokenizer.json", b"[]"),
        "tokenizer/deep": replaced("tokenizer.json", deep),
        "tokenizer/cut": cut("tokenizer.json"),
        "tokenizer/config_not_json": replaced("tokenizer_config.json", b"{oops"),
        "tokenizer/config_list": replaced("tokenizer_config.json", b"[]"),
        "tokenizer/config_null": replaced("tokenizer_config.json", b"null"),
        "tokenizer/config_deep": replaced("tokenizer_config.json", deep),
        "tokenizer/class_number": edited("tokenizer_config.json", tokenizer_class=5),
        "tokenizer/eos_number": edited("tokenizer_config.json", eos_token=5),
        "tokenizer/eos_list": edited("tokenizer_config.json", eos_token=["</s>"]),
        "tokenizer/eos_unknown": edited("tokenizer_config.json", eos_token="<|not there|>"),
        "tokenizer/too_many": _more_tokens(5000),
        "generation/not_json": replaced("generation_config.json", b"{oops"),
        "generation/list": replaced("generation_config.json", b"[]"),
        "generation/eos_text": replaced("generation_config.json", b'{"eos_token_id": "x"}'),
        "record/not_json": lambda folder: _write(folder / "duel.json", b"{oops"),
        "record/list": lambda folder: _write(folder / "duel.json", b"[1]"),
        "record/beta_text": lambda folder: _write(folder / "duel.json", b'{"arm": "dpo", "beta": "large"}'),
        "record/beta_nan": lambda folder: _write(folder / "duel.json", b'{"arm": "dpo", "beta": NaN}'),
        "record/deep": lambda folder: _write(folder / "duel.json", deep),
    }


def _no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def _more_tokens(n: int) -> Change:
    def change(folder: Path) -> None:
        document = json.loads((folder / "tokenizer.json").read_text())
        highest = max(document["model"]["vocab"].values())
        document["model"]["vocab"] |= {f"~extra{k}~": highest + 1 + k for k in range(n)}
        _write(folder / "tokenizer.json", json.dumps(document).encode())

    return change


def reward_changes() -> dict[str, Change]:
    return {
        "head/not_json": lambda folder: _write(folder / "reward_head.json", b"{oops"),
        "head/list": lambda folder: _write(folder / "reward_head.json", b"[1]"),
        "head/no_mean": lambda folder: _write(folder / "reward_head.json", b"{}"),
        "head/mean_text": lambda folder: _write(folder / "reward_head.json", b'{"mean": "x"}'),
        "head/mean_nan": lambda folder: _write(folder / "reward_head.json", b'{"mean": NaN}'),
        "head/mean_null": lambda folder: _write(folder / "reward_head.json", b'{"mean": null}'),
        "head/deep": lambda folder: _write(folder / "reward_head.json", b"[" * DEEP),
        "labels/two": edited("config.json", num_labels=2),
        "labels/none": edited("config.json", id2label={}, label2id={}),
        "score/missing": weights(_drop("score")),
        "score/shape": _set("score", lambda t: t[:, :-1]),
        "score/nan": _set("score", lambda t: t * float("nan")),
        "architectures/none": edited("config.json", architectures=None),
        "architectures/numbers": edited("config.json", architectures=[5]),
    }


def adapter_changes() -> dict[str, Change]:
    name = "adapter_config.json"
    return {
        "config/empty": replaced(name, b""),
        "config/not_json": replaced(name, b"{oops"),
        "config/list": replaced(name, b"[]"),
        "config/null": replaced(name, b"null"),
        "config/deep": replaced(name, b"[" * DEEP),
        "config/latin_1": replaced(name, b'{"a": "\xe9"}'),
        "config/no_base": edited(name, base_model_name_or_path=None),
        "config/base_number": edited(name, base_model_name_or_path=5),
        "config/base_missing": unrecorded(edited(name, base_model_name_or_path="/no/such/folder")),
        "config/base_itself": lambda folder: edited(name, base_model_name_or_path=str(folder))(folder),
        "config/base_here": edited(name, base_model_name_or_path="m"),
        "config/base_file": lambda folder: edited(name, base_model_name_or_path=str(folder / name))(folder),
        "config/base_nul": edited(name, base_model_name_or_path="a\0b"),
        "config/type": edited(name, peft_type="FOO"),
        "config/type_number": edited(name, peft_type=5),
        "config/rank_text": edited(name, r="x"),
        "config/rank_zero": edited(name, r=0),
        "config/rank_other": edited(name, r=7),
        "config/modules": edited(name, target_modules=["foo"]),
        "config/modules_number": edited(name, target_modules=5),
        "config/task_number": edited(name, task_type=5),
        "config/reward": edited(name, task_type="SEQ_CLS"),
        "weights/removed": removed("adapter_model.safetensors"),
        "weights/empty": replaced("adapter_model.safetensors", b""),
        "weights/cut": cut("adapter_model.safetensors"),
        "weights/foreign": replaced("adapter_model.safetensors", b"PK\x03\x04" * 100),
        "weights/shape": weights(
            lambda tensors: tensors.__setitem__(_first(tensors, "lora_A"), torch.zeros(2, 3)),
            "adapter_model.safetensors",
        ),
        "weights/nan": weights(
            lambda tensors: tensors.__setitem__(
                _first(tensors, "lora_A"), tensors[_first(tensors, "lora_A")] * float("nan")
            ),
            "adapter_model.safetensors",
        ),
        "weights/none": weights(dict.clear, "adapter_model.safetensors"),
        "weights/some_missing": weights(_drop("lora_A"), "adapter_model.safetensors"),
    }


def _two_adapters(folder: Path) -> None:
    """Two adapters, each of which names the other as its base."""
    for name, other in (("m", "n"), ("n", "m")):
        shutil.copytree(_made("adapter"), folder / name)
        edited("adapter_config.json", base_model_name_or_path=str(folder / other))(folder / name)


def gguf(version: int = 3, tensors: int = 0, pairs: bytes = b"", n_pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, n_pairs) + pairs


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_contents() -> dict[str, bytes]:
    foo = _text("general.architecture") + struct.pack("<I", 8) + _text("foo")
    llama = _text("general.architecture") + struct.pack("<I", 8) + _text("llama")
    return {
        "empty": b"",
        "magic": b"GGUG" + gguf()[4:],
        "cut_header": gguf()[:10],
        "no_pairs": gguf(),
        "version_1": gguf(1),
        "version_huge": gguf(2**31),
        "big_endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        "unknown_architecture": gguf(pairs=foo, n_pairs=1),
        "llama_alone": gguf(pairs=llama, n_pairs=1),
        "cut_pairs": gguf(pairs=foo[:-2], n_pairs=1),
        "pairs_huge": gguf(n_pairs=2**60),
        "tensors_huge": gguf(tensors=2**60, pairs=llama, n_pairs=1),
        "text_huge": gguf(pairs=struct.pack("<Q", 2**62) + b"a", n_pairs=1),
        "type_unknown": gguf(pairs=_text("a") + struct.pack("<I", 99), n_pairs=1),
        "not_utf_8": gguf(
            pairs=_text("general.architecture") + struct.pack("<I", 8) + struct.pack("<Q", 1) + b"\xff", n_pairs=1
        ),
        "array_huge": gguf(pairs=_text("a") + struct.pack("<IIQ", 9, 4, 2**60), n_pairs=1),
        "foreign": b"PK\x03\x04" * 100,
    }


def model_cases() -> Iterator[Malformed]:
    not_in_rewards = ("generation/",)
    for name, change in folder_changes().items():
        command = COMPARE if name.startswith(not_in_rewards) else REWARDS
        yield Malformed(f"model/{name}", command, DATA, _copied(change))
    for name in (
        "config/removed",
        "config/not_json",
        "config/deep",
        "config/list",
        "tokenizer/deep",
        "tokenizer/removed",
        "config/unknown_type",
    ):
        dry = "run|smoke|--dry-run|--set|model.name=m|--set|data.source=d.jsonl|--out|out"
        yield Malformed(f"model-dry-run/{name}", dry, DATA, _copied(folder_changes()[name]))
    for name in (
        "config/empty_object",
        "config/layers_text",
        "weights/cut",
        "weights/shape",
        "tokenizer/not_json",
        "index/outside",
    ):
        judge = "judge|s.parquet|--policy|a|--baseline|b|--judge|llm:m|--out|out.parquet"
        yield Malformed(f"model-judge/{name}", judge, SAMPLES, _copied(folder_changes()[name]))
    for name, change in reward_changes().items():
        yield Malformed(f"reward-model/{name}", SCORE, DATA, _copied(change, "reward"))
    for name, change in adapter_changes().items():
        yield Malformed(f"adapter/{name}", REWARDS, DATA, _copied(change, "adapter"))
    yield Malformed("adapter/config/each_other", REWARDS, DATA, _two_adapters)
    for name, content in gguf_contents().items():
        command = REWARDS.replace("|m|", "|gguf:m.gguf|")
        yield Malformed(f"gguf/{name}", command, DATA | {"m.gguf": content}, words=("m.gguf",))
    yield from _kinds()
    yield from _names()


def _kinds() -> Iterator[Malformed]:
    """A reward model as a policy, and the other way round, in every command that loads one."""
    reward = _copied(lambda folder: None, "reward")
    words = ("is a reward model, not a policy",)
    commands = {
        "rewards": REWARDS,
        "reference": "rewards|--policy|tiny|--reference|m|--any-reference|--data|d.jsonl|--out|out.parquet",
        "compare": COMPARE,
        "label": "label|--policy|m|--judge|llm:tiny|--principles|hhh|--out|out.jsonl.gz|--data|p.txt",
        "simulate": "simulate|--policy|m|--k|2|--max-new-tokens|2|--out|out.jsonl.gz|--data|p.txt",
        "llm_judge": "judge|s.parquet|--policy|a|--baseline|b|--judge|llm:m|--out|out.parquet",
        "implicit_judge": "compare|tiny|tiny|--data|p.txt|--judge|implicit:m,tiny|--max-new-tokens|2|--out|out2",
        "dry_run": "run|smoke|--dry-run|--out|out|"
        "--set|model.name=m|--set|data.source=d.jsonl|--set|data.eval_fraction=0.5|--out|out",
    }
    for name, command in commands.items():
        yield Malformed(f"kind/reward_as_policy/{name}", command, DATA, reward, words=words)
    adapter = _copied(edited("adapter_config.json", task_type="SEQ_CLS"), "adapter")
    yield Malformed("kind/reward_adapter_as_policy", REWARDS, DATA, adapter, words=words)
    yield Malformed("kind/policy_as_reward", SCORE.replace("|m|", "|tiny|"), DATA, words=("not a reward model",))
    policy_adapter = _copied(lambda folder: None, "adapter")
    yield Malformed("kind/adapter_as_reward", SCORE, DATA, policy_adapter, words=("not of a reward model",))
    judge = "compare|tiny|tiny|--data|p.txt|--judge|rm:tiny|--max-new-tokens|2|--out|out2"
    yield Malformed("kind/policy_as_rm_judge", judge, DATA, words=("not a reward model",))


def _names() -> Iterator[Malformed]:
    yield Malformed("model-name/file", REWARDS, DATA | {"m": b"x"})
    yield Malformed("model-name/gguf_without_prefix", REWARDS.replace("|m|", "|m.gguf|"), DATA | {"m.gguf": b"x"})
    yield Malformed("model-name/empty_folder", REWARDS, DATA, lambda folder: (folder / "m").mkdir())
    yield Malformed("model-name/unknown", REWARDS.replace("|m|", "|tinyy|"), DATA)
    yield Malformed("model-name/blank", REWARDS.replace("|m|", "||"), DATA)
    yield Malformed("model-name/nul", REWARDS.replace("|m|", "|a\0b|"), DATA)
    yield Malformed("model-name/long", REWARDS.replace("|m|", f"|{'a' * 5000}|"), DATA)
    yield Malformed("model-name/gguf_missing", REWARDS.replace("|m|", "|gguf:no.gguf|"), DATA)
    yield Malformed("model-name/gguf_blank", REWARDS.replace("|m|", "|gguf:|"), DATA)
    yield Malformed("model-name/gguf_folder", REWARDS.replace("|m|", "|gguf:.|"), DATA)
    yield Malformed("model-name/hub_like", REWARDS.replace("|m|", "|no/such|"), DATA)
    yield Malformed("model-name/surrogate", REWARDS.replace("|m|", "|a\udcffb|"), DATA)
    rows = {"d.jsonl": jsonl(messages({"role": "user", "content": "Hi"}))}
    yield Malformed("model/no_chat_template", REWARDS, rows, _copied(removed("chat_template.jinja")))
