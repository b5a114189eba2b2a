"""Batches that processes share: each is computed once, and every process gets all results in their order."""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.engine import distributed
from toolkit.engine.distributed import map_batches, shared_batches


@pytest.mark.parametrize("n_batches", [0, 1, 5])
def test_each_batch_is_computed_by_one_process(n_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [f"batch {number}" for number in range(n_batches)]
    computed: list[list[str]] = [[], [], []]
    sent: list[list[Any]] = []

    def in_process(rank: int, all_items: Any) -> tuple[list[str], list[str]]:
        def compute(batch: str) -> str:
            computed[rank].append(batch)
            return batch.upper()

        told: list[str] = []
        monkeypatch.setattr(distributed, "world", lambda: (rank, 3))
        monkeypatch.setattr(distributed, "all_items", all_items)
        with shared_batches():
            return map_batches(batches, compute, told.append), told

    class SentError(Exception):
        """Ends a process behind what it sends."""

    def send(items: list[Any]) -> list[Any]:
        sent.append(items)
        raise SentError

    for rank in range(3):
        with pytest.raises(SentError):
            in_process(rank, send)
    assert sorted(batch for of_rank in computed for batch in of_rank) == batches
    assert max(map(len, computed)) - min(map(len, computed)) <= 1
    everything = [item for items in sent for item in items]
    for rank in range(3):
        results, told = in_process(rank, lambda _: everything)
        assert results == [batch.upper() for batch in batches]
        assert sorted(told) == results


def test_a_process_computes_all_batches_unless_they_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO's processes sample prompts of their own."""
    monkeypatch.setattr(distributed, "world", lambda: (1, 2))
    assert map_batches([1, 2, 3], str) == ["1", "2", "3"]
