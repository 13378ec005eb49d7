"""Labels beside points: each goes to the spot around its point where it hides least.

Plain geometry; lengths are points of 1/72 inch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MARKER = 5.0
_SWEEPS = 4


@dataclass(frozen=True)
class Box:
    """A rectangle by its lower left and upper right corners."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        return (self.x1 - self.x0) * (self.y1 - self.y0)

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return width * height if width > 0 and height > 0 else 0.0


@dataclass(frozen=True)
class Spot:
    """Where a label's lower left corner stands, relative to its point; ``far`` asks for a line between them."""

    dx: float
    dy: float
    far: bool


def place(points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], edge: Box) -> list[Spot]:
    """A spot for each label of the given (width, height), covering few others and staying in ``edge``.

    Coordinate descent: each label in turn takes the best spot given all others, in the first sweep those placed so far;
    four sweeps. Deterministic.
    """
    marks = [Box(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in points]
    placed: dict[int, Box] = {}
    chosen: dict[int, Spot] = {}
    for _ in range(_SWEEPS):
        for index, (point, size) in enumerate(zip(points, sizes, strict=True)):
            others = [*marks, *(box for other, box in placed.items() if other != index)]
            options = [(spot, _box(point, size, spot)) for spot in _spots(*size)]
            chosen[index], placed[index] = min(options, key=lambda option: _cost(*option, others, edge))
    return [chosen[index] for index in range(len(points))]


def _box(point: tuple[float, float], size: tuple[float, float], spot: Spot) -> Box:
    x, y = point[0] + spot.dx, point[1] + spot.dy
    return Box(x, y, x + size[0], y + size[1])


def _spots(width: float, height: float) -> list[Spot]:
    """Candidates from right beside the point outwards; the order breaks ties."""
    spots = []
    for gap in (6.0, 14.0, 24.0, 36.0, 50.0, 66.0):
        right, left, up, down = gap, -gap - width, gap, -gap - height
        corners = [(x, y) for x in (0.7 * right, left + 0.3 * gap) for y in (0.7 * up, down + 0.3 * gap)]
        sides = [(right, -height / 2), (left, -height / 2), (-width / 2, up), (-width / 2, down)]
        slants = [(x, y) for x in (-width * 0.2, -width * 0.8) for y in (up, down)]
        spots += [Spot(x, y, gap > 6) for x, y in (*sides, *corners, *slants)]
    return spots


def _cost(spot: Spot, box: Box, others: Sequence[Box], edge: Box) -> float:
    """Area hidden, area outside the frame (worse), and a little for the way from the point."""
    away = max(abs(spot.dy), abs(spot.dx) if spot.dx > 0 else abs(spot.dx + box.x1 - box.x0))
    return sum(map(box.overlap, others)) + 3 * (box.area - box.overlap(edge)) + away
