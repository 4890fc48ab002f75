"""The renderer of training scenes: against the room renderer, by carrying depth, by its textures and its seeds."""

from __future__ import annotations

import zipfile
from dataclasses import replace

import pytest
import torch
from PIL import Image

from pacevggt_patch.errors import ClipError
from pacevggt_patch.mini.scenes import layout, rooms, training_scenes
from pacevggt_patch.mini.scenes.layout import FACADE, FURNISHED, PLAIN, SOLIDS
from pacevggt_patch.mini.scenes.raycast import FrameScenes, render_frames
from pacevggt_patch.mini.scenes.textures import (
    TextureAtlas,
    build_atlas,
    load_photographs,
    procedural_squares,
    sample_texture,
    texture_atlas,
)
from pacevggt_patch.mini.scenes.training_scenes import SceneBatch, sample_scenes

torch.set_num_threads(1)

SIZE = 56


def plain_atlas(*greys: float) -> TextureAtlas:
    """Textures of one grey each."""
    return build_atlas(torch.tensor(greys)[:, None, None, None].expand(-1, 3, 8, 8), 0)


def from_room(seed: int, frames: int) -> tuple[rooms.Scene, rooms.Cameras, FrameScenes]:
    """A room of `rooms.py` without patterns on its surfaces, and the same as batched tables."""
    generator = torch.Generator().manual_seed(seed)
    scene = rooms.sample_scene(generator)
    grey = torch.linspace(0.2, 0.9, len(scene.textures.colours))
    none = torch.zeros_like(grey)
    flat = replace(
        scene.textures,
        colours=grey[:, None, None].expand(-1, 3, 3),
        checker_weight=none,
        stripe_weight=none,
        noise_weight=torch.zeros_like(scene.textures.noise_weight),
    )
    scene = replace(scene, textures=flat)
    cameras = rooms.sample_cameras(scene, frames, generator)
    walls = rooms.Solids(torch.zeros(1, 3), torch.eye(3)[None], scene.room[None])
    solids = rooms.join(walls, rooms.join(scene.boxes, scene.ellipsoids))

    def per_frame(value: torch.Tensor) -> torch.Tensor:
        return value.expand(frames, *value.shape).contiguous()

    focal = 0.5 / torch.tan(cameras.field_of_view / 2)
    surfaces = len(grey)
    tables = FrameScenes(
        centre=per_frame(solids.centre),
        rotation=per_frame(solids.rotation),
        half_size=per_frame(solids.half_size),
        cubes=1 + len(scene.boxes.centre),
        camera=cameras.centre,
        orientation=cameras.rotation,
        focal=focal.expand(frames, 2).contiguous(),
        light=per_frame(scene.light),
        shade=per_frame(torch.stack([scene.ambient, torch.zeros(())])),
        texture=torch.zeros(frames, surfaces),
        placing=torch.tensor([1.0, 0, 0, 0, 1]).expand(frames, surfaces, 5).contiguous(),
        paint=per_frame(torch.cat([torch.zeros(surfaces, 3), grey[:, None].expand(-1, 3)], 1)),
    )
    return scene, cameras, tables


@pytest.mark.parametrize("seed", [1, 4])
def test_depth_and_light_equal_those_of_the_room_renderer(seed):
    frames = 3
    scene, cameras, tables = from_room(seed, frames)
    images, depth = render_frames(tables, plain_atlas(0.5), SIZE, SIZE)
    rays = rooms.pixel_rays(rooms.pinhole_intrinsics(cameras.field_of_view, SIZE, SIZE), SIZE, SIZE)
    for frame in range(frames):
        directions = cameras.rotation[frame] @ rays
        centre = cameras.centre[frame]
        hits = rooms.cast_rays(scene, centre, directions)
        colour = rooms.shade(scene, hits, centre[:, None] + hits.distance * directions)
        torch.testing.assert_close(
            depth[frame].flatten(), hits.distance.clamp(min=0.05), rtol=1e-4, atol=1e-5
        )
        # Where two faces meet, rounding decides which one is seen.
        close = (images[frame].flatten(1) - colour).abs().amax(0) < 1e-3
        assert close.float().mean() > 0.995


def test_depth_carried_to_the_next_frame_is_the_depth_there():
    batch = sample_scenes(6, 4, torch.Generator().manual_seed(3), 4, 0)
    _, depth = render_frames(batch.frame_scenes(), plain_atlas(0.2, 0.4, 0.6, 0.8), SIZE, SIZE)
    depth = depth.view(6, 4, SIZE, SIZE)
    agreeing = carried(batch, depth, batch.world_to_camera())
    # The rest is hidden there, or lies at an edge.
    assert agreeing.float().mean() > 0.75
    swapped = batch.world_to_camera().flip(1)
    assert carried(batch, depth, swapped).float().mean() < 0.5


def carried(batch: SceneBatch, depth: torch.Tensor, extrinsics: torch.Tensor) -> torch.Tensor:
    """Whether points of each frame that fall into the next one have the depth that is seen there, to 3 %."""
    centres = (torch.arange(SIZE) + 0.5) / SIZE - 0.5
    results = []
    for clip in range(depth.shape[0]):
        for view in range(depth.shape[1] - 1):
            z = depth[clip, view]
            x, y = centres / batch.focal[clip, 0], centres[:, None] / batch.focal[clip, 1]
            points = torch.stack([x * z, y * z, z]).flatten(1)
            rotation, translation = extrinsics[clip, view, :, :3], extrinsics[clip, view, :, 3:]
            world = rotation.T @ (points - translation)
            other = extrinsics[clip, view + 1]
            seen = other[:, :3] @ world + other[:, 3:]
            column = ((seen[0] / seen[2] * batch.focal[clip, 0] + 0.5) * SIZE).floor().long()
            row = ((seen[1] / seen[2] * batch.focal[clip, 1] + 0.5) * SIZE).floor().long()
            inside = (seen[2] > 0) & (column >= 0) & (column < SIZE) & (row >= 0) & (row < SIZE)
            there = depth[clip, view + 1][row[inside], column[inside]]
            results.append((seen[2, inside] / there - 1).abs() < 0.03)
    return torch.cat(results)


def room_with_box(darkness: float) -> torch.Tensor:
    """The floor seen from above, with a box hanging under the lamp."""
    scene = FrameScenes(
        centre=torch.tensor([[[0.0, 0, 0], [0, 0, 0.5]]]),
        rotation=torch.eye(3).expand(1, 2, 3, 3),
        half_size=torch.tensor([[[2.0, 2, 1.5], [0.3, 0.3, 0.05]]]),
        cubes=2,
        camera=torch.tensor([[0.0, 0, 0.2]]),
        orientation=torch.tensor([[[1.0, 0, 0], [0, -1, 0], [0, 0, -1]]]),  # straight down
        focal=torch.full((1, 2), 0.5),
        light=torch.tensor([[0.0, 0, 1.4]]),
        shade=torch.tensor([[0.4, darkness]]),
        texture=torch.zeros(1, 7),
        placing=torch.tensor([1.0, 0, 0, 0, 1]).expand(1, 7, 5),
        paint=torch.tensor([1.0, 1, 1, 0, 0, 0]).expand(1, 7, 6),
    )
    return render_frames(scene, plain_atlas(0.8), 28, 28)[0][0]


def test_a_box_under_the_lamp_throws_a_shadow_on_the_floor():
    lit, shadowed = room_with_box(0.0), room_with_box(1.0)
    # 0.3 m of box at 0.9 m from the lamp throw 0.97 m of shadow at 2.9 m, where the floor is seen to 1.7 m.
    middle, border = shadowed[:, 12:16, 12:16], shadowed[:, :3]
    assert torch.allclose(middle, torch.full_like(middle, 0.4 * 0.8), atol=0.01)
    torch.testing.assert_close(border, lit[:, :3])
    assert lit[:, 12:16, 12:16].min() > 0.7


def ramp(side: int = 8) -> torch.Tensor:
    """A texture whose red grows to the right and whose green grows downwards, by one step of 8 bits a pixel."""
    step = torch.arange(side) * 8 / 255
    red, green = step.expand(side, side), step[:, None].expand(side, side)
    return torch.stack([red, green, torch.zeros(side, side)])


def look_up(atlas: TextureAtlas, u: float, v: float, level: float, texture: int = 0) -> list[float]:
    """Red, green and blue at one place, of 255."""
    values = [torch.tensor([float(value)]) for value in (u, v, level)]
    found = sample_texture(atlas, torch.tensor([float(texture)]), *values)
    return [round(channel.item() * 255, 3) for channel in found]


def test_textures_are_exact_at_pixel_centres_and_linear_between():
    atlas = build_atlas(torch.stack([torch.ones(3, 8, 8) * 0.4, ramp()]), 0)
    assert look_up(atlas, 2.5 / 8, 5.5 / 8, 0, 1) == [16, 40, 0]
    assert look_up(atlas, 3.0 / 8, 5.5 / 8, 0, 1) == [20, 40, 0]
    assert look_up(atlas, 0.3, 0.3, 0, 0) == [102, 102, 102]


def test_textures_repeat_mirrored():
    atlas = build_atlas(ramp()[None], 0)
    for u, v in ((0.2, 0.7), (0.9, 0.4)):
        expected = look_up(atlas, u, v, 0)
        assert look_up(atlas, 2 - u, v, 0) == pytest.approx(expected, abs=1e-3)
        assert look_up(atlas, u + 2, v - 4, 0) == pytest.approx(expected, abs=1e-3)
        assert look_up(atlas, -u, -v, 0) == pytest.approx(expected, abs=1e-3)


def test_coarse_levels_are_means_and_levels_blend():
    square = torch.zeros(1, 3, 8, 8)
    square[..., :4] = 1.0
    square[:, :, :, 2] = 0.0
    atlas = build_atlas(square, 0)
    assert atlas.levels == 2
    fine, coarse = look_up(atlas, 2.5 / 8, 0.5, 0), look_up(atlas, 3 / 8, 0.5, 1)
    assert fine == [0, 0, 0]
    assert coarse == [128, 128, 128]  # pixels 2 and 3 of eight: one black, one white, in 8 bits
    assert look_up(atlas, 3 / 8, 0.5, 7) == coarse  # beyond the last level
    assert look_up(atlas, 3 / 8, 0.5, 0.25)[0] == pytest.approx(0.75 * 127.5 + 0.25 * 128)


def test_procedural_textures_differ_and_are_those_of_a_seed():
    squares = procedural_squares(6, 32, seed=2)
    assert squares.shape == (6, 3, 32, 32)
    assert torch.equal(squares, procedural_squares(6, 32, seed=2))
    assert not torch.equal(squares, procedural_squares(6, 32, seed=3))
    assert len(squares.flatten(1).unique(dim=0)) == 6


def test_photographs_come_from_folders_and_zip_files(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, size in enumerate([(32, 32), (90, 64)]):
        Image.new("RGB", size, (40 * (index + 1), 10, 200)).save(folder / f"{index}.png")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"some/{file.name}")
    photographs = load_photographs(folder, 32)
    assert photographs.shape == (2, 3, 32, 32)
    assert photographs[1, 0, 5, 5] == 80
    assert torch.equal(photographs, load_photographs(tmp_path / "photos.zip", 32))
    assert len(load_photographs(folder, 32, limit=1)) == 1
    atlas = texture_atlas(photographs, 3)
    assert (len(atlas), atlas.photographs, atlas.side) == (5, 2, 32)
    red, _, blue = look_up(atlas, 0.5, 0.5, 0, texture=1)
    assert red > 80  # dark ones are brightened
    assert blue / red == pytest.approx(200 / 80, rel=0.03)


def test_what_is_no_texture_is_named(tmp_path):
    with pytest.raises(ClipError, match=r"nowhere\.zip is neither a folder nor a zip file"):
        load_photographs(tmp_path / "nowhere.zip")
    with pytest.raises(ClipError, match="has no images"):
        load_photographs(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ClipError, match=r"broken\.jpg cannot be read"):
        load_photographs(tmp_path)
    with pytest.raises(ClipError, match="power of two, got 24 x 24"):
        build_atlas(torch.zeros(1, 3, 24, 24), 0)


def test_scenes_are_those_of_the_seed_and_leave_the_global_state_alone():
    torch.manual_seed(11)
    state = torch.get_rng_state()
    batches = [sample_scenes(5, 3, torch.Generator().manual_seed(seed), 9, 4) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in vars(batches[0]).items():
        assert torch.equal(value, getattr(batches[1], name)), name
    assert not torch.equal(batches[0].cameras, batches[2].cameras)


@pytest.fixture(scope="module")
def many() -> SceneBatch:
    return sample_scenes(300, 8, torch.Generator().manual_seed(5), 20, 12)


def test_scenes_are_of_all_kinds_and_only_plain_ones_without_photographs(many):
    assert {PLAIN, FURNISHED, FACADE} == set(many.kind.int().tolist())
    numbers = many.surfaces[..., 0]
    plain = many.kind == PLAIN
    assert (numbers[plain] >= 12).all()
    assert (numbers[~plain] < 12).float().mean() > 0.6
    assert numbers.min() >= 0
    assert numbers.max() <= 19
    procedural = sample_scenes(40, 2, torch.Generator().manual_seed(5), 7, 0)
    assert (procedural.surfaces[..., 0] < 7).all()


def test_cameras_stand_within_the_room_and_clear_of_things(many):
    position, room = many.cameras[..., :3], many.solids[:, 0, 12:]
    assert (position.abs() <= room[:, None] - 0.19).all()
    solids = many.solids[:, 1:]
    assert solids.shape[1] == SOLIDS - 1
    rotation = solids[..., 3:12].unflatten(2, (3, 3))
    local = torch.einsum("bskj,bkji->bski", position[:, :, None] - solids[:, None, :, :3], rotation)
    inside = (local.abs() < solids[:, None, :, 12:]).all(3).any(2)
    # Where a room is so full that no place is clear, the clearest may be within something.
    assert inside.float().mean() < 0.03


def test_frames_of_a_clip_overlap(many):
    """Nearly every frame shares a part of what it shows with another one of its clip."""
    some = SceneBatch(**{name: value[:40] for name, value in vars(many).items()})
    _, depth = render_frames(some.frame_scenes(), plain_atlas(*[0.5] * 20), 14, 14)
    depth = depth.view(40, 8, 14, 14)
    centres = (torch.arange(14) + 0.5) / 14 - 0.5
    world_to_camera = some.world_to_camera()
    x = (centres / some.focal[:, :1])[:, None, None] * depth
    y = (centres / some.focal[:, 1:])[:, None, :, None] * depth
    points = torch.stack([x, y, depth], 2).flatten(3)  # [B, S, 3, N]
    rotation, translation = world_to_camera[..., :3], world_to_camera[..., 3:]
    world = rotation.transpose(2, 3) @ (points - translation)
    seen = torch.einsum("btij,bsjn->bstin", rotation, world) + translation[:, None]
    u = seen[..., 0, :] / seen[..., 2, :].clamp(min=1e-3) * some.focal[:, 0, None, None, None]
    v = seen[..., 1, :] / seen[..., 2, :].clamp(min=1e-3) * some.focal[:, 1, None, None, None]
    inside = ((u.abs() < 0.5) & (v.abs() < 0.5) & (seen[..., 2, :] > 0.05)).float().mean(3)  # [B, S, S]
    inside = inside.masked_fill(torch.eye(8, dtype=torch.bool), 0)
    assert (inside.amax(2) > 0.2).float().mean() > 0.9
    assert inside.amax(2).median() > 0.6


def furnished_scenes(monkeypatch, scanned: float, gathered: float) -> SceneBatch:
    """Furnished rooms only, with the given shares of scans and groups."""
    monkeypatch.setattr(training_scenes, "KIND_SHARES", (0.0, 1.0, 0.0))
    monkeypatch.setattr(training_scenes, "SCANNED", scanned)
    monkeypatch.setattr(layout, "GATHERED", gathered)
    return sample_scenes(300, 4, torch.Generator().manual_seed(1), 20, 12)


def test_who_scans_a_room_looks_down_on_it_from_near(monkeypatch):
    down, reach = {}, {}
    for share in (0.0, 1.0):
        scenes = furnished_scenes(monkeypatch, share, 0.5)
        ahead = scenes.cameras[..., 3:].unflatten(2, (3, 3))[..., 2]  # [B, S, 3] what cameras look along
        down[share] = (ahead[..., 2] < 0).float().mean()
        things = scenes.solids[:, None, 1 : layout.BOXES, :3]
        reach[share] = (things - scenes.cameras[:, :, None, :3]).norm(dim=-1).amin(-1).median()
    assert down[1.0] > 0.85 and down[0.0] < 0.65
    assert reach[1.0] < reach[0.0]


def test_gathered_furniture_stands_together(monkeypatch):
    apart = []
    for share in (0.0, 1.0):
        solids = furnished_scenes(monkeypatch, 0.5, share).solids
        start = 1 + layout.WALL_BOXES + layout.FURNITURE
        tables = solids[:, [start, start + layout.PARTS], :2]  # a part of each of the two pieces
        here = (tables.abs() < training_scenes.FAR_AWAY / 2).all(-1).all(-1)
        apart.append((tables[here, 0] - tables[here, 1]).norm(dim=-1).median())
    assert apart[1] < 0.75 * apart[0]


def test_many_surfaces_of_furnished_rooms_are_plain(many):
    contrast = many.surfaces[..., 6:9].mean(-1)
    flat = {kind: (contrast[many.kind == kind] < 0.3).float().mean().item() for kind in (FURNISHED, FACADE)}
    assert flat[FURNISHED] == pytest.approx(0.3, abs=0.03)
    assert flat[FACADE] == pytest.approx(0.15, abs=0.03)
