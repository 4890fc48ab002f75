"""What training draws from and its losses by hand: folders of images, rendered rooms, and sums in float64."""

from __future__ import annotations

import io
import itertools
import os
import zipfile

import numpy as np
import pytest
import torch
from hosts import write_images
from PIL import Image
from scipy.spatial.transform import Rotation

from pacevggt_patch import PaceError
from pacevggt_patch.clips import save_clip
from pacevggt_patch.evaluation import decode_pose_encoding, unproject
from pacevggt_patch.mini.scenes.rooms import render_room
from pacevggt_patch.mini.scenes.sweeps import Sweeps, render_sweeps
from pacevggt_patch.mini.scenes.textures import brightened, load_photographs, texture_atlas
from pacevggt_patch.mini.sources import PlainRooms, RenderedScenes
from pacevggt_patch.training.losses import (
    Target,
    confidence_loss,
    distillation_loss,
    output_losses,
    relative_error,
    teacher_target,
    truth_target,
)
from pacevggt_patch.training.passes import Outputs
from pacevggt_patch.training.sources import FolderSource, Truth

CPU = torch.device("cpu")


# ---- sources


def test_windows_are_those_of_the_number(tmp_path):
    folder = write_images(tmp_path / "frames", 12)
    source = FolderSource(folder, 3, 28, "square")
    frames = FolderSource(folder, 12, 28, "square").finish(source.draw(0, 1, 12), CPU).images[0]
    strides, starts = set(), set()
    for seed in range(40):
        images, truth = source.finish(source.draw(seed, 2, 3), CPU)
        assert truth is None and images.shape == (2, 3, 3, 28, 28)
        assert torch.equal(images, source.finish(source.draw(seed, 2, 3), CPU).images)
        numbers = [int((frames == image).flatten(1).all(1).nonzero()) for image in images[0]]
        assert numbers[1] - numbers[0] == numbers[2] - numbers[1] > 0
        strides.add(numbers[1] - numbers[0])
        starts.add(numbers[0])
    assert strides == {1, 2, 3, 4} and len(starts) > 5
    assert source.description == "1 clip of 12 images"


def test_clips_of_a_step_have_one_size(tmp_path):
    write_images(tmp_path / "a", 3, (56, 42))
    write_images(tmp_path / "b", 4, (42, 56))
    (tmp_path / "notes").mkdir()
    source = FolderSource(tmp_path, 3, 28, "crop")
    assert source.description == "2 clips of 7 images"
    shapes = {source.finish(source.draw(seed, 2, 2), CPU).images.shape for seed in range(12)}
    assert shapes == {(2, 2, 3, 28, 28), (2, 2, 3, 14 * round(28 * 42 / 56 / 14), 28)}


def test_ground_truth_comes_along_where_all_clips_have_it(tmp_path):
    save_clip(render_room(1, 4, 28, 28), tmp_path / "a")
    source = FolderSource(tmp_path, 2, 28, "square")
    truth = source.finish(source.draw(0, 2, 2), CPU).truth
    assert truth is not None
    assert truth.depth.shape == truth.valid.shape == (2, 2, 28, 28)
    assert truth.world_to_camera.shape == (2, 2, 3, 4) and truth.intrinsics.shape == (2, 2, 3, 3)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: (p / "none").write_text("file"), "not a folder"),
        (lambda p: (p / "none").mkdir(), "no images"),
        (lambda p: write_images(p / "none", 2), "2 frames"),
    ],
)
def test_folders_that_will_not_do(tmp_path, make, named):
    make(tmp_path)
    with pytest.raises(PaceError, match=named) as caught:
        FolderSource(tmp_path / "none", 3, 28, "crop")
    assert str(tmp_path / "none") in str(caught.value)


def test_a_broken_image_is_named(tmp_path):
    folder = write_images(tmp_path, 3)
    (folder / "001.png").write_bytes(b"no picture")
    with pytest.raises(PaceError, match=r"001\.png cannot be read as an image"):
        FolderSource(folder, 3, 28, "square")


def test_pictures_are_decoded_beforehand_where_these_are_few(tmp_path, monkeypatch):
    folder = write_images(tmp_path, 3)
    file = folder / "002.png"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PaceError, match=r"002\.png cannot be read as an image"):
        FolderSource(folder, 1, 28, "square")
    monkeypatch.setattr("pacevggt_patch.training.sources.DECODED_FIRST", 100)
    source = FolderSource(folder, 3, 28, "square")
    with pytest.raises(PaceError, match=r"002\.png cannot be read as an image"):
        source.draw(0, 1, 3)


def test_sizes_and_widths_that_do_not_fit_are_found_beforehand(tmp_path):
    folder = write_images(tmp_path, 3, (56, 42))
    Image.new("RGB", (42, 56)).save(folder / "002.png")
    with pytest.raises(PaceError, match=r"002\.png is 42x56"):
        FolderSource(folder, 2, 28, "crop")
    with pytest.raises(PaceError, match="width"):
        FolderSource(folder, 2, 57, "square")
    assert FolderSource(folder, 2, 28, "square").draw(0, 1, 2)[0].width == 28


def test_scenes_that_are_left_out_are_named_and_hidden_ones_are_not(tmp_path):
    for name in ("a", ".thumbnails", "__MACOSX", "deep/b", "deep/c", "deep/er/d", "a/.thumbnails"):
        write_images(tmp_path / name, 2)
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "0.heic").write_bytes(b"")
    (tmp_path / "back").symlink_to(tmp_path)
    save_clip(render_room(1, 2, 28, 28), tmp_path / "z")  # whose pictures lie in a folder of their own
    with pytest.warns(UserWarning, match="left out") as caught:
        source = FolderSource(tmp_path, 2, 28, "square")
    assert source.description == "2 clips of 4 images"
    (warning,) = caught
    assert f"{tmp_path}: left out 4 (deep/b, deep/c, deep/er/d, ...)" in str(warning.message)
    write_images(tmp_path / "a" / "inner", 2)
    with pytest.warns(UserWarning, match=r"left out 1 \(inner\)"):
        FolderSource(tmp_path / "a", 2, 28, "square")
    write_images(tmp_path / "only" / "deep" / "b", 2)
    with pytest.raises(PaceError, match=r"no images, .*1 \(deep/b\)"):
        FolderSource(tmp_path / "only", 2, 28, "square")


def test_folders_behind_links_are_looked_through_once(tmp_path):
    elsewhere = tmp_path / "disk"
    write_images(elsewhere / "a", 2)
    write_images(elsewhere / "b", 2)
    (elsewhere / "round").symlink_to(elsewhere)
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("scenes", "the same"):
        (folder / name).symlink_to(elsewhere)
    with pytest.raises(PaceError, match=r"left out 2 \(scenes/a, scenes/b\)"):
        FolderSource(folder, 2, 28, "square")
    (folder / "taken").symlink_to(elsewhere / "b")
    with pytest.warns(UserWarning, match=r"left out 1 \(scenes/a\)"):
        source = FolderSource(folder, 2, 28, "square")
    assert source.description == "1 clip of 2 images"


# ---- photographs


def photograph(size: tuple[int, int] = (60, 40), kind: str = "JPEG", **options) -> bytes:
    """A picture file, red above and blue below."""
    image = Image.new("RGB", size, (250, 0, 0))
    image.paste((0, 0, 250), (0, size[1] // 2, *size))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def packed(path, files: dict[str, bytes]):
    """A zip file of files."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_photographs_are_read_as_clips_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned to the left: blue from below comes to the right
    (tmp_path / "0.jpg").write_bytes(photograph((40, 40), exif=exif))
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "1.png")
    Image.fromarray(np.full((40, 40), 32768, np.uint16)).save(tmp_path / "2.png")
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(tmp_path / "3.tif")
    (tmp_path / "4.png").symlink_to("nowhere.png")
    (tmp_path / "b.jpg").mkdir()
    for hidden in (".thumbnails", "__MACOSX"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "5.jpg").write_bytes(b"hidden")
    (tmp_path / "._0.jpg").write_bytes(b"hidden")
    with pytest.warns(UserWarning, match=r"left out 1 \(4\.png\)"):
        found = load_photographs(tmp_path, 32).int()
    assert len(found) == 4
    assert found[0, 0, :, 2].min() > 200 and found[0, 2, :, -3].min() > 200
    assert (found[1] == 255).all()
    assert (found[2] == 128).all()
    assert found[3, :, 0, 0].tolist() == [255, 0, 0]


def test_archives_of_photographs_have_hidden_files_and_folders(tmp_path):
    content = photograph()
    hidden = {
        "__MACOSX/._a.jpg": b"",
        "._a.jpg": b"",
        ".thumbnails/a.jpg": b"",
        "b.jpg/": b"",
        "notes.txt": b"",
    }
    file = packed(tmp_path / "a.zip", hidden | {"./a.jpg": content, "c/a.jpg": content, "x.heic": b""})
    with pytest.warns(UserWarning, match=r"left out 1 \(x\.heic\)"):
        assert len(load_photographs(file, 32)) == 2


@pytest.mark.parametrize(
    ("local", "central", "value", "reason"),
    [
        (6, 8, b"\x01\x00", "encrypted"),
        (8, 10, b"\x61\x00", "compression"),
        (14, 16, b"\0\0\0\0", "CRC"),
        (22, 24, b"\0\0\0\x40", "larger"),
    ],
)
def test_archives_that_cannot_be_unpacked_are_named(tmp_path, local, central, value, reason):
    file = packed(tmp_path / "a.zip", {"some/a.jpg": photograph()})
    content = bytearray(file.read_bytes())
    for start in (local, content.find(b"PK\x01\x02") + central):
        content[start : start + len(value)] = value
    file.write_bytes(content)
    with pytest.raises(PaceError, match=rf"a\.zip: some/a\.jpg cannot be unpacked: .*{reason}"):
        load_photographs(file, 32)


def test_photographs_that_cannot_be_used_are_named(tmp_path):
    file = packed(tmp_path / "a.zip", {"a.jpg": photograph()[:-300]})
    with pytest.raises(PaceError, match=r"a\.zip: a\.jpg cannot be read as an image"):
        load_photographs(file, 32)
    os.mkfifo(tmp_path / "fifo.zip")
    (tmp_path / "cut.zip").write_bytes(file.read_bytes()[:100])
    for name in ("fifo.zip", "cut.zip", "none.zip"):
        with pytest.raises(PaceError, match=rf"{name} is neither a folder nor a zip file"):
            load_photographs(tmp_path / name)
    with pytest.raises(PaceError, match="path"):
        load_photographs(3)
    (tmp_path / "narrow").mkdir()
    Image.new("L", (1, 1_000_000)).save(tmp_path / "narrow" / "a.png")
    assert load_photographs(tmp_path / "narrow", 32).shape == (1, 3, 32, 32)


def test_some_steps_see_photographs_alone():
    flat = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(1, 3, 64, 64)
    source = RenderedScenes(28, texture_atlas(torch.cat([flat, ramp]), 2))
    assert source.description == "rendered scenes with 4 textures, 25% of steps on 2 photographs"
    drawn = [source.draw(seed, 2, 5) for seed in range(200)]
    sweeps = [d for d in drawn if isinstance(d, Sweeps)]
    assert 30 < len(sweeps) < 70
    again = [source.draw(seed, 2, 5) for seed in range(200)]
    same = [d for d in again if isinstance(d, Sweeps)]
    assert all(torch.equal(a.cameras, b.cameras) for a, b in zip(sweeps, same, strict=True))
    seen = set()
    for sweep in sweeps[:8]:
        assert sweep.cameras.shape == (2, 5, 8) and sweep.texture.max() < 2
        half = sweep.cameras[..., 2].exp()
        assert half.min() > 0.2 and half.max() < 0.6
        images, truth = source.finish(sweep, CPU)
        assert images.shape == (2, 5, 3, 28, 28) and truth is None
        assert images.min() >= 0 and images.max() <= 1
        for texture, clip in zip(sweep.texture.tolist(), images, strict=True):
            seen.add(texture)
            if texture == 0:  # of one colour, wherever one looks
                assert (clip - clip[:1, :, :1, :1]).abs().max() < 1e-5
            else:  # each frame sees something else, neighbours much the same
                steps = (clip[1:] - clip[:-1]).abs().mean((1, 2, 3))
                assert steps.min() > 1e-3 and steps.max() < (clip.amax() - clip.amin())
    assert seen == {0, 1}


def test_a_sweep_sees_what_its_camera_says():
    """One pixel by hand, of a photograph whose colours say where they are."""
    side, size = 64, 28
    at = (torch.arange(side) * 4 + 2).to(torch.uint8)
    photograph = torch.stack(
        [at.expand(side, side), at.view(-1, 1).expand(side, side), torch.zeros(side, side)]
    )
    atlas = texture_atlas(photograph[None].to(torch.uint8), 1)
    centre, half, turn, tilt, shift = (0.45, 0.55), 0.25, 0.3, (0.2, -0.1), (0.2, 0.1)
    camera = torch.tensor([*centre, np.log(half), turn, *tilt, *shift], dtype=torch.float32)
    image = render_sweeps(Sweeps(torch.tensor([0]), camera.view(1, 1, 8)), atlas, size)[0, 0]
    plain = camera.clone()
    plain[6:] = 0
    flat = render_sweeps(Sweeps(torch.tensor([0]), plain.view(1, 1, 8)), atlas, size)[0, 0]
    lit = brightened(photograph[None].to(torch.uint8).float() / 255)[0]
    gain = (lit[0] / (photograph[0] / 255))[5, 40].item()  # the photograph is brightened as a whole
    for row, column in ((3, 20), (14, 9), (25, 25)):
        x, y = (2 * column + 1) / size - 1, (2 * row + 1) / size - 1
        near = half / (1 + tilt[0] * x + tilt[1] * y)
        u = centre[0] + near * (np.cos(turn) * x - np.sin(turn) * y)
        v = centre[1] + near * (np.sin(turn) * x + np.cos(turn) * y)
        assert flat[:2, row, column].tolist() == pytest.approx([u * gain, v * gain], abs=0.02)
        relief = (u + v) * gain / 3 - 0.5
        moved = [(u + shift[0] * relief) * gain, (v + shift[1] * relief) * gain]
        assert image[:2, row, column].tolist() == pytest.approx(moved, abs=0.02)


@pytest.mark.parametrize("make", [lambda: PlainRooms(28), lambda: RenderedScenes(28, texture_atlas(None, 3))])
def test_rendered_rooms_agree_with_their_cameras(make):
    """Unprojected depth of one view, projected into another one of the same scene, mostly meets what is seen there."""
    source = make()
    images, truth = source.finish(source.draw(5, 2, 3), CPU)
    assert images.shape == (2, 3, 3, 28, 28) and truth.valid.all()
    again = source.finish(source.draw(5, 2, 3), CPU)
    assert torch.equal(images, again.images)
    assert not torch.equal(images, source.finish(source.draw(6, 2, 3), CPU).images)
    close = 0.0
    for b in range(2):
        points = unproject(truth.depth[b], truth.intrinsics[b], truth.world_to_camera[b])[0].view(-1, 3)
        pose, matrix = truth.world_to_camera[b, 1], truth.intrinsics[b, 1]
        seen = points @ pose[:, :3].T + pose[:, 3]
        pixel = (seen / seen[:, 2:]) @ matrix.T
        inside = (seen[:, 2] > 0.05) & (pixel[:, :2] > 0).all(1) & (pixel[:, :2] < 28).all(1)
        column, row = pixel[inside, 0].long(), pixel[inside, 1].long()
        error = (seen[inside, 2] / truth.depth[b, 1][row, column] - 1).abs()
        close += (error < 0.1).float().mean().item() / 2
    assert close > 0.3


def test_training_rooms_are_not_the_held_out_ones(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        "pacevggt_patch.mini.sources.render_room", lambda seed, *_: seeds.append(seed) or seed
    )
    for number in range(300):
        PlainRooms(28).draw(number, 2, 3)
    assert len(set(seeds)) > 590 and min(seeds) >= 0 and max(seeds) < 1_000_000


# ---- losses


def outputs(seed: int, batch: int = 2, frames: int = 3, size: int = 6) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    poses = [torch.rand(batch, frames, 9, generator=g) + 0.1 for _ in range(2)]
    depth = torch.rand(batch, 2, size, size, generator=g) + 0.5
    confidence = torch.rand(batch, 2, size, size, generator=g) + 1
    points = torch.randn(batch, 2, size, size, 3, generator=g)
    return Outputs(None, None, poses, (depth, confidence), (points, confidence + 1))


def test_output_losses_by_hand():
    student, teacher = outputs(0), outputs(1)
    target = teacher_target(teacher)
    found = output_losses(student, target)
    depth, points, scales = 0.0, 0.0, []
    for b in range(2):
        weight = teacher.depth[1][b].double() / teacher.depth[1][b].double().mean()
        log = (student.depth[0][b].double() / teacher.depth[0][b].double()).log()
        shift = (weight * log).sum() / weight.sum()
        scales.append(shift.exp())
        depth += (weight * (log - shift).abs()).mean() / 2
        weight = teacher.points[1][b].double() / teacher.points[1][b].double().mean()
        reach = teacher.points[0][b].double().norm(dim=-1)
        reach = reach.clamp(min=reach.mean())
        distance = (student.points[0][b].double() / scales[b] - teacher.points[0][b]).norm(dim=-1)
        points += (weight * distance / reach).mean() / 2
    assert found["depth"] == pytest.approx(depth.item(), rel=1e-5)
    assert found["points"] == pytest.approx(points.item(), rel=1e-5)
    scales = torch.stack(scales)
    assert found["scale"] == pytest.approx(scales.log().abs().mean().item(), rel=1e-4)
    pose = 0.0
    for weight, guess in zip((0.6 / 1.6, 1 / 1.6), student.poses, strict=True):
        translation = (guess[..., :3] / scales[:, None, None] - teacher.poses[-1][..., :3]).abs().mean()
        error = (guess - teacher.poses[-1]).double().abs()
        pose += weight * (5 * translation + 6 * error[..., 3:7].mean() + error[..., 7:].mean())
    assert found["camera"] == pytest.approx(pose.item(), rel=1e-5)
    same = output_losses(teacher, target)
    exact = {name: value for name, value in same.items() if name not in ("camera", "pairs")}
    assert all(value == pytest.approx(0, abs=1e-6) for value in exact.values())
    assert same["pairs"] < 1e-3  # a length has a gradient at 0, and so is not quite 0 there

    pairs = []
    for b in range(2):
        guess, truth = student.poses[-1][b].double().numpy(), teacher.poses[-1][b].double().numpy()
        turns = [Rotation.from_quat(poses[:, 3:7]).as_matrix() for poses in (guess, truth)]
        shifts = [guess[:, :3] / scales[b].item(), truth[:, :3]]
        for i, j in itertools.permutations(range(3), 2):
            # x_j = R_j R_i^T (x_i - t_i) + t_j
            relative = [r[j] @ r[i].T for r in turns]
            moved = [t[j] - r @ t[i] for r, t in zip(relative, shifts, strict=True)]
            far = np.linalg.norm(moved[0] - moved[1]) / (np.linalg.norm(moved[1]) + 0.03)
            pairs.append(far / (far + 0.5) + 0.5 * np.linalg.norm(relative[0] - relative[1]))
    assert found["pairs"] == pytest.approx(np.mean(pairs), rel=1e-3)


def test_scale_is_a_small_loss_of_its_own():
    student, target = outputs(0), teacher_target(outputs(1))
    factor = torch.tensor([2.0, 3.0])
    larger = Outputs(
        None,
        None,
        [torch.cat([p[..., :3] * factor[:, None, None], p[..., 3:]], -1) for p in student.poses],
        (student.depth[0] * factor[:, None, None, None], student.depth[1]),
        (student.points[0] * factor[:, None, None, None, None], student.points[1]),
    )
    before, after = output_losses(student, target), output_losses(larger, target)
    for name in ("camera", "pairs", "depth", "points"):
        assert after[name] == pytest.approx(before[name].item(), rel=1e-4), name
    assert after["scale"] > before["scale"] + 0.3


def test_confidence_loss_by_hand():
    student, teacher = outputs(0), outputs(1)
    expected = sum(
        (a[1].double().log() - b[1].double().log()).abs().mean() / 2
        for a, b in ((student.depth, teacher.depth), (student.points, teacher.points))
    )
    assert confidence_loss(student, teacher) == pytest.approx(expected.item(), rel=1e-5)


def test_heads_that_are_not_there_have_no_loss():
    bare = Outputs(None, None, [], None, None)
    assert teacher_target(bare) == Target(None, None, None)
    assert output_losses(bare, teacher_target(bare)) == {}
    assert confidence_loss(bare, bare) is None
    truth = Truth(*(torch.zeros(1) for _ in range(4)))
    assert truth_target(truth, torch.zeros(1).long(), bare) is None


def test_truth_is_seen_from_the_first_camera_in_the_scale_of_the_teacher():
    clips = [render_room(seed, 3, 28, 28) for seed in (1, 2)]
    truth = Truth(
        *(
            torch.stack([getattr(c, n) for c in clips])
            for n in ("world_to_camera", "intrinsics", "depth", "valid")
        )
    )
    truth.valid[0, 1, :5] = False
    frames = torch.tensor([1, 2])
    depth = truth.depth[:, frames] * torch.tensor([0.5, 2.0])[:, None, None, None]
    poses = [torch.full((2, 3, 9), -1.0)]
    teacher = Outputs(None, None, poses, (depth, depth), (depth[..., None].expand(-1, -1, -1, -1, 3), depth))
    target = truth_target(truth, frames, teacher)
    valid = truth.valid[:, frames]
    assert torch.allclose(target.depth[0][valid], depth[valid], rtol=1e-5)
    assert (target.depth[1][~valid] == 0).all()
    assert torch.allclose(target.depth[1].mean((1, 2, 3)), torch.ones(2))
    extrinsics, intrinsics = decode_pose_encoding(target.pose, 28, 28)
    assert torch.allclose(intrinsics, truth.intrinsics, rtol=1e-4)
    assert torch.allclose(extrinsics[:, 0], torch.eye(3, 4).expand(2, 3, 4), atol=1e-5)
    assert ((target.pose[..., 3:7] * poses[0][..., 3:7]).sum(-1) >= 0).all()
    # Points of a view, in its own camera, have its depth.
    for b in range(2):
        pose = extrinsics[b, 2]
        seen = target.points[0][b, 1].reshape(-1, 3) @ pose[:, :3].T + pose[:, 3]
        assert torch.allclose(seen[:, 2].view(28, 28), depth[b, 1], rtol=1e-3)


def test_relative_error_is_one_for_the_mean():
    wanted = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) + 3
    mean = wanted.flatten(0, 2).mean(0).expand_as(wanted)
    assert relative_error(mean, wanted) == pytest.approx(1.0, rel=1e-5)
    assert relative_error(wanted, wanted) == 0
    assert relative_error(5 * mean, 5 * wanted) == pytest.approx(1.0, rel=1e-5)


def test_distillation_loss_is_the_divergence():
    g = torch.Generator().manual_seed(0)
    logits, attention = torch.randn(2, 3, 7, generator=g), torch.rand(2, 3, 7, generator=g)
    p = attention.double() ** 0.25
    p = p / p.sum(-1, keepdim=True)
    expected = (p * (p.log() - logits.double().log_softmax(-1))).sum(-1).mean()
    assert distillation_loss(logits, attention) == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(0.25 * attention.log() + 3, 5 * attention) == pytest.approx(0, abs=1e-6)
