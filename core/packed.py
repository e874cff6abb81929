"""Immutable sequences of numbers in one to eight bytes each, where a tuple takes 8 for the pointer and 24 to 32 for the
number: token ids, masks and log-probs, of which a run keeps millions.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

N = TypeVar("N", int, float)


class Packed(Sequence[N]):
    """Behaves as the tuple of its numbers, to which it is equal: as a key, sliced, compared, and when it is printed."""

    __slots__ = ("_array",)

    def __init__(self, numbers: Iterable[N]) -> None:
        values = numbers._array if isinstance(numbers, Packed) else list(numbers)
        self._array: array[Any] = values if isinstance(values, array) else _smallest(values)

    @overload
    def __getitem__(self, index: int) -> N: ...
    @overload
    def __getitem__(self, index: slice) -> "Packed[N]": ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, int):
            return self._array[index]
        part: Packed[N] = Packed(())
        part._array = self._array[index]
        return part

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[N]:
        return iter(self._array)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Packed):
            return self._array == other._array
        return tuple(self._array) == other if isinstance(other, tuple) else NotImplemented

    def __lt__(self, other: "Packed[N]") -> bool:
        return self._array < other._array

    def __hash__(self) -> int:
        return hash(tuple(self._array))

    def __repr__(self) -> str:
        return repr(tuple(self._array))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy

        return numpy.array(self._array, dtype=dtype)  # always a copy: the numbers must not change


def _smallest(values: list[Any]) -> "array[Any]":
    """Return the narrowest array that holds `values`. Raises ValueError for integers that need more than 64 bits."""
    try:
        if any(isinstance(value, float) for value in values):
            return array("d", values)
        low, high = min(values, default=0), max(values, default=0)
        return array("b" if -128 <= low and high < 128 else "i" if -(2**31) <= low and high < 2**31 else "q", values)
    except OverflowError as err:
        raise ValueError("a number needs more than 64 bits; expected token ids, mask entries or log-probs") from err


def packed(numbers: Sequence[N] | None) -> "Packed[N] | None":
    """Return the numbers packed; None stays None."""
    return None if numbers is None else Packed(numbers)
