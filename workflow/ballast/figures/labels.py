"""Labels beside the points of a plot, moved apart so that they can be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

Box = tuple[float, float, float, float]  # left, bottom, right, top; pixels
ANGLES = 24
DISTANCES = (5, 12, 20, 30, 42, 56, 72)  # points from the marker's edge


def place_labels(axes: Axes, items: Sequence[dict[str, Any]], fontsize: float = 8.0) -> None:
    """Write each item's text near its point, with a thin line to it where it had to move away.

    items: x, y (data), text, colour, radius (of the marker, in points); one without a text is only
    kept free. For one label after the
    other, the most crowded first, the cheapest of a fixed set of places is taken: nearness, then no
    overlap with other labels, markers, leader lines and the panel's edge, then with the lines drawn
    in the panel. No chance is involved.
    """
    figure = axes.figure
    scale = figure.dpi / 72
    renderer = figure.canvas.get_renderer()
    spots = [tuple(axes.transData.transform((item["x"], item["y"]))) for item in items]
    sizes = [_size(axes, item["text"], fontsize, renderer) for item in items]
    frame = axes.get_window_extent(renderer).extents
    obstacles = [
        _around(*spot, item["radius"] * scale + 1) for spot, item in zip(spots, items, strict=True)
    ]
    obstacles += [
        text.get_window_extent(renderer).extents for text in axes.texts if text.get_bbox_patch()
    ]
    crowd, paths = np.array(obstacles).reshape(-1, 4), np.array(_segments(axes)).reshape(-1, 4)
    named = [i for i, item in enumerate(items) if item["text"]]
    taken: list[Box] = []
    leaders: list[tuple[float, float, float, float]] = []
    places: dict[int, tuple[Box, float]] = {}
    for i in sorted(named, key=lambda i: (-_crowd(spots, i), i)):
        best = None
        reach = max(sizes[i]) + (items[i]["radius"] + DISTANCES[-1]) * scale
        beside, lines = _near(crowd, spots[i], reach), _near(paths, spots[i], reach)
        for box, distance in _candidates(spots[i], sizes[i], items[i]["radius"] * scale, scale):
            cost = distance / scale / 8
            if best is not None and cost >= best[0]:
                break
            cost += _cost(box, spots[i], taken, beside, leaders, frame)
            cost += 2.5 * sum(_crosses(line, box) for line in lines)
            if best is None or cost < best[0] - 1e-9:
                best = (cost, box, distance)
        assert best is not None
        places[i] = best[1:]
        taken.append(best[1])
        leaders.append((*spots[i], *_nearest(best[1], spots[i])))
    for i, (box, distance) in sorted(places.items()):
        _write(axes, items[i], box, distance > 8 * scale, fontsize)


def _near(boxes: np.ndarray, spot: Any, reach: float) -> list[Any]:
    """Those of many boxes or segments ([n, 4]: two corners each) that come within reach."""
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    inside = (low <= np.add(spot, reach)).all(axis=1) & (high >= np.subtract(spot, reach)).all(
        axis=1
    )
    return boxes[inside].tolist()


def _segments(axes: Axes) -> list[Any]:
    """The panel's own lines (paths and front) in pixels; faint helping lines are left out."""
    found = []
    for line in axes.lines:
        if line.get_zorder() < 2 or line.get_linestyle() == "None":
            continue
        xy = axes.transData.transform(line.get_path().vertices)
        found += [(*a, *b) for a, b in pairwise(xy) if math.dist(a, b) > 1]
    return found


def _write(axes: Axes, item: dict[str, Any], box: Box, leader: bool, fontsize: float) -> None:
    invert = axes.transData.inverted().transform
    if leader:
        end = invert(_nearest(box, tuple(axes.transData.transform((item["x"], item["y"])))))
        x, y = [item["x"], end[0]], [item["y"], end[1]]
        axes.plot(
            x,
            y,
            color=item["colour"],
            linewidth=0.6,
            alpha=0.8,
            zorder=3.5,
            scalex=False,
            scaley=False,
        )
    x, y = invert(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
    axes.text(
        x, y, item["text"], color=item["colour"], fontsize=fontsize, ha="center", va="center",
        zorder=7, path_effects=[withStroke(linewidth=2.2, foreground="white")],
    )  # fmt: skip


def _size(axes: Axes, text: str, fontsize: float, renderer: Any) -> tuple[float, float]:
    probe = axes.text(0, 0, text, fontsize=fontsize)
    extent = probe.get_window_extent(renderer)
    probe.remove()
    return extent.width + 2, extent.height


def _candidates(
    spot: Any, size: tuple[float, float], radius: float, scale: float
) -> list[tuple[Box, float]]:
    """Boxes around a point: at each distance and angle, the box that touches that circle."""
    found = []
    width, height = size
    for distance in DISTANCES:
        reach = radius + distance * scale * 0.6
        for step in range(ANGLES):
            angle = 2 * math.pi * step / ANGLES
            c, s = math.cos(angle), math.sin(angle)
            x, y = spot[0] + c * (reach + width / 2), spot[1] + s * (reach + height / 2)
            found.append(
                ((x - width / 2, y - height / 2, x + width / 2, y + height / 2), reach - radius)
            )
    return found


def _cost(
    box: Box, spot: Any, taken: list[Box], obstacles: list[Any], leaders: list[Any], frame: Any
) -> float:
    cost = 40.0 * sum(_overlap(box, other) > 0 for other in taken)
    cost += 20.0 * sum(_overlap(box, other) > 0 for other in obstacles)
    cost += 12.0 * sum(_crosses(line, box) for line in leaders)
    own = (*spot, *_nearest(box, spot))
    cost += 12.0 * sum(_crosses(own, other) for other in taken)
    cost += 10.0 * sum(_meets(own, line) for line in leaders)
    outside = box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]
    return cost + 60.0 * outside


def _around(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def _crowd(spots: Sequence[Any], i: int) -> float:
    """How crowded it is around a point: sum of inverse distances to the others."""
    return sum(1 / (1 + math.dist(spots[i], spot)) for j, spot in enumerate(spots) if j != i)


def _overlap(a: Any, b: Any) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _nearest(box: Box, spot: Any) -> tuple[float, float]:
    """The point of a box that is nearest to a spot."""
    return min(max(spot[0], box[0]), box[2]), min(max(spot[1], box[1]), box[3])


def _crosses(line: Any, box: Any) -> bool:
    """Whether a line runs through the inside of a box (Liang and Barsky's clipping)."""
    x0, y0, x1, y1 = line
    dx, dy = x1 - x0, y1 - y0
    start, end = 0.0, 1.0
    for step, gap in ((-dx, x0 - box[0]), (dx, box[2] - x0), (-dy, y0 - box[1]), (dy, box[3] - y0)):
        if step == 0:
            if gap <= 0:
                return False
        elif step < 0:
            start = max(start, gap / step)
        else:
            end = min(end, gap / step)
    return end - start > 1e-6


def _meets(a: Any, b: Any) -> bool:
    """Whether two line segments cross."""

    def side(line: Any, x: float, y: float) -> float:
        return (line[2] - line[0]) * (y - line[1]) - (line[3] - line[1]) * (x - line[0])

    return (
        side(a, b[0], b[1]) * side(a, b[2], b[3]) < 0
        and side(b, a[0], a[1]) * side(b, a[2], a[3]) < 0
    )
