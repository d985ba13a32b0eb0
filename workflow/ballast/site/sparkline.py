"""A learning curve as an SVG that stands inside a page."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 640.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 8.0, 10.0, 26.0


def sparkline(steps: Sequence[float], losses: Sequence[float | None]) -> Markup | None:
    """An SVG of loss against step, both from zero; None if there are fewer than two points."""
    points = [(x, y) for x, y in zip(steps, losses, strict=True) if y is not None]
    if len(points) < 2:
        return None
    last, top = max(x for x, _ in points), max(y for _, y in points) or 1.0
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> str:
        return f"{LEFT + across * x / last:.1f},{TOP + down * (1 - y / top):.1f}"

    line = " ".join(place(x, y) for x, y in points)
    first_loss, last_loss = points[0][1], points[-1][1]
    label = f"Training loss from {first_loss:g} to {last_loss:g} in {last:g} steps"
    ticks = "".join(_level(y, top, down) for y in (0.0, top / 2, top))
    return Markup(
        '<svg class="curve" viewBox="0 0 {w:g} {h:g}" role="img" aria-label="{label}">'
        '{ticks}<polyline points="{line}"/>'
        '<text x="{left:g}" y="{foot:g}">step 0</text>'
        '<text x="{right:g}" y="{foot:g}" text-anchor="end">{last}</text></svg>'
    ).format(
        w=WIDTH, h=HEIGHT, label=label, ticks=Markup(ticks), line=line, left=LEFT,
        right=WIDTH - RIGHT, foot=HEIGHT - 8, last=f"{last:g}",
    )  # fmt: skip


def _level(value: float, top: float, down: float) -> str:
    y = TOP + down * (1 - value / top)
    return (
        f'<line x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    )
