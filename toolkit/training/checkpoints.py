"""The Trainer's checkpoints: which of them are whole, and which one an interrupted stage resumes from.

A list of all files with their hashes is written last. A checkpoint without it was not written to its end, and one whose
files differ from it was damaged later: the Trainer would fail on some of these, and resume others to other weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from toolkit.engine.distributed import barrier, main_process
from toolkit.errors import StoreError
from toolkit.files import read_json, write_json
from toolkit.storage.integrity import differences, in_words, is_list, listed

FILES_FILE = "files.json"
# The one before the newest is there to fall back to.
CHECKPOINTS_KEPT = 2


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the trainer's checkpoint of this step lies."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


class CheckpointFiles(TrainerCallback):
    """Writes the list of a checkpoint's files as soon as all processes have written theirs."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        barrier()
        if state.is_world_process_zero:
            folder = checkpoint_folder(args, state)
            write_json(folder / FILES_FILE, listed(folder, [FILES_FILE]))
        barrier()


class EndsAtLastStep:
    """Before a Trainer in the order of classes: no step is trained behind the last one.

    transformers asks behind a step whether it was the last one, and not before the first. A training that resumes from
    the checkpoint of its last step would train one step more where its last epoch has further batches.
    """

    state: TrainerState

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of an optimiser step: none once all steps are done."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        batches: tuple[list[Any], Any] = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        return batches


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in words; "" where it is whole."""
    if not (folder / FILES_FILE).is_file():
        return "it was not written to its end"
    try:
        files = read_json(folder / FILES_FILE)
    except StoreError:
        return f"{FILES_FILE} is damaged"
    return in_words(differences(folder, files)) if is_list(files) else f"{FILES_FILE} is damaged"


def last_checkpoint(out: Path, say: Callable[[str], None] = lambda _: None) -> str | None:
    """The newest whole checkpoint of an interrupted stage; None where it has to start again.

    Those that are not whole are removed, and ``say`` gets a line about each, so that the Trainer never counts them
    among the checkpoints that it keeps. All processes call this.
    """
    folders = sorted((out / "trainer").glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    problems = {folder: damage(folder) for folder in folders}
    barrier()  # before the main process removes what another one still looks at
    whole = [folder for folder in folders if not problems[folder]]
    for folder in folders:
        if problems[folder] and main_process():
            instead = f"training goes on from {whole[0].name}" if whole else "training starts again"
            say(f"{folder.name} cannot be used, {problems[folder]}: {instead}")
            shutil.rmtree(folder)
    barrier()
    return str(whole[0]) if whole else None
