"""What functions take from Python: data frames, data sets and records, models in memory, and functions as judges."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast, get_args

from toolkit.errors import DataError, DuelError, ModelError, RecipeError

if TYPE_CHECKING:
    import datasets
    import pandas as pd
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Data: TypeAlias = "str | Path | pd.DataFrame | datasets.Dataset | Iterable[Mapping[str, Any] | str]"
"""A data source as on the command line, a data frame, a ``datasets.Dataset``, or a list of records in any format that
duel reads. Where prompts are enough, the list may hold texts."""

InMemory: TypeAlias = "PreTrainedModel | PeftModel"
Model: TypeAlias = "str | Path | InMemory | tuple[InMemory, PreTrainedTokenizerBase]"
"""A model by its name or folder, a model in memory, or (model, tokenizer). Without a tokenizer, that of the model's own
``name_or_path`` is taken. A model in memory is written to disk and read again; an adapter is merged, in a copy."""

Judge: TypeAlias = "str | Callable[[Sequence[Any], Sequence[str]], Iterable[float | None]]"
"""A judge as on the command line, or a function f(prompts, completions) that returns a score for each completion."""

Dtype = Literal["float32", "bfloat16"]
DTYPES = get_args(Dtype)

_OF_CALL: ContextVar[list[dict[str, str]]] = ContextVar("of_call")
Function = TypeVar("Function", bound=Callable[..., Any])


class Inputs:
    """Turns objects into names that files go by: they are written beside ``target``, the function's result."""

    def __init__(self, target: Path, names: dict[str, str] | None = None) -> None:
        self.target = target
        self.names = {} if names is None else names  # what a file goes by -> what the caller calls it
        if (of_call := _OF_CALL.get(None)) is not None:
            of_call.append(self.names)

    def data(self, data: Data, suffix: str = "records", *, file: Path | None = None) -> str:
        """A name or path unchanged; records are written, with the same bytes for the same records."""
        if isinstance(data, str | Path):
            return str(data)
        from toolkit.files import write_text

        path = file or self.target.with_name(f"{self.target.name}.{suffix}.jsonl")
        lines = [json.dumps(record, ensure_ascii=False, default=_json_value) + "\n" for record in records_of(data)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(lines))
        self.names[str(path)] = suffix
        return str(path)

    def outputs(self, outputs: Mapping[str, Data] | Sequence[str | Path] | str | Path) -> list[Path]:
        """Files of outputs unchanged; outputs by the name of their system are written to one file."""
        if isinstance(outputs, str | Path):
            return [Path(outputs)]
        if not isinstance(outputs, Mapping):
            return [Path(file) for file in outputs]
        rows = [{**record, "generator": name} for name, data in outputs.items() for record in _read(data)]
        return [Path(self.data(rows, "outputs"))]

    def model(self, model: Model) -> str:
        """A name or folder unchanged; a model in memory is written with its tokenizer."""
        if isinstance(model, str | Path):
            return str(model)
        from peft import PeftModel
        from transformers import PreTrainedModel

        from toolkit.models.merged import merged

        network, tokenizer = model if isinstance(model, tuple) and len(model) == 2 else (model, None)
        if not isinstance(network, PreTrainedModel | PeftModel):
            fix = "name it, or hand over a transformers model, or (model, tokenizer)"
            raise ModelError(f"a {type(model).__name__} is no model", where="model", fix=fix)
        folder = self.target.with_name(f"{self.target.name}.models") / str(len(self.names))
        if tokenizer is None:
            tokenizer = _tokenizer_of(network)
        if isinstance(network, PeftModel):
            network = merged(copy.deepcopy(network))
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        label = network.name_or_path or type(network).__name__
        number = sum(name.partition(" #")[0] == label for name in self.names.values())
        self.names[str(folder)] = f"{label} #{number + 1}" if number else label
        return str(folder)

    def judge(self, judge: Judge) -> str:
        """A judge's name unchanged; a function gets one."""
        if isinstance(judge, str):
            return judge
        from toolkit.judging.user_code import hand_over

        if not callable(judge):
            fix = "name a judge, or hand over a function f(prompts, completions)"
            raise RecipeError(f"a {type(judge).__name__} is no judge", where="judge", fix=fix)
        spec = hand_over(judge)
        self.names[spec] = getattr(judge, "__name__", type(judge).__name__)
        return spec

    def named(self, value: Any) -> Any:
        """A result in which objects have the caller's names for them, not those of their files."""
        if isinstance(value, str):
            return self.names.get(value, value)
        if isinstance(value, Mapping):
            return {self.named(key): self.named(inside) for key, inside in value.items()}
        return [self.named(inside) for inside in value] if isinstance(value, list) else value


def quietly(function: Function) -> Function:
    """The function without what transformers and datasets print, which they print again after it.

    Its errors name the caller's objects, not the files that they were written to.
    """

    @wraps(function)
    def quiet(*args: Any, **options: Any) -> Any:
        of_call: list[dict[str, str]] = []
        token = _OF_CALL.set(of_call)
        try:
            with quiet_libraries() as hush:
                hush()
                return function(*args, **options)
        except DuelError as error:
            for names in of_call:
                error.rename(names)
            raise
        finally:
            _OF_CALL.reset(token)

    return cast("Function", quiet)


@contextmanager
def quiet_libraries() -> Iterator[Callable[[], None]]:
    """A function that hides progress bars and warnings of transformers and datasets until the end of the context."""
    shown_again: list[Callable[[], Any]] = []

    def hush() -> None:
        import datasets
        import transformers

        logs = transformers.utils.logging
        if logs.is_progress_bar_enabled():
            logs.disable_progress_bar()  # type: ignore[no-untyped-call]
            shown_again.append(logs.enable_progress_bar)
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            shown_again.append(datasets.enable_progress_bars)
        shown_again.append(partial(logs.set_verbosity, logs.get_verbosity()))
        logs.set_verbosity_error()  # type: ignore[no-untyped-call]

    try:
        yield hush
    finally:
        for show in reversed(shown_again):  # what was first is last: a stage hides them again
            show()


@contextmanager
def placed(out: str | Path | None, name: str) -> Iterator[Path]:
    """Where a result goes: ``out``, or the file ``name`` of a folder that is removed afterwards."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / name


def records_of(data: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data frame, a data set or a list. A text is the record of a prompt.

    Raises DataError for what has no rows: a dict of columns or splits, or another object.
    """
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")  # an object of theirs has imported them
    if pandas is not None and isinstance(data, pandas.DataFrame):
        data = data.to_dict("records")
    elif datasets is not None and isinstance(data, datasets.DatasetDict):
        raise DataError("this is several splits", where="data", fix=f"take one of them: data[{next(iter(data))!r}]")
    elif isinstance(data, Mapping) or not isinstance(data, Iterable):
        fix = "hand over a list of dicts, a data frame, a datasets.Dataset, or a path"
        raise DataError(f"a {type(data).__name__} has no rows", where="data", fix=fix)
    for number, record in enumerate(data):
        if isinstance(record, str):
            yield {"prompt": record}
        elif isinstance(record, Mapping):
            yield {str(name): None if _is_missing(cell) else cell for name, cell in record.items()}
        else:
            fix = "each row is a dict of columns"
            raise DataError(f"row {number + 1} is a {type(record).__name__}", where="data", fix=fix)


def _read(data: Data) -> Iterator[dict[str, Any]]:
    """The rows of anything, a file too."""
    if not isinstance(data, str | Path):
        yield from records_of(data)
        return
    from toolkit.preferences.loading import read_file

    for _, record in read_file(Path(data)).records:
        yield dict(record)


def _is_missing(value: Any) -> bool:
    """Whether it is what a table has where it has no value: NaN, and pandas' NA and NaT. In a record it is null."""
    if value is None or isinstance(value, str | bool | int | list | Mapping):
        return False
    pandas = sys.modules.get("pandas")  # a value of pandas' own has imported it
    if pandas is not None:
        return bool(pandas.api.types.is_scalar(value) and pandas.isna(value))
    return isinstance(value, Number) and bool(value != value)


def _json_value(value: Any) -> Any:
    """Arrays and numbers of numpy and torch as lists and numbers; a time as text."""
    import numpy as np
    import torch

    if _is_missing(value):  # inside a list
        return None
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def _tokenizer_of(network: Any) -> Any:
    from toolkit.models.resolve import resolve
    from toolkit.models.tokenizer import load_tokenizer

    if not network.name_or_path:
        raise ModelError("this model does not say which tokenizer it has", where="model", fix="give (model, tokenizer)")
    return load_tokenizer(resolve(network.name_or_path))


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raises RecipeError for a value that is none of those known."""
    if value not in known:
        raise RecipeError(f"{name} is {value!r}", where=name, fix=f"one of {', '.join(known)}")
