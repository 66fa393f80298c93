"""States in the memory of this process, and their similarity."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Protocol, cast

from attuned.base.values import Match, StateSnapshot
from attuned.states.contract import BATCH_SIZE, SearchRequest, clamp_score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from attuned.base.codec import Schema


class _Vectors(Protocol):
    """Unit vectors in numbered rows."""

    def put(self, row: int, direction: Sequence[float]) -> None: ...

    def scores(self, direction: Sequence[float], rows: int) -> Any: ...

    def best(self, scores: Any, number: int) -> Iterable[int]:
        """The rows of the best scores, best first, at least ``number`` of them or all."""
        ...


class _PlainVectors:
    """Rows as lists, where numpy is absent."""

    def __init__(self) -> None:
        self._rows: list[Sequence[float]] = []

    def put(self, row: int, direction: Sequence[float]) -> None:
        self._rows[row : row + 1] = [direction]

    def scores(self, direction: Sequence[float], rows: int) -> list[float]:
        return [sum(map(operator.mul, direction, row)) for row in self._rows[:rows]]

    def best(self, scores: list[float], number: int) -> Iterable[int]:  # noqa: ARG002 - sorts all anyhow
        return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)


class _NumpyVectors:
    """Rows as a matrix."""

    def __init__(self, vector_size: int) -> None:
        import numpy as np

        self._numpy = np
        self._matrix = np.zeros((64, vector_size), dtype=np.float32)

    def put(self, row: int, direction: Sequence[float]) -> None:
        if row >= len(self._matrix):
            self._matrix = self._numpy.concatenate([self._matrix, self._numpy.zeros_like(self._matrix)])
        self._matrix[row] = direction

    def scores(self, direction: Sequence[float], rows: int) -> Any:
        return self._matrix[:rows] @ self._numpy.asarray(direction, dtype=self._numpy.float32)

    def best(self, scores: Any, number: int) -> Iterable[int]:
        if number < len(scores):
            rows = self._numpy.argpartition(-scores, number)[:number]
            rows = rows[self._numpy.argsort(-scores[rows])]
        else:
            rows = self._numpy.argsort(-scores)
        return cast("list[int]", rows.tolist())


def make_vectors(vector_size: int) -> _Vectors:
    try:
        return _NumpyVectors(vector_size)
    except ImportError:
        return _PlainVectors()


class VectorIndex:
    """The latest snapshots as unit vectors. It is told who was written, and catches up when asked."""

    def __init__(self, schema: Schema) -> None:
        self.stale: set[str] = set()
        self._schema = schema
        self._vectors: _Vectors | None = None
        self._rows: list[StateSnapshot | None] = []
        self._row_of: dict[str, int] = {}
        self._free: list[int] = []

    def catch_up(self, latest: Callable[[str], StateSnapshot | None]) -> bool:
        """Take in some of the users written since; whether all are taken in."""
        for _ in range(min(4 * BATCH_SIZE, len(self.stale))):
            user_id = self.stale.pop()
            self._take(user_id, latest(user_id))
        return not self.stale

    def _take(self, user_id: str, snapshot: StateSnapshot | None) -> None:
        if self._vectors is None:
            self._vectors = make_vectors(self._schema.vector_size)
        row = self._row_of.get(user_id)
        if snapshot is None:
            if row is not None:
                self._free.append(self._row_of.pop(user_id))
                self._rows[row] = None
            return
        if row is None:
            row = self._row_of[user_id] = self._free.pop() if self._free else len(self._rows)
        self._rows[row : row + 1] = [snapshot]
        self._vectors.put(row, self._schema.vector(snapshot.axes))

    def search(self, search: SearchRequest) -> list[Match]:
        """The best matches among those taken in."""
        if self._vectors is None:
            return []
        scores = self._vectors.scores(self._schema.vector(search.axes), len(self._rows))
        for number in (4 * search.limit + BATCH_SIZE, len(scores)):
            matches = self._matches(search, scores, self._vectors.best(scores, number))
            if len(matches) == search.limit or number >= len(scores):
                break
        return matches

    def _matches(self, search: SearchRequest, scores: Any, rows: Iterable[int]) -> list[Match]:
        matches: list[Match] = []
        for row in rows:
            snapshot, score = self._rows[row], clamp_score(float(scores[row]))
            if score < search.score_threshold or len(matches) == search.limit:
                break
            if snapshot is not None and search.admits(snapshot):
                matches.append(Match(snapshot, score))
        return matches


def score_of(match: Match) -> float:
    return match.score
