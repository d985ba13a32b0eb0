"""Learning-rate curves of `tune`: validation score against rate, one line per method and rank."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd

from ballast.rates import KEYS, read_rates

matplotlib.use("Agg")
DETERMINISTIC = {"svg": {"Date": None}, "png": {"Software": None}}


def write_curves(table: Path, folder: Path, name: str = "curves") -> list[Path]:
    """Write curves.svg and curves.png from a table of learning rates; the same bytes every time."""
    from matplotlib import pyplot as plt

    rates = read_rates(table)
    panels = list(rates.groupby(["base", "target"], sort=True))
    with plt.rc_context({"svg.hashsalt": "ballast", "font.size": 9}):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(6 * len(panels), 4.2), squeeze=False, layout="constrained"
        )
        for place, ((base, target), block) in zip(axes[0], panels, strict=True):
            colours = plt.get_cmap("tab20")(range(20))
            for number, (label, line) in enumerate(_lines(block)):
                style = {"color": colours[number % 20], "marker": "osD^v"[number % 5]}
                place.plot(line.index, line.to_numpy(), label=label, linewidth=1.2, **style)
            place.set(
                xscale="log",
                xlabel="peak learning rate",
                ylabel="validation score, points",
                title=f"{base}, {target}",
            )
            place.legend(fontsize=7, ncols=2)
            place.grid(alpha=0.3)
        made = []
        for kind, metadata in DETERMINISTIC.items():
            path = folder / f"{name}.{kind}"
            figure.savefig(path, metadata=metadata, dpi=150)
            made.append(path)
        plt.close(figure)
    return made


def _lines(block: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """Label and mean score by rate of every method, variant and rank of a panel."""
    found = []
    for (_, _, method, variant, rank), rows in block.groupby(KEYS, dropna=False, sort=True):
        label = (
            method + (f" r{rank}" if pd.notna(rank) else "") + (f" {variant}" if variant else "")
        )
        found.append((label, rows.groupby("learning_rate")["score"].mean()))
    return found
