"""The furnished room of the bundled clip: its furniture, the textures painted for it, its light, and its cameras.

Everything follows from a seed. World axes: x to the right, y away from the camera, z up from the floor, metres.
Textures are painted as they look on a screen and rendered as linear light.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pacevggt_patch.mini.scenes.geometry import ROOM_FACES, look_at, rotation_about_z
from pacevggt_patch.mini.scenes.raycast import FrameScenes
from pacevggt_patch.mini.scenes.textures import TextureAtlas, build_atlas

SIDE = 512  # pixels of a texture
GAMMA = 2.2
ROOM = (4.6, 4.8, 2.6)  # width, depth and height
WALL = ROOM[1] / 2  # y of the wall that the cameras face
FIELD_OF_VIEW = 64.0  # degrees
LOOKED_AT = (0.1, 1.1, 0.62)

Colour = tuple[float, float, float]

WHITE, CREAM, INK = (0.93, 0.92, 0.89), (0.88, 0.83, 0.73), (0.16, 0.18, 0.22)
SAGE, TEAL, OCHRE, RUST = (0.62, 0.67, 0.59), (0.22, 0.40, 0.43), (0.78, 0.58, 0.27), (0.66, 0.33, 0.23)
OAK, WALNUT, LINEN, LEAF = (0.70, 0.53, 0.36), (0.40, 0.27, 0.18), (0.60, 0.59, 0.57), (0.27, 0.42, 0.22)
BOOKS = (RUST, TEAL, CREAM, OCHRE, INK, (0.46, 0.22, 0.24), (0.33, 0.42, 0.33), (0.56, 0.60, 0.66), WHITE)


@dataclass(frozen=True)
class Solid:
    """A box or an ellipsoid with one texture, a side of which is `span` metres long."""

    centre: tuple[float, float, float]
    size: tuple[float, float, float]
    texture: str
    span: float = 1.0
    turn: float = 0.0  # about z, radians
    lean: float = 0.0  # about its own x axis, before the turn
    round: bool = False

    @property
    def rotation(self) -> Tensor:
        """`[3, 3]` solid to world."""
        cos, sin = math.cos(self.lean), math.sin(self.lean)
        leaning = torch.tensor([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
        return rotation_about_z(torch.tensor(self.turn)) @ leaning


def placed(solids: list[Solid], x: float, y: float, turn: float = 0.0) -> list[Solid]:
    """A piece of furniture that was built around the origin, turned about z and put on its place."""
    cos, sin = math.cos(turn), math.sin(turn)
    return [
        replace(
            solid,
            centre=(
                x + cos * solid.centre[0] - sin * solid.centre[1],
                y + sin * solid.centre[0] + cos * solid.centre[1],
                solid.centre[2],
            ),
            turn=solid.turn + turn,
        )
        for solid in solids
    ]


def legs(width: float, depth: float, height: float, thick: float, texture: str) -> list[Solid]:
    """Four legs under a rectangle around the origin."""
    corners = [(x, y) for x in (-1, 1) for y in (-1, 1)]
    return [
        Solid((x * (width - thick) / 2, y * (depth - thick) / 2, height / 2), (thick, thick, height), texture)
        for x, y in corners
    ]


def seat(width: float, texture: str, cushions: int) -> list[Solid]:
    """A sofa or an armchair, its back towards +y."""
    inner = width - 0.32
    each = inner / cushions
    solids = legs(width - 0.1, 0.75, 0.12, 0.05, "walnut")
    solids += [
        Solid((0, 0, 0.22), (width, 0.85, 0.2), texture, 0.35),
        Solid((0, 0.36, 0.55), (width - 0.04, 0.16, 0.5), texture, 0.35, lean=-0.12),
    ]
    solids += [Solid((s * (width - 0.16) / 2, 0, 0.4), (0.16, 0.85, 0.3), texture, 0.35) for s in (-1, 1)]
    for i in range(cushions):
        x = (i - (cushions - 1) / 2) * each
        solids.append(Solid((x, -0.06, 0.39), (each - 0.015, 0.74, 0.15), texture, 0.35))
        solids.append(Solid((x, 0.25, 0.62), (each - 0.03, 0.14, 0.36), texture, 0.35, lean=-0.2))
    return solids


def chest(width: float, depth: float, height: float, drawers: int) -> list[Solid]:
    """A low chest on legs with drawers on both long sides, as a table."""
    top, body = 0.035, height - 0.115
    solids = [
        *legs(width - 0.06, depth - 0.06, 0.1, 0.05, "oak"),
        Solid((0, 0, 0.08 + body / 2), (width - 0.04, depth - 0.04, body), "walnut", 0.9),
        Solid((0, 0, height - top / 2), (width, depth, top), "stone", 0.8),
    ]
    each = (width - 0.04) / drawers
    for i in range(drawers):
        x = (i - (drawers - 1) / 2) * each
        solids.append(Solid((x, 0, 0.08 + body / 2), (each - 0.04, depth - 0.01, body - 0.06), "drawer", 0.7))
        solids.append(Solid((x, 0, 0.08 + 0.6 * body), (0.05, depth + 0.03, 0.018), "brass", 0.5))
    return solids


def bookcase(width: float, height: float, draw: Callable[[float, float], float]) -> list[Solid]:
    """An open case with books and a few things, its back towards +y; `draw(low, high)` is a random number."""
    depth, board, shelves = 0.28, 0.025, 5
    solids = [Solid((0, depth / 2 - 0.01, height / 2), (width, 0.015, height), "oak", 1.2)]
    solids += [
        Solid((s * (width - board) / 2, 0, height / 2), (board, depth, height), "oak", 1.2) for s in (-1, 1)
    ]
    step = (height - board) / shelves
    solids += [
        Solid((0, 0, board / 2 + i * step), (width, depth, board), "oak", 1.2) for i in range(shelves + 1)
    ]
    for shelf in range(shelves):
        floor = board + shelf * step
        x, end = -width / 2 + board + 0.01, width / 2 - board - draw(0.12, 0.3)
        while True:
            thick, tall = draw(0.022, 0.055), step * draw(0.58, 0.86)
            if x + thick > end:
                break
            deep, book = draw(0.15, 0.21), int(draw(0, len(BOOKS)))
            size = (thick - 0.002, deep, tall)
            solids.append(Solid((x + thick / 2, -0.02, floor + tall / 2), size, f"book {book}", tall))
            x += thick
        left = (x + width / 2 - board) / 2
        solids.append(
            Solid((left, -0.02, floor + 0.07), (0.11, 0.11, 0.14), "ochre vase", 0.5, round=True)
            if shelf % 2
            else Solid((left, -0.03, floor + 0.05), (0.12, 0.16, 0.1), "walnut", 0.6)
        )
    return solids


def plant(draw: Callable[[float, float], float]) -> list[Solid]:
    """Leaves of all directions above a pot."""
    solids = [
        Solid((0, 0, 0.17), (0.34, 0.34, 0.36), "rust pot", 0.6, round=True),
        Solid((0, 0, 0.5), (0.025, 0.025, 0.6), "walnut"),
    ]
    for i in range(22):
        turn, lean = 2.4 * i + draw(-0.3, 0.3), draw(0.15, 1.1)
        length, height = draw(0.26, 0.44), draw(0.42, 0.95)
        reach = 0.1 + 0.5 * length * math.cos(lean)
        solids.append(
            Solid(
                (-reach * math.sin(turn), reach * math.cos(turn), height + 0.4 * length * math.sin(lean)),
                (draw(0.1, 0.15), length, 0.014),
                "leaf",
                0.4,
                turn,
                lean,
                round=True,
            )
        )
    return solids


def picture(x: float, z: float, width: float, height: float, name: str) -> list[Solid]:
    """A framed picture on the wall that the cameras face."""
    return [
        Solid((x, WALL - 0.012, z), (width + 0.04, 0.024, height + 0.04), "walnut", 0.8),
        Solid((x, WALL - 0.02, z), (width, 0.02, height), name, max(width, height)),
    ]


def furniture(generator: torch.Generator) -> list[Solid]:
    """All that stands in the room and hangs on its walls."""

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    skirting = [
        Solid((0, WALL - 0.01, 0.05), (ROOM[0], 0.02, 0.1), "white"),
        *[Solid((s * (ROOM[0] / 2 - 0.01), 0, 0.05), (0.02, ROOM[1], 0.1), "white") for s in (-1, 1)],
    ]
    on_table = [
        Solid((-0.2, 0.02, 0.455), (0.3, 0.22, 0.03), "book 1", 0.3, 0.2),
        Solid((-0.19, 0.03, 0.482), (0.26, 0.19, 0.025), "book 0", 0.3, 0.05),
        Solid((-0.2, 0.02, 0.505), (0.21, 0.15, 0.02), "book 2", 0.25, -0.2),
        Solid((0.22, 0.03, 0.5), (0.17, 0.17, 0.13), "teal vase", 0.5, round=True),
        Solid((0.05, -0.12, 0.465), (0.08, 0.08, 0.085), "white", 0.5, round=True),
    ]
    lamp = [
        Solid((0, 0, 0.62), (0.15, 0.15, 0.2), "teal vase", 0.5, round=True),
        Solid((0, 0, 0.78), (0.02, 0.02, 0.2), "walnut"),
        Solid((0, 0, 0.94), (0.26, 0.26, 0.22), "shade", 0.4),
    ]
    cushions = [
        Solid((-0.62, 0.06, 0.64), (0.4, 0.13, 0.4), "ochre cloth", 0.3, 0.25, -0.35),
        Solid((-0.32, 0.0, 0.6), (0.34, 0.12, 0.34), "stripes", 0.34, -0.15, -0.4),
        Solid((0.62, 0.05, 0.63), (0.38, 0.13, 0.38), "teal cloth", 0.3, -0.3, -0.35),
    ]
    return [
        *skirting,
        Solid((-0.05, 0.35, 0.008), (2.3, 1.6, 0.016), "rug", 2.3),
        *placed([*seat(1.9, "linen", 2), *cushions], -0.3, 1.75),
        *placed([*chest(1.0, 0.56, 0.44, 2), *on_table], -0.15, 0.62, 0.08),
        *placed(bookcase(0.9, 1.9, draw), 1.42, WALL - 0.15),
        *placed([*chest(0.42, 0.42, 0.52, 1), *lamp], -1.55, 1.98),
        *placed(seat(0.85, "rust cloth", 1), 1.35, 0.75, -1.15),
        *placed(plant(draw), -2.02, 2.0),
        Solid((-1.45, 0.85, 0.2), (0.5, 0.5, 0.42), "basket", 0.35, round=True),
        *picture(-0.75, 1.55, 0.55, 0.7, "hills"),
        *picture(0.0, 1.66, 0.5, 0.5, "sea"),
        *picture(0.5, 1.5, 0.32, 0.42, "shapes"),
    ]


# Textures: functions of an RGB colour and a generator, `[3, SIDE, SIDE]` in [0, 1] as they look on a screen.


def smooth(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """`[SIDE, SIDE]` smooth noise around 0 of so many cells."""
    coarse = torch.randn(1, 1, rows + 3, columns + 3, generator=generator)
    return F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=True)[0, 0]


def clouds(generator: torch.Generator, finest: int = 7, stretch: int = 0) -> Tensor:
    """`[SIDE, SIDE]` noise of all scales around 0; each `stretch` makes it twice as long from left to right."""
    octaves = range(1 + stretch, finest + 1)
    return sum(
        (smooth(2**i, 2 ** (i - stretch), generator) / 2 ** (0.7 * (i - stretch)) for i in octaves),
        torch.zeros(SIDE, SIDE),
    )


def tinted(colour: Colour, light: Tensor) -> Tensor:
    """The colour, lighter or darker by `light` `[SIDE, SIDE]`."""
    return (torch.tensor(colour)[:, None, None] * (1 + light)).clamp(0, 1)


def grid() -> tuple[Tensor, Tensor]:
    """`[SIDE, SIDE]` places down and to the right, in [0, 1]."""
    line = (torch.arange(SIDE) + 0.5) / SIDE
    down, right = torch.meshgrid(line, line, indexing="ij")
    return down, right


def plaster(colour: Colour, g: torch.Generator) -> Tensor:
    return tinted(colour, 0.02 * clouds(g, 8))


def wood(colour: Colour, g: torch.Generator) -> Tensor:
    grain = clouds(g, 8, stretch=3)
    return tinted(colour, 0.05 * torch.sin(7 * grain + 2 * smooth(3, 1, g)) + 0.06 * grain)


def planks(colour: Colour, g: torch.Generator) -> Tensor:
    """Seven rows of boards, each with a joint of its own."""
    down, right = grid()
    row = (down * 7).floor()
    joint = torch.rand(8, generator=g)[row.long()]
    board = (right - joint).remainder(1)
    gap = ((down * 7).remainder(1) < 0.02) | (board < 0.0025) | ((board - 0.55).abs() < 0.0015)
    tone = 0.05 * torch.randn(8, 2, generator=g)[row.long(), (board > 0.55).long()]
    return wood(colour, g) * (1 + tone) * torch.where(gap, 0.55, 1.0)


def cloth(colour: Colour, g: torch.Generator) -> Tensor:
    down, right = grid()
    weave = torch.sin(2 * math.pi * 60 * down) * torch.sin(2 * math.pi * 60 * right)
    return tinted(colour, 0.08 * weave + 0.09 * torch.randn(SIDE, SIDE, generator=g) + 0.025 * clouds(g))


def stone(colour: Colour, g: torch.Generator) -> Tensor:
    """Pale, with dark veins."""
    vein = torch.exp(-((clouds(g, 6) / 0.06) ** 2))
    return tinted(colour, 0.03 * clouds(g) - 0.3 * vein)


def stripes(colour: Colour, g: torch.Generator) -> Tensor:
    down, _ = grid()
    band = ((down * 9).remainder(1) < 0.35)[None]
    return torch.where(band, cloth(colour, g), cloth(CREAM, g))


def basket(colour: Colour, g: torch.Generator) -> Tensor:
    down, right = grid()
    weave = torch.sin(2 * math.pi * 12 * down) * torch.sign(torch.sin(2 * math.pi * 9 * right))
    return tinted(colour, 0.22 * weave + 0.1 * clouds(g))


def rug(colour: Colour, g: torch.Generator) -> Tensor:
    """A field of diamonds within two borders; the rug is 0.7 times as deep as it is wide."""
    down, right = grid()
    edge = torch.minimum(0.5 - (right - 0.5).abs(), 0.35 - (down - 0.5).abs())
    diamond = (14 * right).remainder(1).sub(0.5).abs() + (14 * down).remainder(1).sub(0.5).abs()
    inner = torch.where((diamond < 0.22)[None], cloth(OCHRE, g), cloth(colour, g))
    inner = torch.where(((diamond - 0.42).abs() < 0.06)[None], cloth(CREAM, g), inner)
    border = torch.where(((right + down) * 28).remainder(1)[None] < 0.5, cloth(CREAM, g), cloth(INK, g))
    found = torch.where((edge < 0.075)[None], border, inner)
    found = torch.where((edge < 0.05)[None] | ((edge - 0.085).abs() < 0.01)[None], cloth(CREAM, g), found)
    return torch.where((edge < 0.03)[None], cloth(colour, g), found)


def book(colour: Colour, g: torch.Generator) -> Tensor:
    """A spine: two lines and a title, all of them across it."""
    down, right = grid()
    found = tinted(colour, 0.05 * clouds(g) + 0.03 * torch.randn(SIDE, SIDE, generator=g))
    gold = torch.tensor(CREAM if sum(colour) < 1.6 else INK)[:, None, None]
    place = 0.18 + 0.2 * torch.rand((), generator=g)
    line = ((down - 0.08).abs() < 0.008) | ((down - 0.92).abs() < 0.008)
    title = ((down - place).abs() < 0.09) & ((right - 0.5).abs() < 0.03) & (smooth(90, 6, g) > 0)
    return torch.where((line | title)[None], 0.85 * gold + 0.15 * found, found)


def leaf(colour: Colour, g: torch.Generator) -> Tensor:
    down, right = grid()
    vein = torch.exp(-(((right - 0.5) / 0.02) ** 2)) + 0.4 * (
        ((down + (right - 0.5).abs()) * 16).remainder(1) < 0.12
    )
    return tinted(colour, 0.12 * clouds(g) + 0.35 * vein)


def hills(colour: Colour, g: torch.Generator) -> Tensor:
    """A painted landscape: a sky, a sun, and five ranges of hills, the nearer the darker."""
    down, right = grid()
    found = torch.lerp(
        torch.tensor(CREAM)[:, None, None], torch.tensor((0.87, 0.66, 0.48))[:, None, None], down
    )
    sun = ((right - 0.66).square() + (down - 0.3).square()) < 0.006
    found = torch.where(sun[None], torch.tensor(RUST)[:, None, None], found)
    for i in range(5):
        ridge = 0.4 + 0.11 * i - 0.07 * smooth(1, 3 + i, g)[SIDE // 2] - 0.012 * smooth(1, 30, g)[SIDE // 2]
        shade = torch.lerp(torch.tensor((0.66, 0.70, 0.68)), torch.tensor(colour), i / 4)[:, None, None]
        found = torch.where((down > ridge)[None], shade, found)
    return mounted(found * (1 + 0.05 * clouds(g)))


def sea(colour: Colour, g: torch.Generator) -> Tensor:
    """Bands of water under a pale sky."""
    down, _ = grid()
    water = tinted(colour, 0.5 * (1 - down) + 0.25 * clouds(g, 7, stretch=3))
    sky = tinted((0.80, 0.82, 0.80), 0.05 * clouds(g, 6, stretch=1))
    return mounted(torch.where((down > 0.48)[None], water, sky))


def shapes(colour: Colour, g: torch.Generator) -> Tensor:
    """Four discs and a bar."""
    down, right = grid()
    found = tinted(CREAM, 0.02 * clouds(g))
    for x, y, radius, tone in (
        (0.4, 0.36, 0.17, RUST), (0.62, 0.55, 0.14, TEAL), (0.42, 0.68, 0.1, OCHRE), (0.6, 0.28, 0.06, INK),
    ):  # fmt: skip
        found = torch.where(
            ((right - x).square() + (down - y).square() < radius**2)[None],
            tinted(tone, 0.06 * clouds(g)),
            found,
        )
    return mounted(
        torch.where(
            (((right - 0.28).abs() < 0.012) & (down > 0.2))[None],
            tinted(colour, torch.zeros(SIDE, SIDE)),
            found,
        )
    )


def mounted(painting: Tensor) -> Tensor:
    """A painting with a white margin."""
    down, right = grid()
    inner = torch.maximum((down - 0.5).abs(), (right - 0.5).abs()) < 0.44
    return torch.where(inner[None], painting, torch.tensor(WHITE)[:, None, None])


PAINTED: dict[str, tuple[Callable[[Colour, torch.Generator], Tensor], Colour]] = {
    "floor": (planks, OAK),
    "wall": (plaster, SAGE),
    "side wall": (plaster, (0.86, 0.84, 0.79)),
    "white": (plaster, WHITE),
    "oak": (wood, OAK),
    "stone": (stone, (0.80, 0.78, 0.74)),
    "drawer": (wood, (0.46, 0.31, 0.21)),
    "brass": (plaster, (0.76, 0.62, 0.36)),
    "walnut": (wood, WALNUT),
    "linen": (cloth, LINEN),
    "rust cloth": (cloth, RUST),
    "ochre cloth": (cloth, OCHRE),
    "teal cloth": (cloth, TEAL),
    "stripes": (stripes, TEAL),
    "rug": (rug, (0.52, 0.25, 0.22)),
    "basket": (basket, (0.66, 0.52, 0.34)),
    "teal vase": (plaster, TEAL),
    "ochre vase": (plaster, OCHRE),
    "rust pot": (plaster, (0.72, 0.42, 0.30)),
    "shade": (cloth, CREAM),
    "leaf": (leaf, LEAF),
    "hills": (hills, (0.20, 0.30, 0.30)),
    "sea": (sea, TEAL),
    "shapes": (shapes, INK),
    **{f"book {i}": (book, colour) for i, colour in enumerate(BOOKS)},
}
FACES = ("side wall", "side wall", "side wall", "wall", "floor", "white")  # -x, +x, -y, +y, -z, +z
FACE_SPANS = (1.5, 1.5, 1.5, 1.5, 1.15, 1.5)


def paint(generator: torch.Generator) -> TextureAtlas:
    """All textures, in the order of `PAINTED`."""
    squares = [paint(colour, generator) for paint, colour in PAINTED.values()]
    return build_atlas(torch.stack(squares) ** GAMMA, 0)


# Lamps: what a window on the left sends, and what comes back from ceiling and walls.


def lamps() -> list[tuple[Tensor, Tensor]]:
    """Place `[3]` and colour `[3]` of lamps that together give soft shadows."""
    window = [(-2.2, y + 0.1 * z, z) for y in (-1.7, -1.4, -1.1, -0.8) for z in (1.3, 1.6, 1.9)]
    bounced = [(x, y, 2.5) for x in (-1.4, 0.0, 1.4) for y in (-1.3, 1.0)]
    daylight, warm = torch.tensor([0.92, 0.90, 0.86]), torch.tensor([0.34, 0.33, 0.30])
    return [
        *[(torch.tensor(place), daylight / len(window)) for place in window],
        *[(torch.tensor(place), warm / len(bounced)) for place in bounced],
    ]


AMBIENT = (0.11, 0.11, 0.115)


def cameras(frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres `[S, 3]` and camera-to-world rotations `[S, 3, 3]`: a walk round the table, from left to right."""
    time = torch.linspace(-1, 1, frames)
    sway = torch.randn(2, frames, 3, generator=generator)
    angle = 0.62 * time
    distance = 2.75 - 0.45 * torch.cos(3.1 * time)
    centre = torch.stack(
        [distance * angle.sin(), -distance * angle.cos(), 0.68 + 0.22 * torch.sin(4.2 * time + 0.6)], 1
    )
    centre = torch.tensor(LOOKED_AT) + centre + 0.03 * sway[0]
    target = torch.tensor(LOOKED_AT) + torch.stack(
        [0.35 * torch.sin(2.3 * time), 0 * time, 0.12 * torch.cos(3 * time)], 1
    )
    roll = 0.03 * torch.sin(3.3 * time + 1)
    return centre, look_at(centre, target + 0.04 * sway[1]) @ rotation_about_z(roll)


def scene(solids: list[Solid], centre: Tensor, orientation: Tensor) -> FrameScenes:
    """The room as each of the frames sees it; light is left to the caller."""
    frames = len(centre)
    order = sorted(solids, key=lambda solid: solid.round)  # boxes first
    names = list(PAINTED)
    room = torch.tensor(ROOM)
    places = torch.stack([torch.tensor([0, 0, ROOM[2] / 2]), *[torch.tensor(s.centre) for s in order]])
    rotations = torch.stack([torch.eye(3), *[s.rotation for s in order]])
    halves = torch.stack([room, *[torch.tensor(s.size) for s in order]]) / 2
    spans = [*FACE_SPANS, *[s.span for s in order]]
    upright = [
        *[False] * ROOM_FACES,
        *[s.size[2] > max(s.size[:2]) and s.texture in ("oak", "walnut") for s in order],
    ]
    placing = torch.tensor([
        [0.0 if up else 1 / span, 1 / span if up else 0.0, 0.5, 0.5, 1 / span]
        for span, up in zip(spans, upright, strict=True)
    ])  # fmt: skip
    textures = torch.tensor([float(names.index(name)) for name in (*FACES, *[s.texture for s in order])])

    def every(value: Tensor) -> Tensor:
        return value.expand(frames, *value.shape).contiguous()

    focal = torch.full((2,), 0.5 / math.tan(math.radians(FIELD_OF_VIEW) / 2))
    return FrameScenes(
        centre=every(places),
        rotation=every(rotations),
        half_size=every(halves),
        cubes=1 + sum(not s.round for s in order),
        camera=centre,
        orientation=orientation,
        focal=every(focal),
        light=torch.zeros(frames, 3),
        shade=torch.tensor([0.0, 1.0]).repeat(frames, 1),
        texture=every(textures),
        placing=every(placing),
        paint=torch.tensor([1.0, 1, 1, 0, 0, 0]).repeat(frames, len(textures), 1),
    )
