"""Draws the pictures of the documentation, from real calls: python docs/pictures.py [DIRECTORY]."""

from __future__ import annotations

import math
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import matplotlib as mpl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attuned_store import StateSnapshot, StateStore, open_store

START = datetime(2026, 1, 5, 8, tzinfo=UTC)
AXES = ("warmth", "cognitive_load", "anxiety_level", "formality")


def two_weeks(store: StateStore) -> None:
    """Three states a day of somebody who grows confident while the load comes and goes."""
    for step in range(42):
        day, hour = divmod(step, 3)
        grown = 1 / (1 + math.exp(3.2 - day / 2))  # slowly, then fast, then no more
        axes = {
            "warmth": 0.2 + 0.75 * grown,
            "cognitive_load": 0.5 + (0.45 if day % 7 < 5 else -0.35) * math.sin(math.pi * (hour + 1) / 4),
            "anxiety_level": 0.9 - 0.75 * grown + 0.09 * math.sin(step),
            "formality": 0.9 - 0.8 * grown,
        }
        store.upsert_latest(StateSnapshot("ada", axes, START + timedelta(days=day, hours=5 * hour)))


def draw(directory: Path) -> None:
    """Draw all pictures."""
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "attuned_store", "svg.fonttype": "none"})
    with open_store("memory://") as store:
        two_weeks(store)
        plot = store.plot_history("ada", axes=AXES)
        plot.figure.savefig(directory / "history.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "pictures")
