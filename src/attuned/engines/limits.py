"""What one request to a Qdrant server may hold: in bytes, and by the limits of strict mode."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from attuned.engines.waist import Point, payload_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from attuned.base.errors import T

NO_LIMIT = 2**31 - 1


class Limits(NamedTuple):
    """What strict mode allows requests to one collection; without it only the bytes of a request count."""

    page: int = NO_LIMIT  # points in an answer
    points: int = NO_LIMIT  # in one operation that writes or deletes
    listed: int = NO_LIMIT  # values in one condition
    ids: int = NO_LIMIT  # points retrieved by their ids
    exact: bool = True

    @classmethod
    def of(cls, config: Any) -> Limits:
        """Those in the configuration of a collection, as the client gives it."""
        strict = config.strict_mode_config
        if strict is None or not strict.enabled:
            return cls()

        def least(*limits: int | None) -> int:
            return min((max(1, limit) for limit in limits if limit is not None), default=NO_LIMIT)

        return cls(
            page=least(strict.max_query_limit),
            points=least(strict.upsert_max_batchsize, strict.write_rate_limit),
            listed=least(strict.condition_max_size),
            ids=least(strict.read_rate_limit),
            exact=strict.search_allow_exact is not False,
        )


def cut(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut values into pieces of a size."""
    return (values[start : start + size] for start in range(0, len(values), size))


def portions(points: Sequence[Point], most: int, most_bytes: int) -> Iterator[tuple[list[Point], int]]:
    """Cut points into what one operation may hold, with its size in bytes.

    Those of a tenant stay together, unless they alone are more than that.
    """
    portion, taken = list[Point](), 0
    last = {point.id: point for point in points}.values()  # of one id twice
    for _, group in itertools.groupby(sorted(last, key=_tenant_of), _tenant_of):
        sized = [(point, _request_bytes(point)) for point in group]
        whole = len(sized) <= most and sum(size for _, size in sized) <= most_bytes
        for piece in [sized] if whole else [[each] for each in sized]:
            size = sum(size for _, size in piece)
            if portion and (taken + size > most_bytes or len(portion) + len(piece) > most):
                yield portion, taken
                portion, taken = [], 0
            portion += [point for point, _ in piece]
            taken += size
    if portion:
        yield portion, taken


def _tenant_of(point: Point) -> str:
    return point.tenant or ""


def _request_bytes(point: Point) -> int:
    """About how many bytes a point takes in a request, rather too many."""
    return 100 + 24 * len(point.vector) + payload_bytes(point.payload)
