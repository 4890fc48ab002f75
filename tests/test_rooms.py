"""The room renderer against a brute-force ray caster in float64, and its promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pacevggt_patch.errors import ClipError
from pacevggt_patch.evaluation import unproject
from pacevggt_patch.mini.scenes.geometry import cross_cube
from pacevggt_patch.mini.scenes.rooms import (
    Scene,
    Solids,
    cast_rays,
    render_room,
    sample_cameras,
    sample_scene,
    value_noise,
)

torch.set_num_threads(1)


def scene_and_cameras(seed: int, frames: int):
    """What `render_room(seed, frames)` renders."""
    generator = torch.Generator().manual_seed(seed)
    scene = sample_scene(generator)
    return scene, sample_cameras(scene, frames, generator)


# A second ray caster: one ray and one face at a time, in float64 and world coordinates, with planes and
# quadratic forms where the renderer maps solids to the unit cube and sphere.


def box_faces(solids: Solids, index: int):
    """The faces of a box: a point on it, its outward normal, and whether its axis looks along + or -."""
    centre = solids.centre[index].double().numpy()
    axes = solids.rotation[index].double().numpy()
    half = solids.half_size[index].double().numpy()
    for axis in range(3):
        for sign in (-1, 1):
            normal = sign * axes[:, axis]
            yield axis, sign, centre + half[axis] * normal, normal


def in_box(point: np.ndarray, solids: Solids, index: int, skip: int) -> bool:
    """Whether a point lies between the faces of the box, but for those of axis `skip`."""
    local = solids.rotation[index].double().numpy().T @ (point - solids.centre[index].double().numpy())
    half = solids.half_size[index].double().numpy()
    return all(abs(local[axis]) <= half[axis] for axis in range(3) if axis != skip)


def reference_hit(scene: Scene, origin: np.ndarray, direction: np.ndarray):
    """Nearest (distance, surface, solids, index, normal) along one ray."""
    room = Solids(torch.zeros(1, 3), torch.eye(3)[None], scene.room[None])
    best = (math.inf, -1, room, 0, np.zeros(3))
    for axis, sign, on_face, normal in box_faces(room, 0):
        along = direction @ normal
        if along > 0:  # from within, a ray leaves through the faces it runs towards
            distance = (on_face - origin) @ normal / along
            if distance < best[0]:
                best = (distance, 2 * axis + (sign > 0), room, 0, -normal)
    for index in range(len(scene.boxes.centre)):
        for axis, _, on_face, normal in box_faces(scene.boxes, index):
            along = direction @ normal
            if along < 0:
                distance = (on_face - origin) @ normal / along
                hit = origin + distance * direction
                if 0 < distance < best[0] and in_box(hit, scene.boxes, index, skip=axis):
                    best = (distance, 6 + index, scene.boxes, index, normal)
    for index in range(len(scene.ellipsoids.centre)):
        rotation = scene.ellipsoids.rotation[index].double().numpy()
        half = scene.ellipsoids.half_size[index].double().numpy()
        form = rotation @ np.diag(half**-2.0) @ rotation.T
        offset = origin - scene.ellipsoids.centre[index].double().numpy()
        roots = np.roots(
            [direction @ form @ direction, 2 * offset @ form @ direction, offset @ form @ offset - 1]
        )
        if np.isreal(roots).all() and 0 < roots.real.min() < best[0]:
            distance = roots.real.min()
            normal = form @ (offset + distance * direction)
            surface = 6 + len(scene.boxes.centre) + index
            best = (distance, surface, scene.ellipsoids, index, normal / np.linalg.norm(normal))
    return best


def reference_noise(lattice: np.ndarray, point: np.ndarray) -> float:
    """Value noise by its eight corners; x runs along the last dimension of the lattice."""
    cell, total = np.floor(point).astype(int), 0.0
    smooth = (point - cell) ** 2 * (3 - 2 * (point - cell))
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod([smooth[axis] if corner[axis] else 1 - smooth[axis] for axis in range(3)])
        x, y, z = (cell + corner) % len(lattice)
        total += weight * lattice[z, y, x]
    return total


def reference_colour(scene: Scene, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """RGB light along one ray, before exposure."""
    distance, surface, solids, index, normal = reference_hit(scene, origin, direction)
    world = origin + distance * direction
    point = solids.rotation[index].double().numpy().T @ (world - solids.centre[index].double().numpy())
    texture = {name: value[surface].double().numpy() for name, value in vars(scene.textures).items()}
    noise = 0.5
    for octave in range(2):
        position = texture["noise_origin"] + point * texture["noise_frequency"][octave]
        noise += 2 * texture["noise_weight"][octave] * (reference_noise(scene.noise.numpy(), position) - 0.5)
    checker = np.floor(point * texture["checker_frequency"] + 0.37).sum() % 2
    stripe = 0.5 + 0.5 * np.tanh(3 * np.sin(texture["stripe_wave"] @ point))
    pattern = np.clip(texture["checker_weight"] * checker + texture["stripe_weight"] * stripe, 0, 1)
    noise = np.clip(noise, 0, 1)
    ground, noisy, patterned = texture["colours"]
    colour = (1 - pattern) * ((1 - noise) * ground + noise * noisy) + pattern * patterned
    to_light = scene.light.double().numpy() - world
    facing = max(normal @ to_light / np.linalg.norm(to_light), 0)
    ambient = scene.ambient.item()
    return colour * (ambient + (1 - ambient) * facing)


@pytest.mark.parametrize("seed", [1, 5])
def test_depth_and_colour_agree_with_a_brute_force_ray_caster(seed):
    height, width, frames = 70, 98, 3
    clip = render_room(seed, frames, height, width)
    scene, cameras = scene_and_cameras(seed, frames)
    random = np.random.default_rng(seed)
    depth_error, colour_error = [], []
    for frame in range(frames):
        rotation, translation = (
            clip.world_to_camera[frame].double().numpy()[:, :3],
            clip.world_to_camera[frame, :, 3],
        )
        origin = -rotation.T @ translation.double().numpy()
        focal = clip.intrinsics[frame, 0, 0].item()
        for _ in range(60):
            row, column = random.integers(height), random.integers(width)
            ray = np.array([(column + 0.5 - width / 2) / focal, (row + 0.5 - height / 2) / focal, 1.0])
            direction = rotation.T @ ray
            depth = reference_hit(scene, origin, direction)[0]
            depth_error.append(abs(clip.depth[frame, row, column].item() / depth - 1))
            colour = reference_colour(scene, origin, direction) * cameras.exposure[frame].item()
            colour_error.append(np.abs(clip.images[frame, :, row, column].numpy() - colour.clip(0, 1)).max())
    # A pixel whose ray grazes an edge may fall to either side in float32.
    assert np.mean(np.array(depth_error) < 1e-5) > 0.99
    assert np.mean(np.array(colour_error) < 2e-3) > 0.98
    assert np.median(colour_error) < 1e-5


def test_every_visible_point_lies_on_a_surface_that_the_other_cameras_meet():
    clip = render_room(3, 4, 56, 56)
    scene, cameras = scene_and_cameras(3, 4)
    points = unproject(clip.depth, clip.intrinsics, clip.world_to_camera).view(4, -1, 3)
    aside = 1e-5 * torch.cat([torch.eye(3), -torch.eye(3)])
    for seen_from in range(4):
        centre = cameras.centre[seen_from]
        for frame in range(4):
            distance = cast_rays(scene, centre, (points[frame] - centre).T).distance
            assert frame != seen_from or (distance > 1 - 1e-4).float().mean() > 0.99
            for step in aside:  # next to an edge a ray may pass by in float32, on some processors
                distance = distance.minimum(
                    cast_rays(scene, centre, (points[frame] + step - centre).T).distance
                )
            # A ray towards a point of a surface ends there (1), or before it at what is in front.
            assert distance.max() < 1 + 1e-4


def carried_error(clip, poses, first, second):
    """Relative difference between depth carried from frame `first` to `second` and what stands there."""
    points = unproject(clip.depth, clip.intrinsics, poses)[first].view(-1, 3)
    seen = points @ poses[second, :, :3].T + poses[second, :, 3]
    pixel = seen @ clip.intrinsics[second].T
    column, row = (pixel[:, 0] / pixel[:, 2]).floor().long(), (pixel[:, 1] / pixel[:, 2]).floor().long()
    inside = (seen[:, 2] > 0) & (column >= 0) & (column < clip.width) & (row >= 0) & (row < clip.height)
    return (seen[inside, 2] / clip.depth[second, row[inside], column[inside]] - 1).abs()


def test_depth_carried_from_frame_to_frame_agrees():
    clip = render_room(22, 4)
    inverted = clip.world_to_camera.clone()
    inverted[:, :, :3] = inverted[:, :, :3].transpose(1, 2)
    for first in range(4):
        for second in range(4):
            assert carried_error(clip, clip.world_to_camera, first, second).median() < 0.01
            if first != second:
                wrong = carried_error(clip, inverted, first, second)
                assert len(wrong) == 0 or wrong.median() > 0.05


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**62),
    frames=st.integers(1, 3),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
)
def test_any_room_is_a_sound_clip(seed, frames, height, width):
    clip = render_room(seed, frames, height, width)
    assert clip.name == f"room-{seed}"
    assert clip.images.shape == (frames, 3, height, width)
    assert clip.images.min() >= 0
    assert clip.images.max() <= 1
    assert clip.valid.all()
    scene, cameras = scene_and_cameras(seed, frames)
    assert (cameras.centre.abs() <= scene.room - 0.199).all()
    rotation = clip.world_to_camera[:, :, :3]
    torch.testing.assert_close(
        rotation @ rotation.transpose(1, 2), torch.eye(3).expand_as(rotation), atol=1e-5, rtol=0
    )
    assert (torch.linalg.det(rotation) > 0).all()
    # Nothing is farther than the opposite corner of the room.
    assert clip.depth.max() <= 2 * scene.room.norm()
    field_of_view = 2 * math.degrees(math.atan(width / 2 / clip.intrinsics[0, 0, 0].item()))
    assert 45 <= field_of_view <= 75.001
    assert clip.intrinsics[0, :2, 2].tolist() == [width / 2, height / 2]


def test_a_seed_gives_the_same_clip_every_time_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = render_room(11, 2, 28, 42)
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(4)
    second = render_room(11, 2, 28, 42)
    for field in ("images", "depth", "world_to_camera", "intrinsics"):
        assert torch.equal(getattr(first, field), getattr(second, field))
    assert not torch.equal(first.images, render_room(12, 2, 28, 42).images)


def test_more_frames_show_the_same_room():
    few, many = scene_and_cameras(2, 2)[0], scene_and_cameras(2, 9)[0]
    assert torch.equal(few.textures.colours, many.textures.colours)
    assert torch.equal(few.boxes.centre, many.boxes.centre)


def test_cameras_keep_clear_of_the_furniture():
    clearances = []
    for seed in range(20):
        scene, cameras = scene_and_cameras(seed, 8)
        directions = torch.nn.functional.normalize(
            torch.randn(3, 500, generator=torch.Generator().manual_seed(0)), dim=0
        )
        clearances += [cast_rays(scene, centre, directions).distance.min() for centre in cameras.centre]
    # Walls may be as near as 20 cm, objects 22; only a room crammed full has no better place.
    assert np.mean(np.array(clearances) > 0.199) > 0.98


def test_size_below_one_is_refused():
    with pytest.raises(ClipError) as caught:
        render_room(0, frames=0)
    assert str(caught.value) == "frames must be at least 1, got 0"
    with pytest.raises(ClipError) as caught:
        render_room(0, height=-1)
    assert str(caught.value) == "height must be at least 1, got -1"


def test_rays_along_a_face_are_finite():
    starts = torch.tensor([0.0, 0.0, 1.0])
    directions = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    leave = cross_cube(list(zip(starts, directions, strict=True)))[1]
    assert leave.isfinite().all()


def test_value_noise_passes_through_the_lattice_and_repeats():
    lattice = torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(0))
    corners = torch.tensor([[1.0, 7.0, -1.0], [2.0, 0.0, 9.0], [3.0, 5.0, 16.0]])  # [3 (x y z), 3 points]
    expected = torch.stack([lattice[3, 2, 1], lattice[5, 0, 7], lattice[0, 1, 7]])
    torch.testing.assert_close(value_noise(lattice, corners), expected)
    anywhere = 20 * torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        value_noise(lattice, anywhere), value_noise(lattice, anywhere + 8), atol=1e-4, rtol=0
    )
