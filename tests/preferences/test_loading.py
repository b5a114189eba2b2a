"""Folders, data sets on disk and the hub's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.preferences.reading import read_preferences


def test_folders_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for part, n in (("harmless-base", 2), ("helpful-base", 3)):
        (tmp_path / "hub" / part).mkdir(parents=True)
        lines = [{"prompt": f"{part} {k}", "chosen": "x", "rejected": "y"} for k in range(n)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "hub" / part / "train.jsonl").write_text(text)
    everything = read_preferences(str(tmp_path / "hub"))
    assert everything.report.n_prompts == 5
    part = read_preferences(str(tmp_path / "hub"), config="harmless-base")  # a folder that acts as a configuration
    assert [row.prompt for row in part.rows] == ["harmless-base 0", "harmless-base 1"]
    loaded = datasets.load_dataset(str(tmp_path / "hub"))
    loaded.save_to_disk(str(tmp_path / "all"))
    loaded["train"].save_to_disk(str(tmp_path / "one"))
    for name in ("all", "one"):
        again = read_preferences(str(tmp_path / name))
        assert (again.rows, again.fingerprint) == (everything.rows, everything.fingerprint)


def test_hub_data_goes_through_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        asked.append((path, options))
        return datasets.Dataset.from_list([{"prompt": "p", "chosen": "x", "rejected": "y"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = read_preferences("someone/prefs-1.0", split="train_prefs", config="c", revision="v2")
    assert asked == [("someone/prefs-1.0", {"name": "c", "split": "train_prefs", "revision": "v2"})]
    assert data.rows[0].responses == ["x", "y"]
    assert len(data.fingerprint) == 64
