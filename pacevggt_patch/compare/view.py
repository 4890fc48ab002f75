"""`pacevggt view`: both point clouds and their cameras in a browser, served by viser."""

from __future__ import annotations

import socket
import sys
import time
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..arguments import whole
from ..config import DEFAULT_KEEP_RATIO
from ..errors import PaceError, first_line
from ..evaluation.agreement import cloud_size
from ..evaluation.geometry import camera_to_world, quaternions
from ..runtime.plotting import load_extra
from ..runtime.ranks import place_of_torchrun
from .clouds import CAMERA_COLOURS, Cloud, camera_length, make_cloud, view_of
from .differences import difference
from .plan import Options, make_plan
from .runs import Prediction, Runner, Side, borrowed, in_words, memory_kept

VIEWED_POINTS = 400_000
ACCELERATED = "accelerated"
PORTS = 65535


@dataclass
class Layer:
    """What is shown of one side.

    Attributes:
        cloud: its points.
        confidence: [N] from 0, the least sure point, to 1.
        points: viser's handle of them.
        cameras: viser's handles.
    """

    cloud: Cloud
    confidence: Tensor
    points: Any = None
    cameras: list[Any] = field(default_factory=list)


class Viewer:
    """A server that shows layers, with a switch between them and sliders for point size and confidence.

    Args:
        layers: by name; the first one is shown at first.
        images: [S, 3, H, W] in [0, 1], shown in the cameras.
        host, port: where to listen; the next free port is taken where that one is not.

    Attributes:
        server: viser's.
        shown, size, confidence: its controls; setting `value` is what a user does with them.
    """

    def __init__(self, layers: dict[str, Layer], images: Tensor, host: str, port: int):
        viser = load_extra("viser", "points in a browser", "view")
        self.layers = layers
        self.server = viser.ViserServer(host=host, port=port, verbose=False)
        self.server.scene.set_up_direction("-y")  # cameras look along z, and y is down
        first = next(iter(layers.values())).cloud
        unit = cloud_size(first.points) or 1.0
        gui = self.server.gui
        self.shown = gui.add_dropdown("model", tuple(layers), initial_value=next(iter(layers)))
        self.size = gui.add_slider("point size", min=0.5, max=20.0, step=0.5, initial_value=4.0)
        self.confidence = gui.add_slider("drop least sure, %", min=0, max=95, step=1, initial_value=0)
        self.unit = unit / 1000
        for name, layer in layers.items():
            self.add(name, layer, images, camera_length(first))
        for control in (self.shown, self.size, self.confidence):
            control.on_update(lambda _: self.update())
        self.update()
        eye, middle = view_of(first, 1, 1).eye.numpy(), first.points.median(dim=0).values.numpy()

        @self.server.on_client_connect
        def look(client: Any) -> None:
            client.camera.position, client.camera.look_at = eye, middle
            client.camera.up_direction = (0.0, -1.0, 0.0)

    def add(self, name: str, layer: Layer, images: Tensor, length: float) -> None:
        """Add a layer's points and cameras to the scene."""
        cloud = layer.cloud
        layer.points = self.server.scene.add_point_cloud(
            f"/{name}/points",
            points=cloud.points.float().numpy(),
            colors=(cloud.colours * 255).round().byte().numpy(),
            point_size=self.size.value * self.unit,
            precision="float32",
        )
        poses = camera_to_world(cloud.world_to_camera)  # [S, 4, 4]
        turns = quaternions(poses[:, :3, :3])[:, [3, 0, 1, 2]].numpy()
        height, width = cloud.size
        angles = 2 * torch.atan(height / 2 / cloud.intrinsics[:, 1, 1])
        for index, image in enumerate(images):
            small = image[:, :: max(1, height // 96), :: max(1, width // 96)]
            layer.cameras.append(
                self.server.scene.add_camera_frustum(
                    f"/{name}/cameras/{index}",
                    fov=float(angles[index]),
                    aspect=width / height,
                    scale=length,
                    thickness=0.02 * length,
                    color=CAMERA_COLOURS[name],
                    image=(small.permute(1, 2, 0) * 255).byte().numpy(),
                    wxyz=turns[index],
                    position=poses[index, :3, 3].numpy(),
                )
            )

    def update(self) -> None:
        """Show what the controls say."""
        for name, layer in self.layers.items():
            sure = layer.confidence >= self.confidence.value / 100
            layer.points.points = layer.cloud.points[sure].float().numpy()
            layer.points.colors = (layer.cloud.colours[sure] * 255).round().byte().numpy()
            layer.points.point_size = self.size.value * self.unit
            for handle in (layer.points, *layer.cameras):
                handle.visible = name == self.shown.value

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        host = self.server.get_host()
        return f"http://{'localhost' if host in ('0.0.0.0', '127.0.0.1') else host}:{self.server.get_port()}"

    def stop(self) -> None:
        """Stop serving."""
        self.server.stop()


def make_layer(prediction: Prediction, images: Tensor, alignment: Any) -> Layer:
    """The points of a prediction, with how sure the model is of each among them."""
    cloud = make_cloud(prediction, images, alignment, VIEWED_POINTS)
    rank = prediction.confidence.flatten()[cloud.pixels].argsort().argsort()
    return Layer(cloud, rank / max(1, len(rank) - 1))


def view(
    backbone: str | nn.Module = "mini",
    clip: str | PathLike[str] | None = None,
    *,
    keep_ratio: float = DEFAULT_KEEP_RATIO,
    mode: str | None = None,
    weights: Any = "auto",
    frames: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
) -> None:
    """Run a model stock and accelerated on a clip, and serve both clouds to a browser until Ctrl-C.

    The arguments are those of `compare`, with one clip and one setting. Accelerated points are aligned with stock's.

    Raises:
        PaceError: the extra `view` is missing, there are several processes, or a setting, clip, model, host or port
            does not fit.
    """
    load_extra("viser", "points in a browser", "view")
    _, processes = place_of_torchrun()
    if processes > 1:
        raise PaceError(f"view runs in one process, and {processes} were started: leave torchrun out")
    if whole("port", port) > PORTS:
        raise PaceError(f"port must be at most {PORTS}, got {port}")
    check_host(host)
    options = Options(
        backbone=backbone, clips=() if clip is None else (clip,), keep_ratios=(keep_ratio,), modes=(mode,),
        weights=weights, frames=frames, device=device, precision=precision,
    )  # fmt: skip
    viewer = start(options, host, port)
    print(f"{viewer.address}  (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        viewer.stop()


def check_host(host: str) -> None:
    """Raise `PaceError` for what is no address of this machine: viser's server waits for such a one without end."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.bind(address)  # at port 0, which is any free one
    except (OSError, UnicodeError) as error:  # of names that are too long, too
        reason = getattr(error, "strerror", None) or first_line(error)
        raise PaceError(f"can't listen at {host}: {reason}; give an address of this machine") from error


def start(options: Options, host: str, port: int) -> Viewer:
    """Run what is asked for, and serve it."""
    plan = make_plan(options, page=False)
    (source,) = plan.sources
    with borrowed(options.backbone, plan) as model:
        runner = Runner(model, plan)
        (config,) = runner.configs
        sides = [Side("stock"), Side(in_words(config), config)]
        images = runner.images(source.clip)
        for side in tqdm(sides, desc=f"{source.clip.name}, {len(source.clip)} frames", unit="run"):
            with memory_kept(plan.device):
                side.prediction = runner.predict(side, images, source.clip)
    stock, accelerated = (side.prediction for side in sides)
    if accelerated is None:
        raise PaceError(f"{len(source.clip)} frames do not fit into memory: pass fewer with --frames")
    layers = {}
    if stock is None:
        print("the stock model does not fit into memory: the accelerated one is shown alone", file=sys.stderr)
    else:
        layers["stock"] = make_layer(stock, source.clip.images, None)
    alignment = None if stock is None else difference(stock, accelerated).alignment
    layers[ACCELERATED] = make_layer(accelerated, source.clip.images, alignment)
    try:
        return Viewer(layers, source.clip.images, host, port)
    except OSError as error:
        raise PaceError(f"can't listen at {host}:{port}: {error.strerror or error}") from error
