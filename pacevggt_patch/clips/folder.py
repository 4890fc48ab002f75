"""Clips on disk: a folder of images, one with a `clip.json` that adds cameras and depth, or a video.

`clip.json` holds

- `width` and `height`, in pixels;
- `intrinsics`: `fx fy cx cy`, in pixels of the stored frames, **the centre of the top-left pixel at (0, 0)**;
- `pose_unit`: "metres" in a clip with poses and depth;
- `frames`: a list of `{file, depth, cam_to_world}`. Paths are relative to the folder and within it. `depth` is a 16-bit
  PNG of z-depth in millimetres, 0 where it was not measured. `cam_to_world` is a 4x4 matrix.

`intrinsics`, `depth` and `cam_to_world` may be missing or null.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..arguments import file_path, shown, whole
from ..errors import ClipError, first_line
from ..runtime.files import write_json
from .clip import Clip
from .framing import PATCH_SIZE, PIXEL_CENTRE, Framing, check_arguments, choose, framing_of, images_of
from .images import check_file, image_names, listed, read_header, read_image, read_rgb
from .video import count_video, is_video, load_video

MILLIMETRES_PER_METRE = 1000.0
MOST_JSON = 2**25  # bytes; tens of thousands of frames
LARGEST = 1e18  # of the numbers in a clip.json, with which float32 still computes

Source = tuple[str, tuple[int, int]]  # name, and width and height


def load_clip(
    path: str | Path,
    *,
    frames: int | None = None,
    start: int = 0,
    stride: int = 1,
    width: int = 518,
    mode: Literal["crop", "square"] = "crop",
    patch: int = PATCH_SIZE,
) -> Clip:
    """Load a clip from a folder of images, from a folder with a `clip.json`, or from a video.

    The format of `clip.json` is in this module's description. A folder of images is read in natural order:
    `frame2` before `frame10`. Hidden files are passed over. A warning names pictures of other formats and broken links,
    which are left out. Orientation tags are applied, transparency is laid on white, and 16-bit greyscale is scaled to
    the full range. Of several pages in one file the first is taken.

    A video is decoded once, from its first frame to the last one taken, and turned as it says. Its pixels are taken as
    square. It needs the extra `video`, and all frames that are taken must fit into memory.

    Args:
        path: The folder, or the video file.
        frames: How many frames to take; None takes all there are.
        start: First frame taken.
        stride: Step between the frames taken.
        width: Width of the loaded frames in pixels, a multiple of `patch`: 518 for VGGT-1B, 224 for VGGT-mini.
        mode: "crop" is the "crop" mode of VGGT's own loader. The whole width is resized (bicubic) to `width`, the
            height to the nearest multiple of `patch`. Of a result taller than wide the central `width` rows are kept.
            "square" cuts the central square and resizes that, for models trained on squares only, as VGGT-mini is.
        patch: Pixels a side of a patch of the model.

    Returns:
        A `Clip` on the CPU with what the source tells: intrinsics and depth follow every crop and resize,
        depth in metres by nearest pixel. Named after the folder or the file, or as `clip.json` says.

    Raises:
        ClipError: A file is missing, too large, broken or incomplete, there are too few frames, or they differ in size
            (pictures cut to squares may). Or a `clip.json` names files outside its folder. The message names the file.
        PaceError: An argument is out of range or of another type, or PyAV is missing for a video.
    """
    check_arguments(frames, start, stride, width, mode, patch)  # before a long list of files
    if is_video(path):
        return load_video(file_path("path", path), frames, start, stride, width, mode, patch)
    return ClipFolder(path).load(frames, start, stride, width, mode, patch)


def count_frames(path: str | Path) -> int:
    """How many frames `load_clip` finds in a folder or a video.

    A video is read to its end. It is decoded, too, if its container does not list the frames.

    Raises:
        ClipError: The folder or its images are missing, its `clip.json` is broken, or the video can't be read.
        PaceError: The path is a video and PyAV is missing.
    """
    return count_video(file_path("path", path)) if is_video(path) else len(ClipFolder(path))


def existing_folder(path: str | Path) -> Path:
    """The path, if it is a folder."""
    folder = file_path("path", path)
    if not os.path.isdir(folder):
        raise ClipError(f"{folder} {'is not a folder' if os.path.lexists(folder) else 'does not exist'}")
    return folder


class ClipFolder:
    """A folder with a clip: what it holds is looked at once, its pictures are read by `load`.

    Raises:
        ClipError: The folder or its images are missing, or its `clip.json` is broken.
    """

    def __init__(self, path: str | Path):
        self.folder = existing_folder(path)
        file = self.folder / "clip.json"
        # A folder without one is as one whose `clip.json` says nothing but the names of its images.
        self.description = read_description(file) if os.path.lexists(file) else {}
        if self.description:
            self.entries: list[dict[str, Any]] = self.description["frames"]
        else:
            names = image_names(self.folder, listed(self.folder)[0])
            self.entries = [{"file": name} for name in sorted(names, key=natural_key)]

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.entries)

    def files(self) -> list[Path]:
        """Pictures and depth maps, in the order of the frames."""
        names = (entry.get(key) for entry in self.entries for key in ("file", "depth"))
        return [self.folder / name for name in names if name is not None]

    def framing(
        self, name: str, size: tuple[int, int], first: Source, width: int, mode: str, patch: int = PATCH_SIZE
    ) -> Framing:
        """How the picture of that name and size becomes a frame; `ClipError` if not of the size of the first one."""
        if self.description:
            first = "clip.json", (self.description["width"], self.description["height"])
        if size != first[1] and (self.description or mode != "square"):
            raise ClipError(
                f"{self.folder / name} is {size[0]}x{size[1]}, but {first[0]} has {first[1][0]}x{first[1][1]}: "
                "all frames of a clip must have one size"
            )
        return framing_of(self.folder / name, size, width, mode, patch)

    def check(
        self,
        width: int,
        mode: str,
        patch: int = PATCH_SIZE,
        entries: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[int, int]:
        """Width and height of the first picture; `ClipError` if the header of any picture or depth map does not fit.

        Args:
            entries: those that are looked at; None takes all.
        """
        check_arguments(None, 0, 1, width, mode, patch)
        first: Source | None = None
        for entry in self.entries if entries is None else entries:
            size, _ = read_header(self.folder / entry["file"])
            first = first or (entry["file"], size)
            self.framing(entry["file"], size, first, width, mode, patch)
            if entry.get("depth") is not None:
                check_depth(self.folder / entry["depth"], *read_header(self.folder / entry["depth"]), size)
        assert first is not None  # there is a frame
        return first[1]

    def load(
        self, frames: int | None, start: int, stride: int, width: int, mode: str, patch: int = PATCH_SIZE
    ) -> Clip:
        """The clip of some of the frames; see `load_clip` for arguments and errors."""
        check_arguments(frames, start, stride, width, mode, patch)
        return self.load_entries(choose(self.entries, self.folder, frames, start, stride), width, mode, patch)

    def load_entries(
        self, entries: Sequence[dict[str, Any]], width: int, mode: str, patch: int = PATCH_SIZE
    ) -> Clip:
        """The clip of these entries; see `load_clip` for the other arguments and errors."""
        has_depth = any(entry.get("depth") is not None for entry in entries)
        pictures, maps = [], []
        first: Source | None = None
        for entry in entries:
            image = read_rgb(self.folder / entry["file"])
            first = first or (entry["file"], image.size)
            framing = self.framing(entry["file"], image.size, first, width, mode, patch)
            pictures.append(framing.image(image))
            if has_depth:
                maps.append(framing.depth(read_depth(self.folder, entry.get("depth"), image.size)))
        images = images_of(pictures)  # [S, 3, H, W]

        intrinsics = None
        if self.description.get("intrinsics") is not None:
            fx, fy, cx, cy = (float(self.description["intrinsics"][key]) for key in ("fx", "fy", "cx", "cy"))
            intrinsics = framing.intrinsics(fx, fy, cx + PIXEL_CENTRE, cy + PIXEL_CENTRE)
            intrinsics = intrinsics.expand(len(entries), 3, 3).clone()  # [S, 3, 3]

        world_to_camera = None
        if entries[0].get("cam_to_world") is not None:
            poses = [invert_pose(entry["cam_to_world"]) for entry in entries]
            world_to_camera = torch.stack(poses)  # [S, 3, 4]
        depth = torch.from_numpy(np.stack(maps)) if has_depth else None  # [S, H, W]
        name = self.description.get("name") or self.folder.resolve().name
        return Clip(name, images, intrinsics, world_to_camera, depth)


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sort key that compares runs of digits as numbers; the plain name decides between `a1` and `a01`."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [(0, int(part)) if part.isascii() and part.isdigit() else (1, part) for part in parts], name


def read_description(file: Path) -> dict[str, Any]:
    """The content of a `clip.json`, checked; the `ClipError` names the file and what is wrong in it."""
    check_file(file, MOST_JSON)
    try:
        description = json.loads(file.read_text(encoding="utf-8"), parse_int=json_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ClipError(f"{file} cannot be read as JSON: {first_line(error)}") from error
    check_description(description, file)
    return description


def check_description(description: Any, file: Path) -> None:
    """Raise `ClipError` for what is no content of a `clip.json`."""
    if not isinstance(description, dict):
        raise ClipError(f"{file} must hold a JSON object")
    if not isinstance(description.get("name"), str | None):
        raise ClipError(f"{file}: 'name' must be a string")
    for key in ("width", "height"):
        if type(description.get(key)) is not int:  # True is an int, too
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
        for key in ("file", "depth"):
            path = Path(frame.get(key) or "")
            if path.anchor or ".." in path.parts:
                raise ClipError(f"{file}: {key!r} of frame {index} must be a path within the folder")
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


def json_number(digits: str) -> int | float:
    """A whole number of a `clip.json`; inf if it has more digits than any of use."""
    return int(digits) if len(digits) < 20 else float(digits)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, no string or bool, of ordinary size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def is_intrinsics(value: Any) -> bool:
    """Whether `value` holds the numbers `fx fy cx cy`, the focal lengths positive."""
    if not isinstance(value, dict) or not all(is_number(value.get(key)) for key in ("fx", "fy", "cx", "cy")):
        return False
    return min(value["fx"], value["fy"]) > 1 / LARGEST


def is_rigid(value: Any) -> bool:
    """Whether `value` is a 4x4 rotation and translation; lost tracking is often stored as NaN or inf."""
    rows = value if isinstance(value, list) else []
    if [len(row) if isinstance(row, list) and all(map(is_number, row)) else 0 for row in rows] != [4] * 4:
        return False
    pose = np.array(rows, dtype=np.float64)
    if not np.allclose(pose[3], [0, 0, 0, 1]):
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
    image = read_image(folder / name)
    check_depth(folder / name, image.size, image.mode, size)
    return (np.asarray(image) / MILLIMETRES_PER_METRE).astype(np.float32)


def check_depth(file: Path, size: tuple[int, int], mode: str, frame: tuple[int, int]) -> None:
    """Raise `ClipError` if a depth map of that size and mode is not one of a frame of size `frame`."""
    if not mode.startswith("I"):
        raise ClipError(f"{file} is not a 16-bit depth map (its mode is {mode})")
    if size != frame:
        raise ClipError(f"{file} is {size[0]}x{size[1]}, but its frame is {frame[0]}x{frame[1]}")


def save_clip(clip: Clip, path: str | Path, *, quality: int = 92) -> None:
    """Write a clip as a `clip.json` folder that `load_clip` reads back: JPEG frames, 16-bit PNG depth.

    Args:
        clip: The clip; all its frames must share one camera matrix (or none), and its unit must be the metre.
        path: Folder to write; made if it is not there.
        quality: JPEG quality of the frames.

    Raises:
        ClipError: The frames' intrinsics differ, a valid depth does not fit into 16 bits of millimetres, or the folder
            can't be written.
    """
    folder = file_path("path", path)
    whole("quality", quality)
    if not isinstance(clip, Clip):
        raise ClipError(f"clip must be a Clip, got {shown(clip)}")
    description: dict[str, Any] = {"name": clip.name, "width": clip.width, "height": clip.height}
    description["intrinsics"] = describe_intrinsics(clip)
    description["pose_unit"] = "metres"
    description["frames"] = [
        {
            "file": f"frames/{index:06d}.jpg",
            "depth": None if clip.depth is None else f"depth/{index:06d}.png",
            "cam_to_world": None
            if clip.world_to_camera is None
            else describe_pose(clip.world_to_camera[index]),
        }
        for index in range(len(clip))
    ]
    check_description(description, folder / "clip.json")  # before anything is written
    try:
        (folder / "frames").mkdir(parents=True, exist_ok=True)
        if clip.depth is not None:
            (folder / "depth").mkdir(exist_ok=True)
        pixels = (clip.images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)  # [S, H, W, 3]
        entries: list[dict[str, Any]] = description["frames"]
        for index, entry in enumerate(entries):
            picture = Image.fromarray(pixels[index].cpu().numpy())
            picture.save(folder / entry["file"], quality=quality, subsampling=0)
            if clip.depth is not None and clip.valid is not None:
                frame = f"clip {clip.name!r}, frame {index}"
                stored = millimetres(clip.depth[index], clip.valid[index], frame)
                Image.fromarray(stored).save(folder / entry["depth"], optimize=True)
        write_json(folder / "clip.json", description)
    except OSError as error:
        raise ClipError(f"{folder} cannot be written: {first_line(error)}") from error


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
    inverse, _ = torch.linalg.inv_ex(torch.cat([world_to_camera.double().cpu(), last_row]))
    return inverse.tolist()


def millimetres(depth: Tensor, valid: Tensor, frame: str) -> np.ndarray:
    """`[H, W]` uint16 depth of one frame in millimetres, 0 where not valid."""
    values = torch.where(valid, depth, 0).double() * MILLIMETRES_PER_METRE
    if values.max() > np.iinfo(np.uint16).max:
        raise ClipError(f"{frame}: depth exceeds 65.535 m, the most that a clip.json folder holds")
    return values.round().cpu().numpy().astype(np.uint16)
