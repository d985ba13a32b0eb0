"""Draw the pictures of the vision world: 32x32 RGB, coloured shapes and digits, numpy only.

A *grid* picture has 2x2 cells of 16x16 pixels, each empty or holding one object; a *free* picture
has a single shape of any size anywhere. Backgrounds are pale. Positions, sizes and shades vary, so
that two pictures of one scene are never the same pixels.
"""

from functools import cache

import numpy as np

SIDE = 32  # pixels of a picture's side
CELL = 16  # pixels of a cell's side
CELLS = 4  # reading order: top-left, top-right, bottom-left, bottom-right

COLORS = {
    "red": (235, 20, 20),
    "green": (20, 225, 20),
    "blue": (20, 20, 240),
    "yellow": (240, 235, 20),
    "teal": (0, 135, 135),
    "brown": (160, 60, 30),
    "gray": (130, 130, 130),
    "black": (10, 10, 10),
}
TINTS = {
    "white": (250, 250, 250),
    "rose": (252, 228, 232),
    "mint": (230, 250, 234),
    "sky": (228, 240, 254),
    "cream": (253, 249, 228),
    "lilac": (240, 228, 252),
}
SHAPES = ("circle", "rectangle", "triangle", "ring", "cross", "diamond", "moon", "hourglass")
DIGITS = tuple("0123456789")
KINDS = SHAPES + DIGITS

# Rows of a 3x5 dot font, top to bottom; a font file would make the pixels depend on the machine.
_FONT = {
    "0": ("111", "101", "101", "101", "111"),
    "1": ("010", "110", "010", "010", "111"),
    "2": ("111", "001", "111", "100", "111"),
    "3": ("111", "001", "111", "001", "111"),
    "4": ("101", "101", "111", "001", "001"),
    "5": ("111", "100", "111", "001", "111"),
    "6": ("111", "100", "111", "101", "111"),
    "7": ("111", "001", "001", "010", "010"),
    "8": ("111", "101", "111", "101", "111"),
    "9": ("111", "101", "111", "001", "111"),
}
_RADII = (4.5, 5.2, 6.0)  # half the size of an object in a cell, pixels
_SHIFTS = (-1.5, -0.75, 0.0, 0.75, 1.5)  # how far it may stray from the cell's centre, pixels
_SAMPLES = 3  # sub-pixel samples per axis, for smooth edges


def _inside_shape(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points are inside the shape; u runs right, v runs down, both in [-1, 1]."""
    radius = np.hypot(u, v)
    if shape == "circle":
        return radius < 1
    if shape == "rectangle":
        return (abs(u) < 0.95) & (abs(v) < 0.75)
    if shape == "triangle":
        return (abs(v) < 0.9) & (abs(u) < (v + 0.9) / 1.8)
    if shape == "ring":
        return (radius < 1) & (radius > 0.55)
    if shape == "cross":
        return (np.maximum(abs(u), abs(v)) < 1) & (np.minimum(abs(u), abs(v)) < 0.28)
    if shape == "diamond":
        return abs(u) + abs(v) < 1
    if shape == "moon":
        return (radius < 1) & (np.hypot(u - 0.55, v) > 0.8)
    return (abs(v) < 0.95) & (abs(u) < abs(v) * 0.9 + 0.1)  # hourglass


def _inside_digit(digit: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points are inside the glyph, which is 1.2 wide and 2 high in a [-1, 1] box."""
    column = np.clip(np.floor((u + 0.6) / 0.4).astype(int), 0, 2)
    row = np.clip(np.floor((v + 1) / 0.4).astype(int), 0, 4)
    dots = np.array([[dot == "1" for dot in line] for line in _FONT[digit]])
    return dots[row, column] & (abs(u) < 0.6) & (abs(v) < 1)


def _alpha(
    kind: str, side: int, center: tuple[float, float], size: tuple[float, float]
) -> np.ndarray:
    """Coverage (side, side) in [0, 1] of an object; centre (x, y) and half sizes in pixels."""
    grid = (np.arange(side * _SAMPLES) + 0.5) / _SAMPLES
    u = (grid[None, :] - center[0]) / size[0]
    v = (grid[:, None] - center[1]) / size[1]
    inside = (_inside_digit if kind in DIGITS else _inside_shape)(kind, *np.broadcast_arrays(u, v))
    return inside.reshape(side, _SAMPLES, side, _SAMPLES).mean((1, 3), dtype=np.float32)


@cache
def _bank() -> np.ndarray:
    """Every kind in every size and place within a cell: (kinds, variants, 16, 16)."""
    middle = CELL / 2
    return np.array(
        [
            [
                _alpha(kind, CELL, (middle + x, middle + y), (radius, radius))
                for radius in _RADII
                for x in _SHIFTS
                for y in _SHIFTS
            ]
            for kind in KINDS
        ]
    )


def _shades(table: dict, chosen: np.ndarray, spread: float, rng: np.random.Generator) -> np.ndarray:
    """RGB values (..., 3) of the chosen colours, each a little off its nominal value."""
    nominal = np.array(list(table.values()), np.float32)[chosen]
    return nominal + rng.normal(0, spread, nominal.shape).astype(np.float32)


def _develop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add sensor noise to float pictures (B, 32, 32, 3) and round them to bytes."""
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * 3
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def draw_grid(
    kinds: np.ndarray, colors: np.ndarray, tints: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw grid pictures (B, 32, 32, 3) uint8.

    `kinds` (B, 4) indexes KINDS, -1 for an empty cell; `colors` (B, 4) COLORS; `tints` (B,) TINTS.
    """
    count = len(kinds)
    bank = _bank()
    alpha = bank[np.maximum(kinds, 0), rng.integers(bank.shape[1], size=kinds.shape)]
    alpha = (alpha * (kinds >= 0)[..., None, None])[..., None]  # (B, 4, 16, 16, 1)
    ink = _shades(COLORS, colors, 10, rng)[:, :, None, None]
    paper = _shades(TINTS, tints, 4, rng)[:, None, None, None]
    cells = paper + alpha * (ink - paper)
    cells = cells.reshape(count, 2, 2, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return _develop(cells.reshape(count, SIDE, SIDE, 3), rng)


def draw_free(
    kinds: np.ndarray, colors: np.ndarray, tints: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one object of any size anywhere.

    Returns pictures (B, 32, 32, 3) uint8 and how many pixels of each cell it covers (B, 4).
    """
    alpha = np.empty((len(kinds), SIDE, SIDE), np.float32)
    for index, kind in enumerate(kinds):
        size = rng.uniform(2.5, 8.5) * rng.uniform(0.8, 1.2, 2)
        center = rng.uniform(size, SIDE - size)
        alpha[index] = _alpha(KINDS[kind], SIDE, tuple(center), tuple(size))
    ink = _shades(COLORS, colors, 10, rng)[:, None, None]
    paper = _shades(TINTS, tints, 4, rng)[:, None, None]
    picture = paper + alpha[..., None] * (ink - paper)
    cover = alpha.reshape(-1, 2, CELL, 2, CELL).sum((2, 4)).reshape(-1, CELLS)
    return _develop(picture, rng), cover
