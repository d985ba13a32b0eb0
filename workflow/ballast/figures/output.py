"""Every figure of a suite as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ballast.escape import file_names
from ballast.figures.curves import learn_forget
from ballast.figures.difference import critical_difference
from ballast.figures.forgetting import heat_map
from ballast.figures.palette import save
from ballast.figures.ranks import rank_sweep
from ballast.figures.tradeoff import scatter
from ballast.tables.summary import Place

KINDS = ("svg", "pdf")
OF_A_PLACE: dict[str, Callable[[Place], Figure]] = {
    "ranks": rank_sweep,
    "difference": critical_difference,
    "forgetting": heat_map,
}


def write_figures(
    places: Sequence[Place], folder: Path, kinds: Sequence[str] = KINDS
) -> list[Path]:
    """Write every figure into `folder`, atomically; the same results give the same bytes with the
    same version of matplotlib.

    tradeoff.{svg,pdf,png} with every base and target; curves.{svg,pdf} where cells have curves; and
    {ranks,difference,forgetting}-BASE-TARGET.{svg,pdf}. Those of an earlier run whose base
    or target is gone are removed. Returns the paths, sorted.
    """
    written = write_scatter(places, folder, kinds=(*kinds, "png"))
    curves = learn_forget(places)
    written += [] if curves is None else save(curves, folder, "curves", kinds)
    names = file_names((p.analysis.base, p.analysis.target) for p in places)
    for place, name in zip(places, names.values(), strict=True):
        for kind, draw in OF_A_PLACE.items():
            written += save(draw(place), folder, f"{kind}-{name}", kinds)
    for kind in (*OF_A_PLACE, "curves"):
        for path in folder.glob(f"{kind}*"):
            if path.suffix in (".svg", ".pdf") and path not in written:
                path.unlink()
    return sorted(written)


def write_scatter(
    places: Sequence[Place],
    folder: Path,
    name: str = "tradeoff",
    kinds: Sequence[str] = (*KINDS, "png"),
) -> list[Path]:
    """Write the scatter of every base and target as NAME.KIND; returns the paths."""
    return save(scatter(places), folder, name, kinds)
