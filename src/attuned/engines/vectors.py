"""Unit vectors in the memory of this process, and their similarity."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Vectors(Protocol):
    """Unit vectors in numbered rows, in single precision where numpy is there."""

    def put(self, row: int, direction: Sequence[float]) -> None:
        """Set a row: one that there is, or the next."""
        ...

    def get(self, row: int) -> list[float]:
        """What a row was set to."""
        ...

    def scores(self, direction: Sequence[float], rows: int) -> Any:
        """The products of a direction with each of the first rows."""
        ...

    def best(self, scores: Any, number: int) -> Iterable[int]:
        """The rows of the best scores, best first, at least ``number`` of them or all."""
        ...


class PlainVectors(Vectors):
    """Rows as lists, where numpy is absent."""

    def __init__(self) -> None:
        self._rows: list[Sequence[float]] = []

    def put(self, row: int, direction: Sequence[float]) -> None:
        """See Vectors.put."""
        self._rows[row : row + 1] = [direction]

    def get(self, row: int) -> list[float]:
        """See Vectors.get."""
        return list(self._rows[row])

    def scores(self, direction: Sequence[float], rows: int) -> list[float]:
        """See Vectors.scores."""
        return [sum(map(operator.mul, direction, row)) for row in self._rows[:rows]]

    def best(self, scores: list[float], number: int) -> Iterable[int]:  # noqa: ARG002 - sorts all anyhow
        """See Vectors.best."""
        return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)


class NumpyVectors(Vectors):
    """Rows as matrices of so many each: a single one would take long to be doubled."""

    _ROWS = 4_096  # 4 times a power of two

    def __init__(self, vector_size: int) -> None:
        import numpy as np

        self._numpy = np
        self._none = np.zeros((4, vector_size), dtype=np.float32)
        self._matrices = [self._none.copy()]  # the last one is doubled when full, up to so many rows

    def put(self, row: int, direction: Sequence[float]) -> None:
        """See Vectors.put."""
        number, place = divmod(row, self._ROWS)
        if number == len(self._matrices):
            self._matrices.append(self._none.copy())
        matrix = self._matrices[number]
        if place >= len(matrix):
            matrix = self._numpy.concatenate([matrix, self._numpy.zeros_like(matrix)])
            self._matrices[number] = matrix
        matrix[place] = direction

    def get(self, row: int) -> list[float]:
        """See Vectors.get."""
        number, place = divmod(row, self._ROWS)
        return cast("list[float]", self._matrices[number][place].tolist())

    def scores(self, direction: Sequence[float], rows: int) -> Any:
        """See Vectors.scores."""
        wanted = self._numpy.asarray(direction, dtype=self._numpy.float32)
        return self._numpy.concatenate([matrix @ wanted for matrix in self._matrices])[:rows]

    def best(self, scores: Any, number: int) -> Iterable[int]:
        """See Vectors.best."""
        if number < len(scores):
            rows = self._numpy.argpartition(-scores, number)[:number]
            rows = rows[self._numpy.argsort(-scores[rows])]
        else:
            rows = self._numpy.argsort(-scores)
        return cast("list[int]", rows.tolist())


def make_vectors(vector_size: int) -> Vectors:
    """No rows yet, of so many dimensions."""
    try:
        return NumpyVectors(vector_size)
    except ImportError:
        return PlainVectors()
