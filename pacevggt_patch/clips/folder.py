"""Clips on disk: a folder of images, or a folder with a `clip.json` that adds cameras and depth.

`clip.json` holds `width`, `height`, `intrinsics` (`fx fy cx cy`, pixels of the stored frames, **the centre of
the top-left pixel at (0, 0)**), `pose_unit`, and `frames`: a list of `{file, depth, cam_to_world}` with paths
relative to the folder, `depth` a 16-bit PNG of z-depth in millimetres (0 = not measured) or null, and
`cam_to_world` a 4x4 matrix. `intrinsics`, `depth` and `cam_to_world` may be missing or null.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import ClipError
from ..runtime.files import write_json
from .clip import Clip

PATCH_SIZE = 14
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MILLIMETRES_PER_METRE = 1000.0

# clip.json puts pixel centres on whole numbers, a Clip on halves.
PIXEL_CENTRE = 0.5


@dataclass(frozen=True)
class Framing:
    """How a source image becomes a frame: crop to a box, resize, then keep a band of rows."""

    box: tuple[int, int, int, int]  # left, top, right, bottom, in source pixels
    resized: tuple[int, int]  # width, height after resizing
    band: tuple[int, int]  # first row and end row kept of the resized image

    @property
    def scale(self) -> tuple[float, float]:
        """Resized pixels per source pixel, in x and y (they differ: the height is rounded to patches)."""
        left, top, right, bottom = self.box
        return self.resized[0] / (right - left), self.resized[1] / (bottom - top)

    def image(self, image: Image.Image) -> np.ndarray:
        """`[H, W, 3]` uint8 of an RGB image, resized with the bicubic filter."""
        resized = image.crop(self.box).resize(self.resized, Image.Resampling.BICUBIC)
        return np.asarray(resized)[self.band[0] : self.band[1]]

    def depth(self, depth: np.ndarray) -> np.ndarray:
        """`[H, W]` of a source depth map, the nearest source pixel for each pixel.

        Depth is never interpolated: between a near and a far surface there is nothing halfway.
        """
        (left, top, right, bottom), (scale_x, scale_y) = self.box, self.scale
        columns = left + nearest_source(self.resized[0], right - left, scale_x)
        rows = top + nearest_source(self.resized[1], bottom - top, scale_y)[self.band[0] : self.band[1]]
        return depth[rows[:, None], columns[None, :]]

    def intrinsics(self, fx: float, fy: float, cx: float, cy: float) -> Tensor:
        """`[3, 3]` float32 intrinsics of the frame; all in continuous coordinates (see `Clip`)."""
        (left, top, _, _), (scale_x, scale_y) = self.box, self.scale
        return torch.tensor(
            [
                [fx * scale_x, 0.0, (cx - left) * scale_x],
                [0.0, fy * scale_y, (cy - top) * scale_y - self.band[0]],
                [0.0, 0.0, 1.0],
            ]
        )


def nearest_source(size: int, source_size: int, scale: float) -> np.ndarray:
    """`[size]` source pixel that holds the centre of each resized pixel."""
    centres = (np.arange(size) + PIXEL_CENTRE) / scale
    return np.clip(np.floor(centres).astype(np.int64), 0, source_size - 1)


def crop_framing(width: int, height: int, target: int) -> Framing:
    """VGGT's "crop" mode: width to `target`, height to whole patches, at most `target` rows of it."""
    rows = max(round(height * (target / width) / PATCH_SIZE) * PATCH_SIZE, PATCH_SIZE)
    first = max(rows - target, 0) // 2
    return Framing((0, 0, width, height), (target, rows), (first, first + min(rows, target)))


def square_framing(width: int, height: int, target: int) -> Framing:
    """The central square of the image, resized to `target` x `target`."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return Framing((left, top, left + side, top + side), (target, target), (0, target))


FRAMINGS = {"crop": crop_framing, "square": square_framing}


def load_clip(
    path: str | Path,
    *,
    frames: int | None = None,
    start: int = 0,
    stride: int = 1,
    width: int = 518,
    mode: Literal["crop", "square"] = "crop",
) -> Clip:
    """Load a clip from a folder of images, or from a folder with a `clip.json`.

    The format of `clip.json` is in this module's description. A folder of images is read in natural order
    (`frame2` before `frame10`); hidden files are passed over. Camera orientation tags are applied,
    transparency is laid on white, and 16-bit greyscale is scaled to the full range.

    Args:
        path: The folder.
        frames: How many frames to take; None takes all there are.
        start: First frame taken.
        stride: Step between the frames taken.
        width: Width of the loaded frames in pixels, a multiple of 14: 518 for VGGT-1B, 224 for VGGT-mini.
        mode: "crop" is the "crop" mode of VGGT's own loader: the whole width, resized (bicubic) to `width`,
            the height to the nearest multiple of 14, and of an image taller than wide the central `width`
            rows. "square" cuts the central square and resizes that: a model trained on squares alone, as
            VGGT-mini is, then sees no shape that it was not trained on.

    Returns:
        A `Clip` on the CPU with what the folder tells: intrinsics and depth follow every crop and resize,
        depth in metres by nearest pixel. Named after the folder, or as `clip.json` says.

    Raises:
        ClipError: An argument is out of range, the folder has no (or too few) images, a file is missing or cannot
            be read, the frames differ in size (pictures cut to squares may), or `clip.json` is broken or incomplete.
            The message names the file.
    """
    folder = existing_folder(path)
    check_arguments(frames, start, stride, width, mode)
    if (folder / "clip.json").is_file():
        return load_described_folder(folder, frames, start, stride, width, mode)
    chosen = choose(image_files(folder), folder, frames, start, stride)
    images, _ = load_images(chosen, width, mode, one_size=mode != "square")
    return Clip(folder.resolve().name, images)


def count_frames(path: str | Path) -> int:
    """How many frames `load_clip` finds in a folder.

    Raises:
        ClipError: The folder or its images are missing, or its `clip.json` is broken.
    """
    folder = existing_folder(path)
    file = folder / "clip.json"
    return len(read_description(file)["frames"] if file.is_file() else image_files(folder))


def existing_folder(path: str | Path) -> Path:
    """The path, if it is a folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise ClipError(f"{folder} is not a folder")
    return folder


def check_arguments(frames: int | None, start: int, stride: int, width: int, mode: str) -> None:
    """Raise `ClipError` if an argument of `load_clip` is out of range."""
    if frames is not None and frames < 1:
        raise ClipError(f"frames must be at least 1, got {frames}")
    if start < 0:
        raise ClipError(f"start must be at least 0, got {start}")
    if stride < 1:
        raise ClipError(f"stride must be at least 1, got {stride}")
    if width < PATCH_SIZE or width % PATCH_SIZE:
        raise ClipError(f"width must be a positive multiple of {PATCH_SIZE}, got {width}")
    if mode not in FRAMINGS:
        raise ClipError(f"mode must be one of {', '.join(FRAMINGS)}, got {mode!r}")


def image_files(folder: Path) -> list[Path]:
    """Image files of the folder in natural order, at least one."""
    files = (file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    # Copies from macOS bring a hidden "._name.jpg" beside each picture, which is not one.
    found = sorted((file for file in files if not file.name.startswith(".")), key=natural_key)
    if not found:
        raise ClipError(f"{folder} has no images (looked for {' '.join(IMAGE_SUFFIXES)})")
    return found


def natural_key(file: Path) -> tuple[list[tuple[int, int | str]], str]:
    """Sort key that compares runs of digits as numbers; the plain name decides between `a1` and `a01`."""
    parts = re.split(r"([0-9]+)", file.name.lower())
    return [(0, int(part)) if part.isascii() and part.isdigit() else (1, part) for part in parts], file.name


def choose(items: list[Any], source: Path, frames: int | None, start: int, stride: int) -> list[Any]:
    """The `frames` items from `start` on, every `stride`-th; all of them if `frames` is None."""
    chosen = items[start::stride][:frames]
    if not chosen:
        raise ClipError(f"{source} has {len(items)} frames, there is no frame {start}")
    if frames is not None and len(chosen) < frames:
        raise ClipError(
            f"{source} has {len(items)} frames: only {len(chosen)} from frame {start} in steps of {stride}, "
            f"not the {frames} asked for"
        )
    return chosen


def load_images(files: list[Path], width: int, mode: str, one_size: bool) -> tuple[Tensor, tuple[int, int]]:
    """`[S, 3, H, W]` float32 frames in [0, 1], and the width and height of the first source image.

    Raises `ClipError` if `one_size` and the source images differ in size.
    """
    loaded = []
    size = (0, 0)
    for index, file in enumerate(files):
        image = open_rgb(file)
        if index == 0:
            size = image.size
        elif one_size and image.size != size:
            raise ClipError(
                f"{file} is {image.size[0]}x{image.size[1]}, but {files[0].name} is {size[0]}x{size[1]}: "
                "all frames of a clip must have one size"
            )
        loaded.append(torch.from_numpy(FRAMINGS[mode](*image.size, width).image(image).copy()))
    return torch.stack(loaded).permute(0, 3, 1, 2).float().div_(255).contiguous(), size  # [S, 3, H, W]


def read_image(file: Path) -> Image.Image:
    """Open and fully decode one image, turned as its orientation tag says."""
    if not file.is_file():
        raise ClipError(f"{file} does not exist")
    try:
        with Image.open(file) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise whatever their format trips over
        raise ClipError(f"{file} cannot be read as an image: {error}") from error


def open_rgb(file: Path) -> Image.Image:
    """One image file as 8-bit RGB: transparency on white, 16-bit greyscale over its full range."""
    image = read_image(file)
    if image.mode.startswith("I"):  # 16-bit greyscale; convert("RGB") would cut it off at 255
        values = np.asarray(image).astype(np.float64) / 65535 * 255
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ClipError(
            f"{file} is a floating-point image, whose range is not known: store it as 8 or 16 bit"
        )
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")
    except ValueError as error:  # a colour space that Pillow does not convert
        raise ClipError(f"{file} cannot be turned into RGB: {error}") from error


def load_described_folder(
    folder: Path, frames: int | None, start: int, stride: int, width: int, mode: str
) -> Clip:
    """The clip of a folder with a `clip.json`."""
    file = folder / "clip.json"
    description = read_description(file)
    entries = choose(description["frames"], folder, frames, start, stride)
    images, size = load_images([folder / entry["file"] for entry in entries], width, mode, True)
    framing = FRAMINGS[mode](*size, width)
    if size != (description["width"], description["height"]):
        raise ClipError(
            f"{folder / entries[0]['file']} is {size[0]}x{size[1]}, "
            f"but {file} says {description['width']}x{description['height']}"
        )

    intrinsics = None
    if description.get("intrinsics") is not None:
        fx, fy, cx, cy = (float(description["intrinsics"][key]) for key in ("fx", "fy", "cx", "cy"))
        intrinsics = framing.intrinsics(fx, fy, cx + PIXEL_CENTRE, cy + PIXEL_CENTRE)
        intrinsics = intrinsics.expand(len(entries), 3, 3).clone()  # [S, 3, 3]

    world_to_camera = None
    if entries[0].get("cam_to_world") is not None:
        world_to_camera = torch.stack([invert_pose(entry["cam_to_world"]) for entry in entries])  # [S, 3, 4]

    depth = None
    if any(entry.get("depth") is not None for entry in entries):
        maps = [read_depth(folder, entry.get("depth"), size) for entry in entries]
        depth = torch.from_numpy(np.stack([framing.depth(values) for values in maps]))  # [S, H, W]
    name = description.get("name", folder.resolve().name)
    return Clip(str(name), images, intrinsics, world_to_camera, depth)


def read_description(file: Path) -> dict[str, Any]:
    """The content of a `clip.json`, checked; the `ClipError` names the file and what is wrong in it."""
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClipError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(description, dict):
        raise ClipError(f"{file} must hold a JSON object")
    for key in ("width", "height"):
        if not isinstance(description.get(key), int):
            raise ClipError(f"{file}: {key!r} must be a whole number of pixels")
    intrinsics = description.get("intrinsics")
    if intrinsics is not None and not is_intrinsics(intrinsics):
        raise ClipError(f"{file}: 'intrinsics' must hold the numbers fx, fy, cx and cy")
    frames = description.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ClipError(f"{file}: 'frames' must be a list of at least one frame")
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file"), str):
            raise ClipError(f"{file}: frame {index} has no 'file'")
        if not isinstance(frame.get("depth"), str | None):
            raise ClipError(f"{file}: 'depth' of frame {index} must be a file name or null")
        pose = frame.get("cam_to_world")
        if (pose is None) != (frames[0].get("cam_to_world") is None):
            raise ClipError(
                f"{file}: 'cam_to_world' must be given for every frame or for none (see frame {index})"
            )
        if pose is not None and not is_rigid(pose):
            raise ClipError(f"{file}: 'cam_to_world' of frame {index} is not a 4x4 rotation and translation")
    posed, measured = frames[0].get("cam_to_world") is not None, any(frame.get("depth") for frame in frames)
    if posed and measured and description.get("pose_unit") != "metres":
        raise ClipError(f"{file}: 'pose_unit' must be \"metres\" in a clip with depth")
    return description


def is_intrinsics(value: Any) -> bool:
    """Whether `value` holds finite `fx fy cx cy`, the focal lengths positive."""
    try:
        fx, fy, cx, cy = (float(value[key]) for key in ("fx", "fy", "cx", "cy"))
    except (TypeError, KeyError, ValueError):
        return False
    return fx > 0 and fy > 0 and all(math.isfinite(number) for number in (fx, fy, cx, cy))


def is_rigid(value: Any) -> bool:
    """Whether `value` is a 4x4 rotation and translation; lost tracking is often stored as NaN or inf."""
    try:
        pose = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    if pose.shape != (4, 4) or not np.isfinite(pose).all() or not np.allclose(pose[3], [0, 0, 0, 1]):
        return False
    rotation = pose[:3, :3]
    # Published poses are off from exact rotations by some 1e-4.
    return np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-2) and bool(np.linalg.det(rotation) > 0)


def invert_pose(camera_to_world: list[list[float]]) -> Tensor:
    """`[3, 4]` float32 world-to-camera of a 4x4 camera-to-world."""
    pose = torch.tensor(camera_to_world, dtype=torch.float64)
    return torch.linalg.inv(pose)[:3].float()


def read_depth(folder: Path, name: str | None, size: tuple[int, int]) -> np.ndarray:
    """`[H, W]` float32 depth in metres of one stored map, 0 where not measured; all 0 if there is none."""
    if name is None:
        return np.zeros((size[1], size[0]), np.float32)
    file = folder / name
    image = read_image(file)
    if not image.mode.startswith("I"):
        raise ClipError(f"{file} is not a 16-bit depth map (its mode is {image.mode})")
    if image.size != size:
        raise ClipError(f"{file} is {image.size[0]}x{image.size[1]}, but its frame is {size[0]}x{size[1]}")
    return (np.asarray(image) / MILLIMETRES_PER_METRE).astype(np.float32)


def save_clip(clip: Clip, path: str | Path, *, quality: int = 92) -> None:
    """Write a clip as a `clip.json` folder that `load_clip` reads back: JPEG frames, 16-bit PNG depth.

    Args:
        clip: The clip; all its frames must share one camera matrix (or none), and its unit must be the metre.
        path: Folder to write; made if it is not there.
        quality: JPEG quality of the frames.

    Raises:
        ClipError: The frames' intrinsics differ, or a valid depth does not fit into 16 bits of millimetres.
    """
    folder = Path(path)
    description: dict[str, Any] = {"name": clip.name, "width": clip.width, "height": clip.height}
    description["intrinsics"] = describe_intrinsics(clip)
    description["pose_unit"] = "metres"
    description["frames"] = []
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    if clip.depth is not None:
        (folder / "depth").mkdir(exist_ok=True)
    pixels = (clip.images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)  # [S, H, W, 3]
    for index in range(len(clip)):
        entry = {"file": f"frames/{index:06d}.jpg", "depth": None, "cam_to_world": None}
        Image.fromarray(pixels[index].cpu().numpy()).save(
            folder / entry["file"], quality=quality, subsampling=0
        )
        if clip.depth is not None and clip.valid is not None:
            entry["depth"] = f"depth/{index:06d}.png"
            stored = millimetres(clip.depth[index], clip.valid[index], f"clip {clip.name!r}, frame {index}")
            Image.fromarray(stored).save(folder / entry["depth"], optimize=True)
        if clip.world_to_camera is not None:
            entry["cam_to_world"] = describe_pose(clip.world_to_camera[index])
        description["frames"].append(entry)
    write_json(folder / "clip.json", description)


def describe_intrinsics(clip: Clip) -> dict[str, float] | None:
    """`fx fy cx cy` as `clip.json` has them."""
    if clip.intrinsics is None:
        return None
    if not torch.equal(clip.intrinsics, clip.intrinsics[:1].expand_as(clip.intrinsics)):
        raise ClipError(
            f"clip {clip.name!r}: its frames have different intrinsics, a clip.json holds one camera"
        )
    matrix = clip.intrinsics[0].double()
    centre = {"cx": matrix[0, 2].item() - PIXEL_CENTRE, "cy": matrix[1, 2].item() - PIXEL_CENTRE}
    return {"fx": matrix[0, 0].item(), "fy": matrix[1, 1].item(), **centre}


def describe_pose(world_to_camera: Tensor) -> list[list[float]]:
    """4x4 camera-to-world of a `[3, 4]` world-to-camera."""
    last_row = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    return torch.linalg.inv(torch.cat([world_to_camera.double().cpu(), last_row])).tolist()


def millimetres(depth: Tensor, valid: Tensor, frame: str) -> np.ndarray:
    """`[H, W]` uint16 depth of one frame in millimetres, 0 where not valid."""
    values = torch.where(valid, depth, 0).double() * MILLIMETRES_PER_METRE
    if values.max() > np.iinfo(np.uint16).max:
        raise ClipError(f"{frame}: depth exceeds 65.535 m, the most that a clip.json folder holds")
    return values.round().cpu().numpy().astype(np.uint16)
