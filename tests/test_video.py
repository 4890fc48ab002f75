"""Videos as clips, against the pictures that they were made of: frames, turns, counts, and what is broken."""

from __future__ import annotations

import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pacevggt_patch.clips import count_frames, load_clip, video
from pacevggt_patch.errors import ClipError, PaceError

av = pytest.importorskip("av", reason="videos need PyAV")

LOSSLESS = ("ffv1", "bgr0")
WHOLE, HALF = 1 << 16, 1 << 30  # of a display matrix: 16.16 bits, and 2.30 in its last column


def pictures(count: int, width: int = 48, height: int = 32) -> list[np.ndarray]:
    """Smooth random pictures `[H, W, 3]`."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)
    size = (width, height)
    return [np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BILINEAR)) for c in coarse]


def write_video(file: Path, frames: list[np.ndarray], codec=LOSSLESS, times=None, options=None) -> Path:
    """The frames as a video at 10 a second, or at other times in tenths of a second."""
    name, pixels = codec
    if name not in av.codec.codecs_available:
        pytest.skip(f"this PyAV has no {name}")
    with av.open(str(file), "w", options=options or {}) as container:
        stream = container.add_stream(name, rate=10)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], pixels
        for index, pixel in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixel, format="rgb24")
            frame.pts, frame.time_base = (times or range(len(frames)))[index], Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def write_sound(file: Path) -> Path:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    return file


def write_folder(folder: Path, frames: list[np.ndarray]) -> Path:
    """The frames as a folder of pictures."""
    folder.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{index}.png")
    return folder


def refusal(call, *args, error=ClipError, **kwargs) -> str:
    """The message of the error that the call raises: one line."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"frames": 4, "stride": 3},
        {"frames": 2, "start": 5, "stride": 2},
        {"start": 11},
        {"mode": "square", "frames": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_frames_are_those_of_a_folder_of_the_same_pictures(tmp_path, suffix, chosen):
    frames = pictures(12, 45, 31)  # odd sizes
    file = write_video(tmp_path / f"a{suffix}", frames)
    clip = load_clip(file, width=28, **chosen)
    expected = load_clip(write_folder(tmp_path / "folder", frames), width=28, **chosen)
    assert torch.equal(clip.images, expected.images)
    assert clip.name == "a" and clip.intrinsics is None and clip.depth is None
    assert count_frames(file) == 12


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".m4v", ".mkv", ".avi", ".ts"])
@pytest.mark.parametrize("codec", [("mpeg4", "yuv420p"), ("libx264", "yuv420p")], ids=lambda codec: codec[0])
def test_frames_of_lossy_videos_are_in_order(tmp_path, suffix, codec):
    frames = pictures(9, 70, 42)
    file = write_video(tmp_path / f"a{suffix}", frames, codec)
    images = load_clip(file, width=70).images
    assert count_frames(file) == len(images) == 9
    sources = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 255
    distances = (images[:, None] - sources).abs()
    assert distances.mean((2, 3, 4)).argmin(1).tolist() == list(range(9))


def test_uneven_times_are_no_matter(tmp_path):
    frames = pictures(5)
    file = write_video(tmp_path / "a.mkv", frames, times=[0, 1, 2, 90, 91])
    assert torch.equal(
        load_clip(file, width=28).images, load_clip(write_folder(tmp_path / "b", frames), width=28).images
    )
    assert count_frames(file) == 5


def with_matrix(file: Path, a: int, b: int, c: int, d: int) -> Path:
    """An MP4 whose track header holds another display matrix."""
    data = bytearray(file.read_bytes())
    place = data.index(b"tkhd") + 44  # behind times, numbers, layer and volume
    data[place : place + 36] = struct.pack(
        ">9i", a * WHOLE, b * WHOLE, 0, c * WHOLE, d * WHOLE, 0, 0, 0, HALF
    )
    file.write_bytes(data)
    return file


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), None),
        ((0, 1, -1, 0), Image.Transpose.ROTATE_270),  # Pillow counts against the clock
        ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
        ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
        ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
        ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
        ((0, 1, 1, 0), Image.Transpose.TRANSPOSE),
        ((0, -1, -1, 0), Image.Transpose.TRANSVERSE),
    ],
    ids=str,
)
def test_videos_are_turned_as_they_say(tmp_path, matrix, turn):
    file = write_video(tmp_path / "a.mp4", pictures(2, 64, 32), ("mpeg4", "yuv420p"))
    with av.open(str(file)) as container:
        stored = [frame.to_image() for frame in container.decode(video=0)]
    turned = [np.asarray(image if turn is None else image.transpose(turn)) for image in stored]
    expected = load_clip(write_folder(tmp_path / "folder", turned), width=28)
    assert torch.equal(load_clip(with_matrix(file, *matrix), width=28).images, expected.images)


def test_only_what_is_wanted_is_decoded(tmp_path, monkeypatch):
    file = write_video(tmp_path / "a.mkv", pictures(40))
    seen, kept, original = [], [], video.decoded
    monkeypatch.setattr(
        video, "decoded", lambda *given: (seen.append(1) or frame for frame in original(*given))
    )
    monkeypatch.setattr(video, "upright", lambda frame, run=video.upright: kept.append(1) or run(frame))
    load_clip(file, frames=3, stride=4, start=2, width=28)
    assert (len(seen), len(kept)) == (11, 3)


def test_too_few_frames_are_told_as_of_a_folder(tmp_path):
    file = write_video(tmp_path / "a.mkv", pictures(7))
    assert refusal(load_clip, file, width=28, frames=4, stride=3).startswith(f"{file} has 7 frames: only 3")
    assert refusal(load_clip, file, width=28, start=7) == f"{file} has 7 frames, there is no frame 7"
    assert refusal(load_clip, file, error=PaceError, frames=0).startswith("frames")
    assert refusal(load_clip, file, width=13, error=PaceError).startswith("width")


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mkv", LOSSLESS, {}),
        ("a.avi", LOSSLESS, {}),
        ("a.webm", ("libvpx", "yuv420p"), {}),
        ("end.mp4", ("mpeg4", "yuv420p"), {}),
        ("front.mp4", ("mpeg4", "yuv420p"), {"movflags": "faststart"}),
        ("front.mov", ("libx264", "yuv420p"), {"movflags": "faststart"}),
        ("pieces.mp4", ("libx264", "yuv420p"), {"movflags": "frag_keyframe+empty_moov"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_files_that_are_cut_off_are_named(tmp_path, name, codec, options, share):
    file = write_video(tmp_path / name, pictures(40), codec, options=options)
    assert len(load_clip(file, width=28)) == count_frames(file) == 40
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    for call in (load_clip, count_frames):
        message = refusal(call, file)
        assert message.startswith(f"{file} ") and "copy it again" in message


def test_what_an_edit_list_cuts_away_counts_for_nothing(tmp_path):
    """Telephones cut videos so: the file keeps all frames, and a list tells which time is shown."""
    file = write_video(tmp_path / "a.mp4", pictures(30), ("mpeg4", "yuv420p"))
    whole = load_clip(file, width=28).images
    data = bytearray(file.read_bytes())
    ticks = struct.unpack(">I", data[(place := data.index(b"mdhd") + 16) : place + 4])[0]  # a second
    entry = data.index(b"elst") + 12
    # In milliseconds and in ticks: two seconds from half a second on, five frames.
    data[entry : entry + 8] = struct.pack(">Ii", 2000, ticks // 2)
    file.write_bytes(data)
    assert count_frames(file) == 20
    assert torch.equal(load_clip(file, width=28).images, whole[5:25])


@pytest.mark.parametrize("trial", range(12))
def test_damage_is_read_over_or_named(tmp_path, trial):
    """Decoders mend what they can. What is left is a clip or one sentence."""
    file = write_video(tmp_path / "a.mp4", pictures(20), ("mpeg4", "yuv420p"))
    rng, data = np.random.default_rng(trial), np.frombuffer(file.read_bytes(), np.uint8).copy()
    data[rng.integers(0, len(data), 30)] = rng.integers(0, 256, 30)
    file.write_bytes(data.tobytes())
    try:
        images = load_clip(file, width=28).images
    except ClipError as error:
        message = str(error)
    else:
        assert images.shape[1:] == (3, 14, 28)
        return
    assert str(file) in message and "\n" not in message


def test_what_is_no_video_is_named(tmp_path):
    sound = write_sound(tmp_path / "sound.mp4")
    text, empty, playlist = (tmp_path / name for name in ("text.mp4", "empty.mov", "list.mp4"))
    text.write_text("not a video\n" * 100)
    empty.write_bytes(b"")
    whole = write_video(tmp_path / "a.ts", pictures(3), ("mpeg4", "yuv420p"))
    playlist.write_text(f"ffconcat version 1.0\nfile {whole.name}\n")  # FFmpeg knows it by its first line
    for call in (load_clip, count_frames):
        assert "audio" in refusal(call, sound) and str(sound) in refusal(call, sound)
        for file in (text, empty, playlist):
            assert refusal(call, file).startswith(f"{file} cannot be read as a video")
        assert refusal(call, tmp_path / "none.mp4") == f"{tmp_path / 'none.mp4'} does not exist"
    text.rename(tmp_path / "text.txt")
    assert ".mp4" in refusal(load_clip, tmp_path / "text.txt")


def test_names_with_colons_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mkv", pictures(2)).rename("data:a.MKV")
    assert count_frames("data:a.MKV") == 2
    assert len(load_clip(Path("data:a.MKV"), width=28)) == 2


def test_sizes_that_are_too_large_are_refused_before_a_frame_is_decoded(tmp_path, monkeypatch):
    file = write_video(tmp_path / "a.mkv", pictures(2))
    monkeypatch.setattr(video, "MOST_PIXELS", 48 * 32 - 1)
    monkeypatch.setattr(video, "decoded", lambda *_: pytest.fail("a frame is decoded"))
    for call in (load_clip, count_frames):
        assert "48x32" in refusal(call, file) and str(file) in refusal(call, file)
    monkeypatch.undo()
    assert "too large" in refusal(load_clip, file, width=14 * 10**6)


def test_frames_that_change_their_size_are_refused(tmp_path):
    """Two MPEG streams one after the other, as of a receiver that changes its resolution."""
    parts = [
        write_video(tmp_path / f"{width}.mpg", pictures(6, width, 32), ("mpeg2video", "yuv420p")).read_bytes()
        for width in (48, 64)
    ]
    file = tmp_path / "both.mpg"
    file.write_bytes(b"".join(parts))
    message = refusal(load_clip, file, width=28)
    assert "48x32" in message and "64x32" in message


@pytest.mark.parametrize("library", ["av", "tqdm"])
def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch, library):
    file = write_video(tmp_path / "a.mkv", pictures(2))
    monkeypatch.setitem(sys.modules, library, None)
    for call in (load_clip, count_frames):
        assert f"{library}; in the folder of the checkout: pip install '.[video]'" in refusal(
            call, file, error=PaceError
        )
