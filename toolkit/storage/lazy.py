"""Sequences that do not hold their items."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

T = TypeVar("T", covariant=True)


class LazySequence(Sequence[T]):
    """A sequence whose items are made anew each time that they are asked for. So is a slice of it."""

    @abstractmethod
    def item(self, at: int) -> T:
        """The item at a place that is there, counted from 0."""

    def part(self, places: range) -> Sequence[T]:
        """The items at these places."""
        return Computed(places, self.item)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[T]: ...
    def __getitem__(self, at: int | slice) -> T | Sequence[T]:
        places = range(len(self))
        return self.part(places[at]) if isinstance(at, slice) else self.item(places[at])

    def __iter__(self) -> Iterator[T]:
        return map(self.item, range(len(self)))


@dataclass(frozen=True)
class Computed(LazySequence[T]):
    """What ``make`` makes of each item of another sequence.

    >>> squares = Computed(range(5), lambda k: k * k)
    >>> squares[-1], len(squares), list(squares[1:4:2])
    (16, 5, [1, 9])
    """

    of: Sequence[Any]
    make: Callable[[Any], T]

    def __len__(self) -> int:
        return len(self.of)

    def item(self, at: int) -> T:
        return self.make(self.of[at])
