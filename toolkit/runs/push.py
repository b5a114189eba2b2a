"""``duel push``: the models and the data of a run as repositories that stand alone, with filled cards.

A policy has all its weights and loads with ``AutoModelForCausalLM``. Its adapter is merged in fp32 and rounded to the
run's precision as in sampling, which gives the weights that were sampled. (Another kind of device draws other random
numbers.) The reward model loads with ``AutoModelForSequenceClassification``, in fp32, since its scores are compared by
their differences. The data is there in TRL's preference format and in the run's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from toolkit.errors import RecipeError, StoreError, first_line, nearest
from toolkit.files import (
    atomic_write,
    copy_whole,
    is_hub_id,
    refuse_below_file,
    remove_partials,
    write_table,
    write_text,
)
from toolkit.models.encoding import is_conversation, text_encoder
from toolkit.models.files import REWARD_HEAD_FILE
from toolkit.models.inspect import torch_dtype
from toolkit.models.load import load_policy, load_reward_model, reads_pairs
from toolkit.models.resolve import TRAINING_RECORD_FILE, resolve
from toolkit.models.reward_head import reward_head
from toolkit.models.save import merge_and_save
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow, row_to_dict
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.runs.model_cards import FinishedRun, data_card, model_card
from toolkit.runs.store import (
    MANIFEST_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    read_document,
    read_record,
    refuse_damaged,
    refuse_study,
)
from toolkit.storage.integrity import is_list, listed
from toolkit.storage.locks import writing

# What the hub's HTTP client raises, and the hub lets through: of httpx in huggingface_hub 1, of httpx2 in 2.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
STAGE_OF = {"sft": "sft", "ppo": "ppo", "dpo": "dpo", "rft": "rft", "reward-model": "reward_model"}
# What every run has to give: its models and its data. A run with the baseline has its policy, too.
ARTIFACTS = ("sft", "ppo", "dpo", "reward-model", "preferences")
BASELINE = "rft"


def push_run(
    folder: Path, name: str | None, *, to: Path | None, artifacts: Sequence[str], public: bool, reporter: Reporter
) -> dict[str, str]:
    """Artifact -> where it is now: a folder below ``to``, or the address of the repository ``name-artifact``.

    Raises RecipeError for names that cannot be, StoreError for an unfinished run, a folder that exists, or a hub that
    refuses or cannot be reached.
    """
    if (name is None) == (to is None):
        fix = "name USER/NAME on the hub, or a folder with --to"
        raise RecipeError("say where to push", where="duel push", fix=fix)
    if name is not None and not is_hub_id(name):
        raise RecipeError(f"{name!r} is no repository", where="NAME", fix="write it as USER/NAME")
    for artifact in artifacts:
        if artifact not in (*ARTIFACTS, BASELINE):
            raise RecipeError(f"a run has no {artifact!r}", where="--only", fix=nearest(artifact, ARTIFACTS))
    run = read_finished(folder)
    available = [*ARTIFACTS, BASELINE] if BASELINE in run.manifest["stages"] else ARTIFACTS
    if BASELINE in artifacts and BASELINE not in available:
        fix = "leave it out, or run the recipe with --set 'rft={}'"
        raise StoreError("the run has no baseline of rejection sampling (rft)", where=str(folder), fix=fix)
    wanted = [artifact for artifact in available if artifact in (artifacts or available)]
    if to is not None:
        refuse_below_file(to / wanted[0])
        with writing(to) as resumed:
            written_before = [artifact for artifact in wanted if (to / artifact).exists()]
            if written_before and not resumed:
                fix = "choose another --to, or move it away"
                raise StoreError("the folder exists", where=str(to / written_before[0]), fix=fix)
            remove_partials(to, ".*.partial")
            new = [artifact for artifact in wanted if artifact not in written_before]  # what is there is whole
            written = dict(_write_all(run, new, to, None, reporter))
        return {artifact: str(written.get(artifact, to / artifact)) for artifact in wanted}
    with tempfile.TemporaryDirectory() as scratch:
        return {
            artifact: _send(written, f"{name}-{artifact}", artifact, public, reporter)
            for artifact, written in _write_all(run, wanted, Path(scratch), name, reporter)
        }


def read_finished(folder: Path) -> FinishedRun:
    """Raises StoreError where the folder holds no finished run, or a damaged one."""
    refuse_study(folder, f"push one of its trials' models: they are below {folder / 'trials'}")
    if not (folder / MANIFEST_FILE).is_file() or not (folder / RESULTS_FILE).is_file():
        fix = "finish it first: duel run RECIPE --out DIR"
        raise StoreError("there is no finished run to push", where=str(folder), fix=fix)
    refuse_links_out(folder)
    refuse_damaged(folder)
    manifest = read_document(folder / MANIFEST_FILE)
    if "evaluate" not in manifest["stages"]:
        what = "the run's evaluation is of other settings than its models"
        raise StoreError(what, where=str(folder), fix="run its recipe again")
    text = (folder / RECIPE_FILE).read_text(encoding="utf-8")
    return FinishedRun(folder, manifest, read_document(folder / RESULTS_FILE), text)


def refuse_links_out(folder: Path) -> None:
    """Raises StoreError where a link in the folder leads out of it: what it points to would be published."""
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise StoreError(
                f"this link leads out of the run, to {path.resolve()}",
                where=str(path),
                fix="remove it; if it is a file of yours that belongs to the run, put a copy in its place",
            )


def _write_all(
    run: FinishedRun, artifacts: Sequence[str], root: Path, name: str | None, reporter: Reporter
) -> Iterator[tuple[str, Path]]:
    """Each artifact with its folder, which is whole: an interrupted one is removed."""
    for artifact in artifacts:
        reporter.line(f"{artifact}: writing")
        with atomic_write(root / artifact) as partial:
            partial.mkdir(parents=True)
            if artifact == "preferences":
                write_preferences(run, partial, name)
            else:
                write_model(run, artifact, partial, name)
        yield artifact, root / artifact


def write_model(run: FinishedRun, artifact: str, out: Path, name: str | None) -> None:
    """All weights of a model with its tokenizer and card in ``out``."""
    stage = run.last(STAGE_OF[artifact])
    folder = stage / "model"
    ref, section = resolve(str(folder)), run.model_section
    tokenizer = load_tokenizer(ref)
    if artifact == "reward-model":
        for member in reward_head(folder).members:  # of an ensemble, each in its folder
            model = load_reward_model(resolve(str(folder / member)), section, dtype=torch.float32)
            merge_and_save(model, tokenizer, out / member, torch.float32)
        if ref.kind == "ensemble":
            tokenizer.save_pretrained(out)
        else:
            merge_and_save(load_reward_model(ref, section, dtype=torch.float32), tokenizer, out, torch.float32)
    elif ref.kind == "adapter":
        dtype = torch_dtype(section.dtype)
        merge_and_save(load_policy(ref, section, dtype=dtype), tokenizer, out, dtype)
    else:
        _copy_written(stage, folder, out)
    for file in (REWARD_HEAD_FILE, TRAINING_RECORD_FILE):
        if (folder / file).is_file():
            copy_whole(folder / file, out / file)
    rows = from_parquet(run.folder / "data" / "eval.parquet")
    pair = artifact == "reward-model" and reads_pairs(ref)
    encoder = text_encoder(tokenizer, rows[0].prompt, ref.spec, pair=pair)
    end = str(tokenizer.convert_ids_to_tokens(encoder.end_id))
    card = model_card(run, artifact, name, end=end, conversational=encoder.conversational, pair=pair)
    write_text(out / "README.md", card)


def _copy_written(stage: Path, model: Path, out: Path) -> None:
    """The files of a model that its stage wrote: whatever else lies there is somebody's own, and stays there."""
    files = (read_record(stage) or {}).get("files")
    names = files if is_list(files) else listed(stage)  # of an earlier version
    for path in sorted(stage / name for name in names):
        if path.is_relative_to(model):
            target = out / path.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_whole(path, target)


def write_preferences(run: FinishedRun, out: Path, name: str | None) -> None:
    """Both splits in TRL's preference format and in the format with K responses, with a card."""
    counts = {}
    for split, file in (("train", "train.parquet"), ("test", "eval.parquet")):
        rows = from_parquet(run.folder / "data" / file)
        pairs = trl_pairs(rows)
        if not pairs:
            raise StoreError("no comparison has a winner", where=str(run.folder / "data" / file))
        (out / "pairs").mkdir(exist_ok=True)
        (out / "ranked").mkdir(exist_ok=True)
        write_table(pairs, out / "pairs" / f"{split}.parquet")
        write_table([row_to_dict(row) for row in rows], out / "ranked" / f"{split}.parquet")
        counts[split] = {"prompts": len(rows), "pairs": len(pairs)}
    write_text(out / "README.md", data_card(run, name, counts))


def trl_pairs(rows: Sequence[PreferenceRow]) -> list[dict[str, Any]]:
    """TRL's preference format with an explicit prompt: a row for each compared pair that has a winner.

    Text stays text; the responses to messages become messages. ``agreement`` is the share of the pair's weight that
    prefers ``chosen``; it is above one half.
    """
    pairs = []
    for row in rows:
        for pair in splits.pairs(row):
            if pair.p == 0.5:
                continue
            i, j = (pair.i, pair.j) if pair.p > 0.5 else (pair.j, pair.i)
            chosen, rejected = (_as_completion(row, row.responses[k]) for k in (i, j))
            agreement = max(pair.p, 1 - pair.p)
            pairs.append({"prompt": row.prompt, "chosen": chosen, "rejected": rejected, "agreement": agreement})
    return pairs


def _as_completion(row: PreferenceRow, response: str) -> str | list[dict[str, str]]:
    return [{"role": "assistant", "content": response}] if is_conversation(row.prompt) else response


def _send(folder: Path, repository: str, artifact: str, public: bool, reporter: Reporter) -> str:
    """Upload a folder; the address of its repository."""
    api, kind = HfApi(), "dataset" if artifact == "preferences" else "model"
    reporter.line(f"{artifact}: sending to {repository}")
    try:
        api.create_repo(repository, repo_type=kind, private=not public, exist_ok=True)
        message = f"{artifact} of a paired run by duel"
        commit = api.upload_folder(repo_id=repository, repo_type=kind, folder_path=folder, commit_message=message)
    except LocalTokenNotFoundError as error:
        raise StoreError("you are not logged in to the hub", where=repository, fix="hf auth login") from error
    except HfHubHTTPError as error:
        fix = "check your token (hf auth whoami) and that you may write there"
        raise StoreError(f"the hub refused: {first_line(error)}", where=repository, fix=fix) from error
    except (HTTP_ERROR, OfflineModeIsEnabled) as error:
        what = f"the hub cannot be reached: {first_line(error)}"
        raise StoreError(what, where=api.endpoint, fix="write into a folder with --to") from error
    return str(commit.repo_url)
