"""Videos as clips: decoded forward once, by PyAV, which brings FFmpeg's libraries and needs no program."""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..arguments import file_path
from ..errors import ClipError, PaceError, first_line
from ..runtime.plotting import load_extra
from .clip import Clip
from .framing import PATCH_SIZE, choose, framing_of, images_of
from .images import MOST_PIXELS

VIDEO_SUFFIXES = (
    ".mp4", ".mov", ".m4v", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv",
    ".ogv",
)  # fmt: skip
# By their content. No others: a playlist, whatever it is called, would lead FFmpeg to other files.
FORMATS = "mov,matroska,avi,mpegts,mpeg,asf,flv,ogg"
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
SHORTEST_CUT = 1.0  # seconds that must be missing at the end for a file to count as cut off
MEND = "copy it again, or mend it: ffmpeg -i IN -c:v libx264 OUT.mp4"
QUIET = 2.0  # seconds before a progress bar shows
MICROSECONDS = 10**6  # the unit of a container's duration


def is_video(path: Any) -> bool:
    """Whether a path is that of a video, told by its suffix.

    Raises:
        ClipError: It is another file.
        PaceError: It is no path.
    """
    file = file_path("path", path)
    if not os.path.isfile(file):
        return False
    if file.suffix.lower() not in VIDEO_SUFFIXES:
        raise ClipError(f"{file} is neither a folder of images nor a video ({' '.join(VIDEO_SUFFIXES)})")
    return True


def load_video(
    file: Path, frames: int | None, start: int, stride: int, width: int, mode: str, patch: int = PATCH_SIZE
) -> Clip:
    """The clip of some frames of a video; see `load_clip` for arguments and errors. Only frames taken are kept."""
    pictures: list[np.ndarray] = []  # [H, W, 3] each
    framing, first, seen = None, (0, 0), 0
    last = None if frames is None else start + stride * (frames - 1)
    with opened(file) as (container, stream):
        total = None if last is None else last + 1
        with progress(decoded(file, container, stream), f"decoding {file.name}", total) as shown:
            for index, frame in enumerate(shown):
                seen = index + 1
                if index < start or (index - start) % stride:
                    continue
                picture = upright(frame)
                size = picture.shape[1], picture.shape[0]
                if framing is None:
                    framing, first = framing_of(file, size, width, mode, patch), size
                if size != first:
                    raise ClipError(
                        f"{file} changes from {first[0]}x{first[1]} to {size[0]}x{size[1]} at frame {index}: "
                        "all frames of a clip must have one size"
                    )
                pictures.append(framing.image(Image.fromarray(picture)))
                if index == last:
                    break
    choose(range(some_frames(file, seen)), file, frames, start, stride)  # tells if there are too few
    return Clip(file.stem, images_of(pictures))


def count_video(file: Path) -> int:
    """Number of frames of a video; `ClipError` if it can't be read to its end."""
    with opened(file) as (container, stream):
        listed = stream.frames > 0
        # A container that lists frames holds one in each packet. What an edit list cuts away is to be discarded.
        found: Iterable[Any] = (
            (packet for packet in packets(file, container, stream) if not packet.is_discard)
            if listed
            else decoded(file, container, stream)
        )
        with progress(found, f"counting frames of {file.name}") as shown:
            count = sum(1 for _ in shown)
    return some_frames(file, count)


def some_frames(file: Path, count: int) -> int:
    """The number of frames that were found; `ClipError` if there are none."""
    if not count:
        raise ClipError(f"{file} has no frame that can be read: {MEND}")
    return count


@contextmanager
def opened(file: Path) -> Generator[tuple[Any, Any]]:
    """Container and video stream of a file; what goes wrong within is a `ClipError`.

    Raises:
        ClipError: The file is no video, holds none, is broken, or says that its frames are too large.
        PaceError: PyAV is missing.
    """
    av = load_extra("av", "videos", "video")
    try:
        # "file:" keeps FFmpeg from reading a protocol into a name with a colon.
        # Options of streams would make older PyAV free memory that is not its own (MPEG adds streams late).
        with av.open(f"file:{file}", container_options=OPTIONS) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ClipError(
                    f"{file} has no video, only {kinds(container)}: choose another file, or copy it again"
                )
            size = stream.codec_context.width, stream.codec_context.height
            if size[0] * size[1] > MOST_PIXELS:
                raise ClipError(
                    f"{file} says that its frames are {size[0]}x{size[1]}, more than {MOST_PIXELS // 10**6} million "
                    "pixels: make them smaller"
                )
            stream.thread_type = "AUTO"
            yield container, stream
    except PaceError:
        raise
    except Exception as error:  # FFmpeg has dozens, and decoders more
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ClipError(f"{file} cannot be read as a video ({reason}): {MEND}") from error


def kinds(container: Any) -> str:
    """What streams a container holds, in words."""
    return " and ".join(sorted({stream.type for stream in container.streams})) or "nothing"


def decoded(file: Path, container: Any, stream: Any) -> Generator[Any]:
    """The frames of a video, in the order in which they are shown."""
    for packet in itertools.chain(packets(file, container, stream), [None]):
        yield from stream.codec_context.decode(packet)  # None brings what the decoder still holds


def packets(file: Path, container: Any, stream: Any) -> Generator[Any]:
    """The packets of a video stream; `ClipError` where one is damaged, or where the file ends too early.

    Demuxers pass over a missing end. So the time that the container promises is compared with the time that the packets
    of all its streams reach, as sound may be longer than pictures. Where frames are far apart more may be missing.
    """
    promised = (container.duration or 0) / MICROSECONDS
    reached, widest = None, 0.0  # seconds
    for packet in container.demux():
        if packet.is_corrupt:
            raise ClipError(f"{file} is damaged or cut off after {reached or 0:.1f} seconds: {MEND}")
        times = [time for time in (packet.pts, packet.dts) if time is not None]
        if times:
            time = float(max(times) * packet.time_base)
            widest = max(widest, time - (time if reached is None else reached))
            reached = max(reached or 0.0, time + float((packet.duration or 0) * packet.time_base))
        if packet.size and packet.stream_index == stream.index:  # the last one of each stream is empty
            yield packet
    if promised - (reached or 0.0) > max(SHORTEST_CUT, 2 * widest):
        raise ClipError(f"{file} ends after {reached or 0:.1f} of {promised:.1f} seconds: {MEND}")


def upright(frame: Any) -> np.ndarray:
    """`[H, W, 3]` uint8 of a decoded frame, turned and mirrored as its display matrix says.

    The matrix takes column x and row y to a x + c y and b x + d y, and only quarter turns are known.
    """
    picture = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):  # rows become columns
        picture, a, d = picture.swapaxes(0, 1), c, b
    return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def progress(frames: Iterable[Any], what: str, total: int | None = None) -> Any:
    """The frames with a progress bar, which shows if they take long."""
    tqdm = load_extra("tqdm", "videos", "video").tqdm
    return tqdm(frames, desc=what, total=total, unit="frame", delay=QUIET, leave=False)
