"""A study on a Ray cluster of two nodes, one of which is lost midway, has the numbers of one that ran here."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.finished_study import SMALL_STUDY
from support.running import duel_process

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.fault,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


def rows_without_times(folder: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "table.parquet").to_pylist()
    return [{name: value for name, value in row.items() if name != "wall_s"} for row in rows]


def test_a_node_that_is_lost_changes_no_number(small_study: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    out = tmp_path / "study"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    lost = []

    def lose_a_node(node: Any) -> None:
        while not list(out.glob("trials/*/.work/ppo-*/trainer")):
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
        lost.append(node)

    try:
        second = cluster.add_node(num_cpus=1)
        killer = threading.Thread(target=lose_a_node, args=(second,), daemon=True)
        killer.start()
        duel_process(
            "study",
            "study-tiny",
            "--out",
            str(out),
            *SMALL_STUDY,
            "--engine",
            "ray",
            env={"RAY_ADDRESS": cluster.address},
        )
        killer.join(10)
    finally:
        cluster.shutdown()
    assert lost, "the node was there until the end"
    assert rows_without_times(out) == rows_without_times(small_study)
    verdicts = [json.loads((folder / "study.json").read_text())["verdict"] for folder in (out, small_study)]
    assert verdicts[0]["matched_kl"] == verdicts[1]["matched_kl"] and verdicts[0]["best"] == verdicts[1]["best"]
