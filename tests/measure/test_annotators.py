"""Annotators from a file: what is read, and what each wrong file is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import DuelError, RecipeError
from toolkit.measure.annotators import read_annotators
from toolkit.preferences.simulate import Annotator

ANNOTATOR = "- {name: ann, noise: 1e-1, bias: format, weight: -0.3, flipped: 0.25, ties: 0}\n- {name: bob}\n"


def written(folder: Path, text: str) -> Path:
    (folder / "annotators.yaml").write_text(text, encoding="utf-8")
    return folder / "annotators.yaml"


@pytest.mark.parametrize(
    "text",
    [
        ANNOTATOR,
        "annotators:\n" + ANNOTATOR,
        '[{"name": "ann", "noise": 0.1, "bias": "format", "weight": -0.3, "flipped": 0.25, "ties": 0},{"name": "bob"}]',
    ],
)
def test_yaml_and_json_are_read(text: str, tmp_path: Path) -> None:
    assert read_annotators(written(tmp_path, text)) == [
        Annotator("ann", 0.1, "format", -0.3, flip_share=0.25, tie_below=0.0),
        Annotator("bob", 0.0),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no list of annotators"),
        ("[]", "no list of annotators"),
        ("name: ann", "no list of annotators"),
        ("- {name: [", "not valid YAML"),
        ("- ann", "is no mapping"),
        ("- {noise: 0.1}", "the name is None"),
        ("- {name: 3}", "the name is 3"),
        ("- {name: a, nois: 0.1}", "did you mean 'noise'?"),
        ("- {name: a, bias: lenght, weight: 1}", "did you mean 'length'?"),
        ("- {name: a, bias: length}", "the bias 'length' has no weight"),
        ("- {name: a, weight: 0.2}", "a weight without a bias"),
        ("- {name: a, noise: -1}", "noise is -1, expected a number that is not negative"),
        ("- {name: a, noise: .nan}", "noise is nan"),
        ("- {name: a, flipped: 1.2}", "flipped is 1.2, expected a number from 0 to 1"),
        ("- {name: a, ties: yes}", "ties is True"),
        ("- {name: a}\n- {name: a}", "the name 'a' is there twice"),
        ("- {name: a, noise: 1, noise: 2}", "noise is there twice"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    with pytest.raises(DuelError) as refused:
        read_annotators(file)
    assert said in str(refused.value) and "annotators.yaml" in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the file"):
        read_annotators(tmp_path / "none.yaml")
