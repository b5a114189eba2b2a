"""What makes one score of a reward model's outputs: their centring, their combination, the members of an ensemble.

``reward_head.json`` lies beside the weights of a reward model, or above the folders of an ensemble's members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toolkit.errors import ModelError
from toolkit.evals.ensembles import Combination, combined
from toolkit.evals.process import SOLUTION_SCORES, SolutionScore
from toolkit.files import write_json
from toolkit.models.files import FIX, REWARD_HEAD_FILE, model_json

# Prompts whose SFT samples get a mean score of 0. The mean of 128 has a standard error of 0.09 standard deviations.
CENTRING_PROMPTS = 128


@dataclass(frozen=True)
class SampleLaw:
    """How the samples were drawn whose mean score is 0."""

    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class ProcessHead:
    """What makes a process reward model: its output is the logit of a step being right, at the step's last token.

    ``separator`` stands between two steps, and ``solution_score`` makes one score of the steps' probabilities.
    ``conversational`` says whether it was trained on prompts that are messages.
    """

    separator: str
    solution_score: SolutionScore
    conversational: bool = False


@dataclass(frozen=True)
class RewardHead:
    """How M outputs of a reward model become one score. A model without the file has one output, which is its score.

    ``mean`` is subtracted from the score, and ``means`` (M of them, or none) from the outputs before they are combined.
    ``outputs`` names them where there are several: heads of one model, by annotator or number, or ``members``, folders
    of reward models. ``annotator`` is the output that is the score by itself; "" combines all of them. With
    ``process`` it is a process reward model, whose one output is the solution score. ``conversational`` says whether it
    was trained on prompts that are messages; None where that is not known.
    """

    mean: float = 0.0
    samples: SampleLaw | None = None
    means: Sequence[float] = ()
    outputs: Sequence[str] = ()
    members: Sequence[str] = ()
    combine: Combination = "mean"
    uwo_lambda: float = 0.5
    annotator: str = ""
    process: ProcessHead | None = None
    conversational: bool | None = None

    @property
    def n_outputs(self) -> int:
        return max(1, len(self.outputs))

    def centred(self, outputs: ArrayLike) -> NDArray[np.float64]:
        """[..., M] outputs minus their means."""
        return np.asarray(np.asarray(outputs, dtype=np.float64) - np.asarray(self.means or 0.0))

    def scores(self, outputs: ArrayLike) -> NDArray[np.float64]:
        """[...] scores of [..., M] outputs.

        >>> RewardHead(outputs=["a", "b"], means=[1.0, 0.0], combine="wco", mean=0.5).scores([[2.0, 3.0], [4.0, 1.0]])
        array([0.5, 0.5])
        """
        centred = self.centred(outputs)
        if self.annotator:
            return np.asarray(centred[..., list(self.outputs).index(self.annotator)] - self.mean)
        return np.asarray(combined(centred, self.combine, self.uwo_lambda) - self.mean)

    def centred_on(self, outputs: ArrayLike, law: SampleLaw) -> RewardHead:
        """The head that gives the samples with these [N, M] outputs a mean score of 0.

        Several outputs have a mean of 0 each, before they are combined: Bradley-Terry leaves the level of each free,
        and their variance must not be that of their levels.
        """
        values = np.asarray(outputs, dtype=np.float64)
        means = tuple(values.mean(0).tolist()) if self.n_outputs > 1 else ()
        head = replace(self, means=means, mean=0.0, samples=law)
        return replace(head, mean=float(head.scores(values).mean()))

    def write(self, folder: Path) -> None:
        """Write the file, with what differs from the default."""
        default = RewardHead()
        values = {name: value for name, value in asdict(self).items() if value != getattr(default, name)}
        write_json(folder / REWARD_HEAD_FILE, {"mean": self.mean} | values)


def reward_head(folder: str | Path) -> RewardHead:
    """The head in a reward model's folder. Raises ModelError where the file is damaged."""
    path = Path(folder) / REWARD_HEAD_FILE
    if not path.is_file():
        return RewardHead()
    values = model_json(path)
    if not _finite(values.get("mean")):
        raise ModelError("the mean of the scores must be a finite number", where=str(path), fix=FIX)
    try:
        head = _head(values)
    except (TypeError, ValueError, LookupError) as error:
        raise ModelError(f"what makes a score of the outputs is damaged: {error}", where=str(path), fix=FIX) from error
    return head


def _head(values: Mapping[str, Any]) -> RewardHead:
    law = values.get("samples")
    names = {name: [str(item) for item in values.get(name) or []] for name in ("outputs", "members")}
    means, combine = values.get("means") or [], values.get("combine", "mean")
    process = values.get("process")
    if process is not None and process["solution_score"] not in SOLUTION_SCORES:
        raise ValueError(f"there is no solution score {process['solution_score']!r}")
    if process is not None and not (isinstance(process["separator"], str) and process["separator"].strip(" ")):
        raise ValueError("the separator of steps must be a text")
    conversational = values.get("conversational")
    if not (conversational is None or isinstance(conversational, bool)):
        raise ValueError("conversational must be true or false")
    annotator, uwo_lambda = values.get("annotator", ""), values.get("uwo_lambda", 0.5)
    if combine not in get_args(Combination):
        raise ValueError(f"there is no combination {combine!r}")
    if not all(map(_finite, means)) or len(means) not in (0, max(1, len(names["outputs"]))):
        raise ValueError("means must be finite numbers, one for each output")
    if names["members"] and len(names["members"]) != len(names["outputs"]):
        raise ValueError("each member has one output")
    if any(Path(member).name != member or member in ("", ".", "..") for member in names["members"]):
        raise ValueError("members are folders beside it")
    if annotator and annotator not in names["outputs"]:
        raise ValueError(f"there is no output {annotator!r}")
    if not _finite(uwo_lambda):
        raise ValueError("uwo_lambda must be a finite number")
    return RewardHead(
        mean=float(values["mean"]),
        samples=None if law is None else SampleLaw(float(law["temperature"]), int(law["max_new_tokens"])),
        means=[float(mean) for mean in means],
        outputs=names["outputs"],
        members=names["members"],
        combine=combine,
        uwo_lambda=float(uwo_lambda),
        annotator=str(annotator),
        process=None
        if process is None
        else ProcessHead(process["separator"], process["solution_score"], bool(process.get("conversational"))),
        conversational=conversational,
    )


def _finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
