"""Every file of a finished run, damaged in four ways: it is named, and nothing is used or published from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.damage import DAMAGES, files_of, removed

from toolkit.errors import StoreError
from toolkit.runs.store import STAGE_FILE, RunFolder, read_document, refuse_damaged

pytestmark = pytest.mark.fault
STAGES = ("data", "sft", "reward_model", "ppo", "dpo", "evaluate", "report")


def test_each_file_damaged_in_four_ways(small_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    refuse_damaged(run)
    folder, keys = RunFolder(run), read_document(run / "manifest.json")["keys"]
    n = 0
    for stage in STAGES:
        assert folder.state(stage, keys[stage], {}).status == "cached"
        for path in list(files_of(run / stage)):
            content, name = path.read_bytes(), path.relative_to(run / stage).as_posix()
            for damage in DAMAGES:
                damage(path)
                if path.is_file() and path.read_bytes() == content:
                    continue  # an empty file cannot be emptied
                n += 1
                if (name, damage) == (STAGE_FILE, removed):
                    with pytest.raises(StoreError, match="did not finish writing"):
                        folder.refuse_foreign(stage)
                else:
                    state = folder.state(stage, keys[stage], {})
                    assert state.status == "damaged" and name in state.damage, (stage, name)
                if not (name.startswith("checkpoints/") and damage is removed):  # those may be removed
                    with pytest.raises(StoreError) as caught:
                        refuse_damaged(run)
                    assert name.rpartition("/")[2] in str(caught.value)
                path.write_bytes(content)
    refuse_damaged(run)
    assert n > 200
