"""Training of pace weights: sources of clips, losses by hand, steps, runs that go on after a kill, and the command."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hosts import LAYERS, random_images, tiny_vggt
from PIL import Image
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation

import pacevggt_patch
from pacevggt_patch import PaceError, PaceWeights, WeightsError, accelerate
from pacevggt_patch.calibration import full_heads as matching
from pacevggt_patch.cli.main import main, pictures
from pacevggt_patch.clips import save_clip
from pacevggt_patch.evaluation import decode_pose_encoding
from pacevggt_patch.method.block_deltas import BlockAdaptation
from pacevggt_patch.mini.scenes.rooms import render_room
from pacevggt_patch.mini.scenes.sweeps import Sweeps, render_sweeps
from pacevggt_patch.mini.scenes.textures import brightened, texture_atlas
from pacevggt_patch.mini.sources import PlainRooms, RenderedScenes
from pacevggt_patch.patching import install as patch
from pacevggt_patch.runtime import compiling
from pacevggt_patch.training import run as command
from pacevggt_patch.training.fit import RATIOS, Fit, Settings, learning_rate, step_plan
from pacevggt_patch.training.guest import guest
from pacevggt_patch.training.losses import (
    Target,
    confidence_loss,
    distillation_loss,
    output_losses,
    relative_error,
    teacher_target,
    total_loss,
    truth_target,
)
from pacevggt_patch.training.passes import Outputs, run
from pacevggt_patch.training.sources import FolderSource, Truth

CPU = torch.device("cpu")


def write_images(folder, count, size=(56, 42), seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03d}.png")
    return folder


# Sources


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
    ("make", "message"),
    [
        (lambda p: None, "{p}/none is not a folder"),
        (
            lambda p: (p / "none").mkdir(),
            "{p}/none has no images, and no folder with images: nothing to train on",
        ),
        (
            lambda p: write_images(p / "none", 2),
            "{p}/none has 2 frames, but training takes 3 at a time: add frames, or pass fewer with --views",
        ),
    ],
)
def test_folders_that_will_not_do(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(PaceError) as caught:
        FolderSource(tmp_path / "none", 3, 28, "crop")
    assert str(caught.value) == message.format(p=tmp_path)


def test_a_broken_image_is_named(tmp_path):
    folder = write_images(tmp_path, 3)
    (folder / "001.png").write_bytes(b"no picture")
    source = FolderSource(folder, 3, 28, "square")
    with pytest.raises(PaceError, match=r"001\.png cannot be read as an image"):
        source.draw(0, 1, 3)


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
    from pacevggt_patch.evaluation import unproject

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


# Losses


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


# Steps


def test_a_step_has_about_as_many_frames_whatever_the_views():
    settings = Settings(clips=18, views=(2, 4, 8, 24))
    assert [settings.clips_of(views) for views in settings.views] == [18, 9, 4, 1]
    assert Settings(clips=1, views=(3, 8)).clips_of(8) == 1


@pytest.mark.parametrize("rendered", [False, True])
def test_reserved_clips_are_as_many_as_asked_for_and_the_same_in_all_processes(folder, rendered):
    model, weights, source, settings = fitting(folder, clips=2, views=(2, 3))
    if rendered:
        source = RenderedScenes(56, texture_atlas(None, 2, 0, torch.device("cpu")))
    found = []
    with guest(model, weights):
        for rank in range(2):
            fit = Fit(model, weights, source, settings, rank=rank, world=2)
            found.append([sample.images for sample in fit.reserved(-1, 5)])
    assert [images.shape[:2] for images in found[0]] == [(1, 2)] * 3 + [(1, 3)] * 2
    assert all(map(torch.equal, *found))
    if rendered:
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(found[0][:3], 2))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_block_changes_move_by_their_own_rate(folder, rate):
    model, weights, source, settings = fitting(folder, adaptation_rate=rate, distil=0.0, warm_up=1)
    before = {name: p.detach().clone() for name, p in weights.modules().named_parameters()}
    with guest(model, weights):
        fit = Fit(model, weights, source, settings)
        fit.step(fit.draw(0))
    moved = {
        name: (p.detach() - before[name]).abs().max().item()
        for name, p in weights.modules().named_parameters()
    }
    blocks = [value for name, value in moved.items() if name.startswith("adaptation.up")]
    # The first step of AdamW is as long as the learning rate.
    assert max(blocks) == pytest.approx(rate * settings.rate, rel=1e-2)
    assert moved["merge.out.weight"] == pytest.approx(settings.rate, rel=1e-2)


SETTINGS = Settings(
    steps=6, distil=0.34, clips=2, views=(2, 3), dense=2, warm_up=2, calibration=2, checks=2, rate=1e-3
)


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 9)


def fitting(folder, model=None, **changes):
    model = model or tiny_vggt()
    settings = Settings(**{**vars(SETTINGS), **changes})
    weights = PaceWeights.new(model, dense_frames=settings.dense_frames)
    return model, weights, FolderSource(folder, 3, 56, "crop"), settings


def test_the_teacher_is_the_stock_model_and_the_student_the_accelerated_one(folder):
    model, weights, *_ = fitting(folder)
    images, frames = random_images(3, batch=2), torch.tensor([0, 2])
    with torch.no_grad():
        stock = model(images)
        accelerate(model, 0.4, 0.2, weights=weights)
        pruned = model(images)
        pacevggt_patch.remove(model)
        with guest(model, weights):
            teacher, student = run(model, images, frames, 1.0), run(model, images, frames, 0.4, 0.2)
            repeated = run(model, images, frames, 0.4, 0.2, checkpointing=True)
    for expected, found in ((stock, teacher), (pruned, student), (pruned, repeated)):
        assert torch.equal(found.poses[-1], expected["pose_enc"])
        assert torch.allclose(found.depth[0], expected["depth"][:, frames, ..., 0], atol=1e-5)
        assert torch.allclose(found.points[0], expected["world_points"][:, frames], atol=1e-5)
        assert torch.allclose(found.points[1], expected["world_points_conf"][:, frames], atol=1e-5)


@pytest.mark.parametrize("dense_frames", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trained_tensor_gets_a_gradient_and_the_host_none(folder, checkpointing, dense_frames):
    model, weights, source, settings = fitting(folder, dense_frames=dense_frames)
    with torch.no_grad():  # zero-initialised layers would hold gradients back
        for parameter in weights.modules().parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    with guest(model, weights):
        fit = Fit(model, weights, source, settings, checkpointing=checkpointing)
        plan = next(p for p in (step_plan(settings, i) for i in range(50)) if p.merge_budget is None)
        loss, parts = fit.refine_loss(fit.finish(source.draw(0, 2, plan.views)), plan)
        loss.backward()
        assert set(parts) == {"camera", "pairs", "depth", "scale", "points", "confidence", "special", "dense"}
        silent = [name for name, p in fit.modules.named_parameters() if p.grad is None or not p.grad.any()]
        # Only ratios of saliency matter, and without a merge only which tokens are the best.
        unheard = ("scorer.",) if dense_frames else ("scorer.out.bias",)
        assert all(name.startswith(unheard) for name in silent)
        assert all(p.grad is None for p in model.parameters())


def test_compiled_steps_have_the_same_gradients(folder, monkeypatch):
    """Blocks run by the compiled functions, in the teacher as in the student, and dense heads as they are."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    compiled, real = set(), compiling.compiled

    def counted(function, *key):
        compiled.add((function.__module__, torch.is_grad_enabled()))
        return real(function, *key)

    monkeypatch.setattr(patch, "compiled", counted)
    gradients = []
    for compile in (False, True):
        model, weights, source, settings = fitting(folder, dense_frames=True)
        with torch.no_grad():
            for parameter in weights.modules().parameters():
                generator = torch.Generator().manual_seed(parameter.numel())
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        with guest(model, weights, compile):
            fit = Fit(model, weights, source, settings)
            fit.differentiate(*fit.refine_loss(fit.finish(source.draw(0, 1, 3)), step_plan(settings, 3)))
        gradients.append(fit.gradient.clone())
        assert bool(compiled) is compile
    assert compiled == {("pacevggt_patch.hosts.blocks", grad) for grad in (False, True)}
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max())


def test_gradients_lie_in_one_tensor(folder):
    model, weights, source, settings = fitting(folder)
    with guest(model, weights):
        fit = Fit(model, weights, source, settings)
        sample, plan = fit.finish(source.draw(0, 1, 3)), step_plan(settings, 3)
        expected = torch.autograd.grad(
            fit.refine_loss(sample, plan)[0], fit.parameters, materialize_grads=True
        )
        fit.differentiate(*fit.refine_loss(sample, plan))
        for parameter, gradient in zip(fit.parameters, expected, strict=True):
            assert torch.equal(parameter.grad, gradient)
        assert fit.gradient.count_nonzero() == sum(g.count_nonzero() for g in expected) > 0
        fit.gradient.zero_()
        assert not any(parameter.grad.any() for parameter in fit.parameters)


def test_steps_are_of_few_kinds():
    settings = Settings(views=(8, 24), keep_ratios=(0.1, 0.6))
    plans = [step_plan(settings, step) for step in range(2000)]
    ratios = sorted({plan.keep_ratio for plan in plans})
    assert ratios == pytest.approx([0.1 * 6 ** (i / (RATIOS - 1)) for i in range(RATIOS)])
    kinds = {(plan.views, plan.keep_ratio, plan.merge_budget) for plan in plans}
    assert len(kinds) == 2 * 3 * RATIOS
    for ratio in ratios:
        budgets = {plan.merge_budget for plan in plans if plan.keep_ratio == ratio}
        assert budgets == {None, 0.0, (1 - ratio) / 2}


def test_checkpointing_changes_no_gradient(folder):
    gradients = []
    for checkpointing in (False, True):
        model, weights, source, settings = fitting(folder)
        with guest(model, weights):
            fit = Fit(model, weights, source, settings, checkpointing=checkpointing)
            fit.refine_loss(fit.finish(source.draw(0, 1, 3)), step_plan(settings, 3))[0].backward()
            gradients.append({n: p.grad for n, p in fit.modules.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][name], atol=1e-6), name


def test_stage_one_brings_the_scorer_to_the_attention(folder):
    model, weights, source, settings = fitting(folder, steps=60, distil=1.0, rate=5e-3)
    with guest(model, weights):
        fit = Fit(model, weights, source, settings)
        drawn, losses = source.draw(0, 2, 3), []
        for _ in range(60):
            fit.step(drawn)
            losses.append(fit.latest_losses()["distil"])
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("dense_frames", "share"), [(False, 0.7), (True, 0.9)])
def test_stage_two_brings_the_loss_down(folder, dense_frames, share):
    model, weights, source, settings = fitting(
        folder, steps=40, distil=0.0, rate=3e-3, dense_frames=dense_frames
    )
    with guest(model, weights):
        fit = Fit(model, weights, source, settings)
        sample, plan = fit.finish(source.draw(0, 2, 3)), step_plan(settings, 0)
        before = fit.refine_loss(sample, plan)[0].item()
        for _ in range(40):
            fit.optimizer.zero_grad()
            fit.refine_loss(sample, plan)[0].backward()
            fit.optimizer.step()
        assert fit.refine_loss(sample, plan)[0].item() < share * before


def test_plans_are_those_of_the_step_and_stay_within_their_bounds():
    plans = [step_plan(SETTINGS, step) for step in range(300)]
    assert plans == [step_plan(SETTINGS, step) for step in range(300)]
    ratios = [plan.keep_ratio for plan in plans]
    assert 0.1 <= min(ratios) < 0.12 and 0.55 < max(ratios) <= 0.6
    merged = [plan for plan in plans if plan.merge_budget is None]
    assert 0.65 < len(merged) / 300 < 0.85
    assert all(0 <= p.merge_budget <= 1 - p.keep_ratio for p in plans if p.merge_budget is not None)
    assert {plan.views for plan in plans} == {2, 3}
    assert all(len(set(p.frames)) == min(2, p.views) and max(p.frames) < p.views for p in plans)


def test_the_learning_rate_rises_and_falls_in_each_stage():
    settings = Settings(steps=100, distil=0.2, warm_up=4, rate=1.0)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == 0.25 and rates[20] == 0.25
    assert rates[3] > 0.9 and rates[19] < 0.02 and rates[23] > 0.9 and rates[99] < 0.01
    assert rates[4:20] == sorted(rates[4:20], reverse=True)
    assert rates[24:] == sorted(rates[24:], reverse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=-1), "steps must not be negative and distil a share between 0 and 1, got -1 and 0.1"),
        (dict(distil=2), "steps must not be negative and distil a share between 0 and 1, got 4000 and 2"),
        (dict(clips=0), "clips, dense and views must be at least 1, got 0, 4 and [8]"),
        (dict(views=()), "clips, dense and views must be at least 1, got 1, 4 and []"),
        (dict(checks=0), "calibration and checks must be at least 1 clip, got 8 and 0"),
        (
            dict(keep_ratios=(0.5, 0.2)),
            "keep ratios of training must lie between 0 and 1, low to high, got 0.5 to 0.2",
        ),
        (dict(truth=-1), "truth is a share between 0 and 1, got -1"),
        (
            dict(dense_frames=True, scorer_rate=0.5),
            "with dense frames the second stage has no gradient for the scorer: leave --scorer-rate at 0",
        ),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(PaceError) as caught:
        Settings(**changes)
    assert str(caught.value) == message


def test_total_loss_blends_truth_in(folder):
    model, weights, *_ = fitting(folder)
    images, frames = random_images(3), torch.tensor([0, 1])
    with guest(model, weights), torch.no_grad():
        teacher, student = run(model, images, frames, 1.0), run(model, images, frames, 0.3)
    truth = teacher_target(outputs(0, batch=1, frames=3))._replace(depth=None, points=None)
    plain, parts = total_loss(student, teacher, None, 0.5, LAYERS)
    _, blended = total_loss(student, teacher, Target(truth.pose, *teacher_target(teacher)[1:]), 0.25, LAYERS)
    true = output_losses(student, Target(truth.pose, *teacher_target(teacher)[1:]))["camera"]
    assert blended["camera"] == pytest.approx((0.75 * parts["camera"] + 0.25 * true).item(), rel=1e-5)
    assert blended["depth"] == pytest.approx(parts["depth"].item(), rel=1e-5)
    weights = dict(camera=1, pairs=1, depth=1, points=0.5, confidence=0.05, special=0.5, dense=0.5)
    weights["scale"] = 0.1
    expected = sum(parts[name].item() * weight for name, weight in weights.items())
    assert plain.item() == pytest.approx(expected, rel=1e-5)


# Runs


@pytest.fixture
def tiny(monkeypatch):
    """`pacevggt train` trains a tiny model, quickly."""
    monkeypatch.setattr(command, "load_backbone", lambda _: tiny_vggt())
    monkeypatch.setattr(command, "LOG_EVERY", 2)


def options(folder, out, **changes):
    return command.Options(out=out, images=folder, width=56, settings=SETTINGS, save_every=0, **changes)


def test_a_run_writes_weights_report_and_curve(tiny, folder, tmp_path):
    state, before = torch.get_rng_state(), tiny_vggt().state_dict()
    report = command.run_training(options(folder, tmp_path / "out"))
    assert torch.equal(torch.get_rng_state(), state)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "calibrated.safetensors", "curve.png", "distilled.safetensors", "pace.safetensors", "report.json", "state.pt",
    ]  # fmt: skip
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert [c["stage"] for c in report["checks"]] == ["training-free", "calibrated", "distilled", "refined"]
    assert [c["step"] for c in report["checks"]] == [0, 0, 2, 6]
    assert set(report["checks"][0]["ratios"]) == {"0.5", "0.3", "0.15"}
    assert (report["steps"], report["images"]) == (6, "1 clip of 9 images")
    model = tiny_vggt()
    accelerate(model, 0.3, weights=out / "pace.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    weights = PaceWeights.load(out / "pace.safetensors")
    assert weights.keep_ratios == (0.1, 0.6) and weights.training["steps"] == 6
    stages = [load_file(out / f"{name}.safetensors") for name in ("calibrated", "distilled", "pace")]
    linear, scorer, merge = "restoration.linear.0.weight", "scorer.out.weight", "merge.out.weight"
    assert [bool(s[linear].any()) for s in stages] == [True, True, True]
    assert [bool(s[scorer].any()) for s in stages] == [False, True, True]
    assert [bool(s[merge].any()) for s in stages] == [False, False, True]
    assert (out / "curve.png").stat().st_size > 5000
    assert "distilled" in command.format_checks(report["checks"])


def test_weights_for_dense_frames(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(matching, "LEAST_ERROR", 0.0)
    settings = Settings(**{**vars(SETTINGS), "dense_frames": True})
    report = command.run_training(command.Options(out=tmp_path, images=folder, width=56, settings=settings))
    assert [(c["stage"], c["step"]) for c in report["checks"]] == [
        ("training-free", 0), ("calibrated", 0), ("distilled", 2), ("refined", 6),
    ]  # fmt: skip
    found = [
        PaceWeights.load(tmp_path / f"{name}.safetensors") for name in ("calibrated", "distilled", "pace")
    ]
    calibrated, _, weights = found
    assert not any(up.any() for up in calibrated.adaptation.up.values())
    assert weights.dense_frames and weights.training["settings"]["dense_frames"]
    assert any(up.any() for up in weights.adaptation.up.values())
    assert len(weights.matching) == 1 and len({w.matching for w in found}) == 1
    assert report["matching_heads"] == [list(weights.matching[0])]
    free, after = (c["ratios"]["0.3"]["tokens"] for c in report["checks"][:2])
    assert after < free
    accelerate(tiny_vggt(), 0.3, weights=weights, dense_frames=True)


def test_dense_frames_calibrated_alone(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(matching, "LEAST_ERROR", 0.0)
    settings = Settings(steps=0, dense_frames=True, calibration=2, checks=1)
    report = command.run_training(command.Options(out=tmp_path, images=folder, width=56, settings=settings))
    assert [c["stage"] for c in report["checks"]] == ["training-free", "calibrated"]
    weights = PaceWeights.load(tmp_path / "pace.safetensors")
    assert len(weights.matching) == 1 and weights.keep_ratios == (0.5, 0.3, 0.15)


def test_dense_frames_go_on_with_their_heads(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(matching, "LEAST_ERROR", 0.0)
    settings = Settings(**{**vars(SETTINGS), "dense_frames": True})
    run = command.Options(out=tmp_path / "whole", images=folder, width=56, settings=settings)
    whole = command.run_training(run)
    step = Fit.step

    def dies(self, drawn):
        if self.step_number == 4:
            raise KeyboardInterrupt
        step(self, drawn)

    monkeypatch.setattr(Fit, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        command.run_training(replace(run, out=tmp_path / "killed", save_every=0))
    monkeypatch.setattr(Fit, "step", step)
    monkeypatch.setattr(matching, "LEAST_ERROR", 1e9)  # it must not look again
    resumed = command.run_training(replace(run, out=tmp_path / "killed", resume=True))
    assert resumed["matching_heads"] == whole["matching_heads"] != []
    first, second = (load_file(tmp_path / name / "pace.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("dense_frames", [False, True])
def test_a_run_may_start_from_weights(tiny, folder, tmp_path, dense_frames):
    first = Settings(**{**vars(SETTINGS), "dense_frames": dense_frames})
    command.run_training(
        command.Options(out=tmp_path / "first", images=folder, width=56, settings=first, save_every=0)
    )
    start = str(tmp_path / "first" / "pace.safetensors")
    settings = Settings(**{**vars(first), "distil": 0.0, "steps": 4, "seed": 1})
    more = command.Options(out=tmp_path / "more", images=folder, width=56, settings=settings, start=start)
    report = command.run_training(more)
    assert [(c["stage"], c["step"]) for c in report["checks"]] == [("start", 0), ("refined", 4)]
    assert report["start"] == start
    assert sorted(p.suffix for p in more.out.iterdir()) == [".json", ".png", ".pt", ".safetensors"]
    before, after = (load_file(tmp_path / name / "pace.safetensors") for name in ("first", "more"))
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == ({"adaptation"} if dense_frames else {"adaptation", "merge", "restoration"})
    assert PaceWeights.load(more.out / "pace.safetensors").training["start"] == start
    for wrong, message in (
        (
            replace(more, out=tmp_path, settings=Settings(dense_frames=dense_frames)),
            "the first stage, 400 steps, would undo what the weights to start from have learned: leave out "
            "--distil, or pass 0",
        ),
        (
            replace(more, resume=False),
            f"{more.out} holds an earlier run: pass --resume to go on with it, or another --out",
        ),
        (
            replace(more, start=None, resume=True),
            f"can't resume: the run began with {start}: pass the same --start, or start anew with another --out",
        ),
    ):
        with pytest.raises(PaceError) as error:
            command.run_training(wrong)
        assert str(error.value) == message
    assert command.run_training(replace(more, resume=True))["steps"] == 4
    other = Settings(**{**vars(settings), "dense_frames": not dense_frames})
    with pytest.raises(WeightsError, match=f"were trained for dense_frames={dense_frames}"):
        command.run_training(replace(more, out=tmp_path, settings=other))


def test_weights_that_nothing_can_start_from(tiny, folder, tmp_path):
    weights = PaceWeights.new(tiny_vggt())
    weights.adaptation = BlockAdaptation({})
    weights.save(tmp_path / "old.safetensors")
    old = command.Options(tmp_path, images=folder, start=str(tmp_path / "old.safetensors"))
    for steps, message in (
        (
            0,
            "weights to start from are trained on, not calibrated anew: leave out --start or --calibrate",
        ),
        (
            4,
            f"{old.start} is of an older version and has no block changes to train: start without it",
        ),
    ):
        with pytest.raises(PaceError) as error:
            command.run_training(replace(old, settings=Settings(steps=steps, distil=0.0)))
        assert str(error.value) == message


def test_a_run_goes_on_with_the_strength_that_it_began_with(tiny, folder, tmp_path):
    weights = PaceWeights.new(tiny_vggt())
    weights.adaptation = BlockAdaptation(weights.adaptation.shapes(), rank=4, full_strength=0.5)
    weights.library_version = "0.0.1"
    weights.save(tmp_path / "start.safetensors")
    settings = Settings(**{**vars(SETTINGS), "distil": 0.0, "steps": 2})
    start = str(tmp_path / "start.safetensors")
    one = command.Options(tmp_path / "out", images=folder, width=56, settings=settings, start=start)
    for options_ in (one, replace(one, resume=True)):
        command.run_training(options_)
        written = PaceWeights.load(tmp_path / "out" / "pace.safetensors")
        assert (written.adaptation.rank, written.adaptation.full_strength) == (4, 0.5)
        assert written.library_version == pacevggt_patch.__version__


@pytest.mark.parametrize("scorer_rate", [0.0, 0.5])
def test_stage_two_leaves_the_scorer_alone_unless_it_is_told(tiny, folder, tmp_path, scorer_rate):
    settings = Settings(**{**vars(SETTINGS), "scorer_rate": scorer_rate})
    command.run_training(command.Options(out=tmp_path, images=folder, width=56, settings=settings))
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("distilled", "pace"))
    same = [torch.equal(value, after[name]) for name, value in before.items() if name.startswith("scorer")]
    assert all(same) if scorer_rate == 0 else not any(same)


@pytest.mark.parametrize("dies_at", [1, 2, 4])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny, folder, tmp_path, monkeypatch, dies_at):
    whole = command.run_training(options(folder, tmp_path / "whole"))
    step = Fit.step

    def dies(self, *args):
        if self.step_number == dies_at:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Fit, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        command.run_training(options(folder, tmp_path / "killed"))
    monkeypatch.setattr(Fit, "step", step)
    resumed = command.run_training(options(folder, tmp_path / "killed", resume=True))
    first, second = (load_file(tmp_path / name / "pace.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert resumed["checks"] == whole["checks"] and resumed["losses"] == whole["losses"]
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "killed")]
    for one, other in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
        assert torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])


def test_a_state_from_before_dense_frames_goes_on(folder):
    model, weights, source, settings = fitting(folder)
    with guest(model, weights):
        fit = Fit(model, weights, source, settings)
        state = fit.state()
        assert not state["settings"].pop("dense_frames")
        fit.load(state)
        state["settings"]["dense_frames"] = True
        with pytest.raises(PaceError, match=r"the run was started with other settings \(dense_frames\)"):
            fit.load(state)


def test_a_finished_run_is_not_trained_on(tiny, folder, tmp_path):
    command.run_training(options(folder, tmp_path))
    before = load_file(tmp_path / "pace.safetensors")
    report = command.run_training(options(folder, tmp_path, resume=True))
    assert report["steps"] == 6 and len(report["checks"]) == 4
    after = load_file(tmp_path / "pace.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_run_of_the_first_stage_alone(tiny, folder, tmp_path):
    settings = Settings(**{**vars(SETTINGS), "distil": 1.0})
    report = command.run_training(
        command.Options(out=tmp_path, images=folder, width=56, settings=settings, save_every=0)
    )
    assert [(c["stage"], c["step"]) for c in report["checks"]] == [
        ("training-free", 0),
        ("calibrated", 0),
        ("distilled", 6),
    ]
    weights = load_file(tmp_path / "pace.safetensors")
    assert weights["scorer.out.weight"].any() and not weights["merge.out.weight"].any()


def test_another_run_cannot_be_resumed(tiny, folder, tmp_path, monkeypatch):
    command.run_training(options(folder, tmp_path))
    other = Settings(**{**vars(SETTINGS), "seed": 3})
    with pytest.raises(PaceError) as caught:
        command.run_training(
            command.Options(out=tmp_path, images=folder, width=56, settings=other, resume=True)
        )
    assert str(caught.value) == (
        "can't resume: the run was started with other settings (seed): pass the same, or start anew with another --out"
    )
    monkeypatch.setattr(command, "load_backbone", lambda _: tiny_vggt(seed=1))
    with pytest.raises(PaceError, match=r"started with other settings \(backbone\)"):
        command.run_training(options(folder, tmp_path, resume=True))
    (tmp_path / "state.pt").write_bytes(b"torn")
    with pytest.raises(PaceError, match=r"state\.pt is damaged: start anew with another --out$"):
        command.run_training(options(folder, tmp_path, resume=True))


def test_a_loss_that_is_no_number_ends_the_run(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Fit, "latest_losses", lambda _: {"total": float("nan")})
    with pytest.raises(PaceError, match=r"the loss is nan at step 2: start anew with a smaller --rate$"):
        command.run_training(options(folder, tmp_path))


@pytest.mark.parametrize(("losses", "panels"), [([], 2), ([{"step": 1, "total": 2.0, "depth": 1.0}], 3)])
def test_the_curve_of_a_calibration_has_no_empty_panel(losses, panels, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, _: drawn.append(figure))
    checks = [{"stage": "calibrated", "step": 0, "ratios": {"0.3": {"rotation_deg": 1.0, "depth": 0.1}}}]
    pictures.save_training_curve(tmp_path / "curve.png", losses, checks)
    assert len(drawn[0].axes) == panels and all(axis.lines for axis in drawn[0].axes)


def test_the_command_line(tiny, folder, tmp_path, capsys):
    arguments = [
        "--images",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--views",
        "2",
        "3",
        "--width",
        "56",
    ]
    assert main(["train", *arguments, "--steps", "2", "--distil", "0.5", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "Difference from the unpruned model" in shown.out
    for said in ("training-free: comparing 4 clips", "calibrating on 8 clips", "refined: comparing 4 clips"):
        assert said in shown.out, said
    assert "wrote " in shown.out and "pace.safetensors" in shown.out
    assert main(["train", *arguments, "--calibrate", "--out", str(tmp_path / "fit"), "--device", "cpu"]) == 0
    weights = PaceWeights.load(tmp_path / "fit" / "pace.safetensors")
    assert weights.restoration.linear[0].weight.any() and not weights.merge.out.weight.any()
    assert weights.keep_ratios == (0.5, 0.3, 0.15)
    assert [c["stage"] for c in weights.training["checks"]] == ["training-free", "calibrated"]
    start = ["--start", str(tmp_path / "fit" / "pace.safetensors"), "--out", str(tmp_path / "more")]
    assert main(["train", *arguments, *start, "--steps", "20", "--device", "cpu"]) == 0
    assert "calibrating" not in capsys.readouterr().out.split("wrote ")[-2]
    training = PaceWeights.load(tmp_path / "more" / "pace.safetensors").training
    assert training["settings"]["distil"] == 0 and training["checks"][-1]["stage"] == "refined"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "training needs images: pass --images DIR, or --rooms for rendered ones"),
        (
            ["--images", "none", "--rooms"],
            "training takes its frames from one place: pass --images or --rooms, not both",
        ),
        (["--images", "none"], "none is not a folder"),
        (
            ["--images", ".", "--textures", "none"],
            "--textures are photographs for rendered scenes of all kinds",
        ),
        (
            ["--rooms", "plain", "--textures", "none"],
            "--textures are photographs for rendered scenes of all kinds",
        ),
        (
            ["--rooms", "plain", "--steps", "-1"],
            "steps must not be negative and distil a share between 0 and 1",
        ),
        (["--rooms", "plain", "--device", "warp"], "device 'warp' can't be used"),
    ],
)
def test_what_the_command_line_refuses(tiny, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"pacevggt: {message}")


def test_a_large_model_wants_a_gpu(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "LARGE", 32)
    monkeypatch.setattr(command, "load_backbone", lambda _: tiny_vggt())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = ["--out", str(tmp_path / "out"), "--views", "2", "--width", "56", "--images", str(folder)]
    assert main(["train", *out]) == 2
    assert capsys.readouterr().err == (
        "pacevggt: there is no CUDA device, and training for a model of this size would take weeks on the CPU: run it "
        "where there is a GPU, pass --calibrate, which takes minutes, or --device cpu to insist\n"
    )
    assert main(["train", *out, "--calibrate"]) == 0
    out[1] += "-2"
    assert main(["train", *out, "--steps", "2", "--device", "cpu", "--resume"]) == 0
    assert f"{out[1]} holds no run to resume: starting anew\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["no-such-file.pt", "a/b/c", "mine"])
def test_a_backbone_that_is_nothing(name):
    from pacevggt_patch.training.backbones import load_backbone

    with pytest.raises(PaceError) as caught:
        load_backbone(name)
    assert str(caught.value) == (
        f'backbone must be "mini", a checkpoint file or a Hub id "user/repo", and {name!r} is neither'
    )


def test_backbones_are_loaded_by_name_and_file(tmp_path):
    from pacevggt_patch.mini import MiniConfig, build_mini, save_mini
    from pacevggt_patch.training.backbones import load_backbone

    config = MiniConfig(28, 14, 32, 2, 1, 4, (0, 1, 2, 3), 1, 2, 8, (8, 8, 8, 8))
    save_mini(build_mini(False, config), tmp_path / "own.safetensors")
    assert load_backbone(str(tmp_path / "own.safetensors")).mini_config == config
    assert load_backbone("mini").mini_config.embed_dim > 100
    (tmp_path / "torn.pt").write_bytes(b"torn")


def test_two_processes_step_like_one_with_both_gradients(folder, tmp_path):
    script = """
import sys, torch, torch.distributed as dist
from test_training import fitting, Fit, guest
torch.set_num_threads(1)
dist.init_process_group("gloo")
model, weights, source, settings = fitting(sys.argv[1], clips=1, distil=0.0)
with guest(model, weights):
    fit = Fit(model, weights, source, settings, rank=dist.get_rank(), world=2)
    for step in range(2):
        fit.step(fit.draw(step))
torch.save(fit.modules.state_dict(), f"{sys.argv[2]}/{dist.get_rank()}.pt")
from pacevggt_patch.calibration import full_heads as matching
matching.LEAST_ERROR = 0.0 if dist.get_rank() == 0 else 1e9  # the first process decides
model, weights, source, settings = fitting(sys.argv[1], dense_frames=True)
with guest(model, weights):
    Fit(model, weights, source, settings, rank=dist.get_rank(), world=2).calibrate()
assert len(weights.matching) == 1, weights.matching
dist.destroy_process_group()
"""
    tests = os.path.dirname(__file__)
    path = os.pathsep.join([tests, os.path.dirname(tests), *filter(None, sys.path)])
    common = {**os.environ, "PYTHONPATH": path, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(26000 + os.getpid() % 3000), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder), str(tmp_path)], env={**common, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    model, weights, source, settings = fitting(folder, clips=1, distil=0.0)
    with guest(model, weights):
        fit = Fit(model, weights, source, settings)
        ranks = [Fit(model, weights, source, settings, rank=rank) for rank in range(2)]
        for step in range(2):
            gradients = []
            for one in ranks:
                fit.optimizer.zero_grad()
                fit.refine_loss(fit.finish(one.draw(step)), step_plan(settings, step))[0].backward()
                gradients.append(
                    [None if p.grad is None else p.grad.clone() for p in fit.modules.parameters()]
                )
            for p, a, b in zip(fit.modules.parameters(), *gradients, strict=True):
                p.grad = None if a is None else (a + b) / 2
            torch.nn.utils.clip_grad_norm_(fit.modules.parameters(), 1.0)
            fit.set_rates()
            fit.optimizer.step()
            fit.step_number += 1
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in fit.modules.state_dict().items():
        assert torch.equal(results[0][name], results[1][name])
        assert F.l1_loss(results[0][name], value) < 1e-5, name
