"""States in the memory of this process, and their similarity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attuned.base.values import Match, StateSnapshot
from attuned.engines.vectors import Vectors, make_vectors
from attuned.states.contract import BATCH_SIZE, SearchRequest, clamp_score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from attuned.base.codec import Schema


class VectorIndex:
    """The latest snapshots as unit vectors. It is told who was written, and catches up when asked."""

    def __init__(self, schema: Schema) -> None:
        self.stale: set[str] = set()
        self._schema = schema
        self._vectors: Vectors | None = None
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
