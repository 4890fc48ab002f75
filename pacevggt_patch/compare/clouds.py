"""The two point clouds: what is drawn of them, still and to be turned, from the same place and in the same way."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation.agreement import cloud_size, moved, moved_cameras
from ..evaluation.geometry import Similarity, camera_centres
from ..runtime.plotting import load_extra
from .differences import confident, world_points
from .runs import Prediction

# The share of pixels that is drawn. The least confident ones are mostly sky and the edges of things.
DRAWN = 0.7
STILL_POINTS, TURNED_POINTS = 1_200_000, 60_000
STILL_FRAMES = 16  # whose points a still picture shows: those of more take minutes and add nothing
SAMPLING = 2  # a picture is drawn so many times as large, then reduced
LARGEST_SPLAT = 24  # pixels
# Points of a surface that is seen at a slant lie so many times as far apart as those of one that faces the camera.
STEEPEST = 2.0
CAMERA_COLOURS = {"stock": (214, 39, 40), "accelerated": (31, 119, 180)}


class Cloud(NamedTuple):
    """Points of a prediction in the frame of stock, with its cameras.

    Attributes:
        points: [N, 3].
        colours: RGB [N, 3] in [0, 1].
        spacing: [N] distance to the neighbours in the same frame, were all of its pixels drawn; see `spacings`.
        world_to_camera: [S, 3, 4].
        intrinsics: [S, 3, 3], pixels.
        size: height and width of the frames in pixels.
        pixels: [N] which pixels of the clip [S, H, W] they are.
    """

    points: Tensor
    colours: Tensor
    spacing: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor
    size: tuple[int, int]
    pixels: Tensor


class View(NamedTuple):
    """A place to look from: `pixel = focal * (x / z, y / z) + offset + size / 2` of `rotation @ (point - eye)`.

    Attributes:
        eye: [3].
        rotation: [3, 3], rows are right, down and forward.
        focal: in pixels.
        offset: [2] in x and y, in pixels.
        near: what is nearer is not drawn.
        height, width: pixels.
    """

    eye: Tensor
    rotation: Tensor
    focal: float
    offset: Tensor
    near: float
    height: int
    width: int


def make_cloud(prediction: Prediction, images: Tensor, alignment: Similarity | None, most: int) -> Cloud:
    """The more confident points of a prediction.

    Args:
        prediction: what the model gave.
        images: [S, 3, H, W] in [0, 1].
        alignment: takes its points to those of stock; None leaves them.
        most: points.
    """
    chosen = confident(prediction, DRAWN, images[:, 0].numel())
    if len(chosen) > most:  # drawn by lot: every so manyth pixel would make stripes
        lot = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:most]
        chosen = chosen[lot.sort().values]
    height, width = images.shape[-2:]
    frame = chosen // (height * width)
    every, cameras = world_points(prediction), prediction.world_to_camera
    points, spacing = every.view(-1, 3)[chosen], spacings(every).flatten()[chosen]
    facing = prediction.depth.flatten()[chosen] / prediction.intrinsics[frame, 0, 0]
    # Across the edge of a thing the next pixel is far away, but on no surface with this one.
    spacing = torch.minimum(torch.maximum(spacing, facing), STEEPEST * facing)
    if alignment is not None:
        points, cameras = moved(points, alignment), moved_cameras(cameras, alignment)
        spacing = spacing * float(alignment.scale)
    colours = images.permute(0, 2, 3, 1).reshape(-1, 3)[chosen].cpu()
    return Cloud(points, colours, spacing, cameras, prediction.intrinsics, (height, width), chosen)


def spacings(points: Tensor) -> Tensor:
    """[S, H, W] distances of points [S, H, W, 3] to the farther of the next ones below and to the right."""
    along = F.pad((points[:, :, 1:] - points[:, :, :-1]).norm(dim=-1), (0, 1))
    down = F.pad((points[:, 1:] - points[:, :-1]).norm(dim=-1), (0, 0, 0, 1))
    return torch.maximum(along, down)


def view_of(cloud: Cloud, height: int, width: int) -> View:
    """From behind and above the cameras, so that nearly all of the cloud is in the picture."""
    middle = cloud.points.median(dim=0).values
    centres = camera_centres(cloud.world_to_camera)
    start = centres.mean(dim=0)
    distance = (middle - start).norm().clamp(min=1e-6)
    forward = F.normalize(cloud.world_to_camera[:, 2, :3].mean(dim=0), dim=0)
    down = F.normalize(cloud.world_to_camera[:, 1, :3].mean(dim=0), dim=0)
    eye = start - (0.9 * forward + 0.4 * down) * distance
    ahead = F.normalize(middle - eye, dim=0)
    right = F.normalize(torch.linalg.cross(down, ahead), dim=0)
    rotation = torch.stack([right, torch.linalg.cross(ahead, right), ahead])
    near = 0.3 * float((middle - eye).norm())  # a wall behind the cameras is not in the way
    low, high = window(cloud.points, eye, rotation, near, 0.985)
    lowest, highest = window(centres, eye, rotation, near, 1.0)
    reach = 0.25 * (high - low)  # cameras far away from what they see would make it small
    low, high = (
        torch.maximum(torch.minimum(low, lowest), low - reach),
        torch.minimum(torch.maximum(high, highest), high + reach),
    )
    if not bool((high > low).all()):
        low, high = torch.full((2,), -0.5), torch.full((2,), 0.5)
    focal = 0.9 * float((torch.tensor([width, height]) / (high - low)).min())
    return View(eye, rotation, focal, -focal * (low + high) / 2, near, height, width)


def window(points: Tensor, eye: Tensor, rotation: Tensor, near: float, share: float) -> tuple[Tensor, Tensor]:
    """The least and the largest x / z and y / z, [2] each, that hold so large a share of points [N, 3] either way."""
    seen = (points - eye) @ rotation.T
    seen = seen[seen[:, 2] > near]
    if not len(seen):
        return torch.full((2,), torch.inf), torch.full((2,), -torch.inf)
    places = seen[:, :2] / seen[:, 2:]  # [N, 2]
    # By sorting: quantile() refuses large inputs.
    ends = (max(1, int((1 - share) * len(places))), max(1, int(share * len(places))))
    low, high = (places.kthvalue(end, dim=0).values for end in ends)
    return low, high


def splat(cloud: Cloud, view: View) -> np.ndarray:
    """Draw a cloud on white, [height, width, 3] in [0, 1]: nearer points hide farther ones.

    Each point is a square as wide as its distance to its neighbours looks from here, so that surfaces have no holes.
    """
    seen = (cloud.points - view.eye) @ view.rotation.T  # [N, 3]
    ahead = seen[:, 2] > view.near
    seen, colours = seen[ahead], cloud.colours[ahead].numpy()
    of_frame = cloud.size[0] * cloud.size[1]
    total = len((cloud.pixels // of_frame).unique()) * of_frame
    fewer = math.sqrt(DRAWN * total / max(1, len(cloud.points)))  # than there are, and then not evenly
    wide = (1.8 * fewer if fewer > 1.02 else 1.2) * cloud.spacing[ahead] / seen[:, 2] * view.focal
    sides = wide.ceil().clamp(1, LARGEST_SPLAT).long()  # [N] pixels
    corner = seen[:, :2] / seen[:, 2:] * view.focal + view.offset - sides[:, None] / 2  # x and y
    columns = (corner[:, 0] + view.width / 2).round().long()
    rows = (corner[:, 1] + view.height / 2).round().long()
    image = np.ones((view.height * view.width, 3), np.float32)
    depth = torch.full((view.height * view.width,), torch.inf)
    steps = range(int(sides.max()) if len(sides) else 0)

    def pixels() -> Generator[tuple[Tensor, Tensor]]:
        """Places in the picture and numbers of points, for one pixel of their squares after another."""
        for down, along in ((down, along) for down in steps for along in steps):
            inside = (sides > max(down, along)).nonzero()[:, 0]
            row, column = rows[inside] + down, columns[inside] + along
            shown = (row >= 0) & (row < view.height) & (column >= 0) & (column < view.width)
            yield (row * view.width + column)[shown], inside[shown]

    for place, inside in pixels():
        depth.scatter_reduce_(0, place, seen[inside, 2], "amin")
    for place, inside in pixels():  # made anew: all of them would fill the memory
        nearest = seen[inside, 2] <= depth[place]
        image[place[nearest].numpy()] = colours[inside[nearest].numpy()]
    return image.reshape(view.height, view.width, 3)


def of_frames(cloud: Cloud, most: int) -> Cloud:
    """The points of at most so many frames, evenly spaced, and all cameras."""
    frames = len(cloud.world_to_camera)
    chosen = torch.linspace(0, frames - 1, min(most, frames)).round().long()
    some = torch.isin(cloud.pixels // (cloud.size[0] * cloud.size[1]), chosen)
    return cloud._replace(
        **{name: getattr(cloud, name)[some] for name in ("points", "colours", "spacing", "pixels")}
    )


def frusta(world_to_camera: Tensor, intrinsics: Tensor, size: tuple[int, int], length: float) -> Tensor:
    """[S, 8, 2, 3] edges of camera pyramids: from the centre to the corners of the image, and round it.

    Args:
        world_to_camera: [S, 3, 4].
        intrinsics: [S, 3, 3].
        size: height and width of the images.
        length: of the pyramids.
    """
    height, width = size
    corners = torch.tensor([[0.0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]])
    rays = corners.to(intrinsics) @ torch.linalg.inv(intrinsics).mT * length  # [S, 4, 3]
    outer = (rays - world_to_camera[:, None, :, 3]) @ world_to_camera[:, :, :3]  # [S, 4, 3]
    centre = camera_centres(world_to_camera)[:, None].expand_as(outer)
    spokes = torch.stack([centre, outer], dim=2)
    rim = torch.stack([outer, outer.roll(-1, 1)], dim=2)
    return torch.cat([spokes, rim], dim=1)


def camera_length(cloud: Cloud) -> float:
    """Length of the pyramids that stand for cameras."""
    return 0.08 * cloud_size(cloud.points)


def still(cloud: Cloud, view: View, colour: tuple[int, int, int], length: float) -> np.ndarray:
    """[H, W, 3] uint8 picture of a cloud with its cameras, for a view of the reduced size."""
    from PIL import Image, ImageDraw

    large = view._replace(
        focal=view.focal * SAMPLING,
        offset=view.offset * SAMPLING,
        height=view.height * SAMPLING,
        width=view.width * SAMPLING,
    )
    picture = Image.fromarray((splat(cloud, large) * 255).round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    edges = frusta(cloud.world_to_camera, cloud.intrinsics, cloud.size, length).flatten(0, 1)  # [8 S, 2, 3]
    seen = (edges - view.eye) @ view.rotation.T
    middle = torch.tensor([large.width / 2, large.height / 2]) + large.offset
    for ends in seen[(seen[..., 2] > 0.01 * view.near).all(1)]:
        points = ends[:, :2] / ends[:, 2:] * large.focal + middle
        draw.line([tuple(point) for point in points.tolist()], fill=colour, width=SAMPLING)
    return np.asarray(picture.resize((view.width, view.height), Image.Resampling.LANCZOS))


def turned_figure(clouds: dict[str, Cloud], most: int) -> str:
    """JSON of a plotly figure of clouds and cameras, with buttons that choose between them.

    Args:
        clouds: "stock" and "accelerated".
        most: points of a cloud.
    """
    go = load_extra("plotly.graph_objects", "the point clouds of the page")
    first = next(iter(clouds.values()))
    unit = cloud_size(first.points) / 1000 or 1.0
    figure = go.Figure()
    for name, cloud in clouds.items():
        few = thinned(cloud, most)
        colours, palette = in_palette(few.colours)
        shown = name == next(iter(clouds))
        figure.add_scatter3d(
            **axes(few.points, unit), mode="markers", name=f"points, {name}", visible=shown, hoverinfo="skip",
            marker={"size": 2.5, "color": colours, "colorscale": palette, "cmin": 0, "cmax": len(palette) - 1},
        )  # fmt: skip
        edges = frusta(cloud.world_to_camera, cloud.intrinsics, cloud.size, camera_length(first)).flatten(
            0, 1
        )
        gaps = torch.full_like(edges[:, :1], torch.nan)  # a line ends here
        lines = upright(torch.cat([edges, gaps], dim=1).flatten(0, 1), unit).float().numpy()
        figure.add_scatter3d(
            x=lines[:, 0], y=lines[:, 1], z=lines[:, 2], mode="lines", name=f"cameras, {name}",
            visible=shown, hoverinfo="skip", line={"color": "rgb({},{},{})".format(*CAMERA_COLOURS[name]), "width": 2},
        )  # fmt: skip
    names = list(clouds)
    buttons = [
        {
            "label": name.capitalize(),
            "method": "update",
            "args": [{"visible": [n == name for n in names for _ in "pc"]}],
        }
        for name in names
    ]
    if len(names) > 1:
        both = {"visible": [True] * (2 * len(names))}
        buttons.append({"label": "Both", "method": "update", "args": [both]})
    hidden = {"visible": False}
    ranges = box(first, unit)
    spans = [high - low for low, high in ranges.values()]
    ratio = dict(zip("xyz", (span / max(spans) * 1.5 for span in spans), strict=True))
    figure.update_layout(
        scene={
            **{f"{axis}axis": {**hidden, "range": span} for axis, span in ranges.items()},
            "aspectmode": "manual", "aspectratio": ratio,
            "camera": {"eye": {"x": 0, "y": -1.3, "z": 0.4}, "up": {"x": 0, "y": 0, "z": 1}},
            "dragmode": "orbit",
        },
        template="none", margin={"l": 0, "r": 0, "t": 0, "b": 0}, showlegend=False, uirevision="keep",
        updatemenus=[{
            "type": "buttons", "direction": "right", "buttons": buttons, "showactive": True, "active": 0,
            "x": 0.01, "y": 0.99, "xanchor": "left", "yanchor": "top",
        }],
    )  # fmt: skip
    return figure.to_json()


def thinned(cloud: Cloud, most: int) -> Cloud:
    """At most so many points of a cloud, drawn by lot."""
    lot = torch.randperm(len(cloud.points), generator=torch.Generator().manual_seed(1))[:most]
    parts = {name: getattr(cloud, name)[lot] for name in ("points", "colours", "spacing", "pixels")}
    return cloud._replace(**parts)


def upright(points: Tensor, unit: float) -> Tensor:
    """Points [N, 3] in units, with axes right, forward and up as plotly has them."""
    return torch.stack([points[:, 0], points[:, 2], -points[:, 1]], dim=1) / unit


def axes(points: Tensor, unit: float) -> dict[str, np.ndarray]:
    """The arguments x, y and z of plotly, in whole units of two bytes."""
    values = upright(points, unit).round().clamp(-32768, 32767).to(torch.int16).numpy()
    return {name: np.ascontiguousarray(values[:, i]) for i, name in enumerate("xyz")}


def box(cloud: Cloud, unit: float) -> dict[str, list[float]]:
    """Range of each axis, in thousandths of the cloud's size, that holds nearly all points, and all cameras."""
    points = upright(cloud.points, unit)
    low, high = (
        points.kthvalue(max(1, round(share * len(points))), dim=0).values for share in (0.005, 0.995)
    )
    centres = upright(camera_centres(cloud.world_to_camera), unit)
    low, high = torch.minimum(low, centres.amin(0) - 200), torch.maximum(high, centres.amax(0) + 200)
    return {name: [low[i].item(), high[i].item()] for i, name in enumerate("xyz")}


def in_palette(colours: Tensor) -> tuple[np.ndarray, list[list[Any]]]:
    """Colours [N, 3] as numbers [N] of a palette of at most 256, a byte each, and the palette as plotly takes it."""
    from PIL import Image

    pixels = (colours[None] * 255).round().clamp(0, 255).byte().numpy()  # [1, N, 3]
    reduced = Image.fromarray(pixels).quantize(256, Image.Quantize.MEDIANCUT)
    entries = np.asarray(reduced.getpalette(), np.uint8).reshape(-1, 3)
    numbers = np.asarray(reduced)[0]
    count = max(2, int(numbers.max()) + 1)
    entries = np.resize(entries, (count, 3)) if len(entries) < count else entries[:count]
    steps = np.linspace(0, 1, count)
    return numbers, [
        [float(step), "rgb({},{},{})".format(*entry)] for step, entry in zip(steps, entries, strict=True)
    ]
