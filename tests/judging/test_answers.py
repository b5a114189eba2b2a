"""The memory of judgements, damaged: what is wrong is named or asked again, and never taken for an answer."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from support.damage import cut, emptied

from toolkit.errors import StoreError
from toolkit.judging.answers import Answer, Question, remembering

pytestmark = pytest.mark.fault

QUESTIONS = [Question("openai:m@u", "t", f"prompt {k}", f"first {k} " * 40, f"second {k}") for k in range(60)]


def filled(path: Path) -> dict[str, Answer]:
    with remembering(path) as memory:
        for k, question in enumerate(QUESTIONS):
            memory.keep(question, Answer(k / 64, raw=f"reply {k}"))
        answers = memory.answers(QUESTIONS)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return answers


def test_a_flipped_byte_anywhere_never_changes_an_answer(tmp_path: Path) -> None:
    """Over the whole file: each answer is the one that was stored, or none; or the file is refused in words."""
    answers = filled(tmp_path / "m.sqlite")
    content = (tmp_path / "m.sqlite").read_bytes()
    lost = refused = 0
    for k, place in enumerate(range(50, len(content), len(content) // 120)):
        path = tmp_path / f"{k}.sqlite"
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            with remembering(path) as memory:
                left = memory.answers(QUESTIONS)
        except StoreError as error:
            assert "move" in error.fix
            refused += 1
            continue
        same = {key: answers[key] for key in left}
        assert {key: (a.value, a.raw) for key, a in left.items()} == {key: (a.value, a.raw) for key, a in same.items()}
        lost += len(left) < len(answers)
    assert lost


@pytest.mark.parametrize("damage", [emptied, cut])
def test_half_a_file(damage: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.judging.answers.WAIT_S", 0.5)  # an emptied file looks as if another process wrote it
    answers = filled(tmp_path / "m.sqlite")
    assert callable(damage)
    damage(tmp_path / "m.sqlite")
    try:
        with remembering(tmp_path / "m.sqlite") as memory:
            assert memory.answers(QUESTIONS).items() <= answers.items()
    except StoreError as error:
        assert "move" in error.fix


def test_the_memory_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    answers = filled(tmp_path / "m.sqlite")
    with sqlite3.connect(tmp_path / "m.sqlite") as connection:
        connection.execute("ALTER TABLE answers DROP COLUMN seal")
    with remembering(tmp_path / "m.sqlite") as memory:
        assert memory.answers(QUESTIONS) == answers
        memory.keep(Question("j", "t", "p", "a"), Answer(0.5))
