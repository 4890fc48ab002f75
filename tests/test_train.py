"""Training of VGGT-mini: the fast forward pass, losses by hand, the optimiser, and runs that go on after a kill."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from vggt.utils.rotation import quat_to_mat

from pacevggt_patch import PaceError
from pacevggt_patch.evaluation.geometry import decode_pose_encoding, quaternions
from pacevggt_patch.mini import MiniConfig, build_mini
from pacevggt_patch.mini.scenes import fetch_textures as fetch
from pacevggt_patch.mini.scenes.textures import texture_atlas
from pacevggt_patch.mini.scenes.training_scenes import sample_scenes
from pacevggt_patch.mini.training.forward import FastForward, layer_list
from pacevggt_patch.mini.training.losses import (
    AuxiliaryHeads,
    confidence_loss,
    correspondence_loss,
    depth_losses,
    first_camera_points,
    gradient_loss,
    make_targets,
    next_view_patches,
    point_loss,
)
from pacevggt_patch.mini.training.optim import FlatOptimizer, learning_rate, orthogonalise
from pacevggt_patch.mini.training.train import Plan, architecture, main
from pacevggt_patch.mini.training.trainer import Settings, Trainer, sample_inputs, step_views
from pacevggt_patch.training.losses import PAIR_FLOOR, PAIR_HALF, camera_losses, pair_losses
from pacevggt_patch.training.seeds import mixed_seed

torch.set_num_threads(1)

SIZE = 28
TINY = {
    "embed_dim": 32,
    "num_heads": 2,
    "vit_depth": 1,
    "depth": 4,
    "cached_layers": [0, 1, 2, 3],
    "camera_heads": 2,
    "dpt_features": 8,
    "dpt_channels": [8, 8, 8, 8],
}
SETTINGS = Settings(frames=8, dense=4, views=(2, 4), size=SIZE, warm_up=2, procedural=3)
ARGUMENTS = [
    *("--device", "cpu", "--size", "28", "--frames", "8", "--dense", "4", "--views", "2", "4"),
    *("--warm-up", "2", "--procedural", "3", "--config", json.dumps(TINY)),
    *("--evaluate-every", "1000", "--save-every", "0"),
]


@pytest.fixture(scope="module")
def atlas():
    return texture_atlas(None, 3)


def make_trainer(atlas, rank: int = 0, world: int = 1) -> Trainer:
    return Trainer(SETTINGS, architecture(TINY, SIZE), atlas, rank, world)


# The forward pass


def test_the_fast_forward_pass_is_that_of_the_stock_model():
    config = MiniConfig(**{**TINY, "cached_layers": (0, 1, 2, 3), "image_size": 42}, point_head=True)
    model = build_mini(False, config)
    with torch.no_grad():  # so that first and later frames, and scales, differ
        for name, parameter in model.named_parameters():
            if "token" in name or "gamma" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    images = torch.rand(2, 3, 3, 42, 42, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        stock, start = model.aggregator(images)
        features = FastForward(model, torch.float32)(images)
    for layer, tokens in enumerate(layer_list(features, 4)):
        torch.testing.assert_close(tokens, stock[layer], rtol=1e-4, atol=1e-5)
    assert features.patches.shape == (6, 9, 32)
    assert start == 5


def test_all_parameters_of_the_model_get_a_gradient(atlas):
    trainer = make_trainer(atlas)
    trainer.gradients(sample_inputs(SETTINGS, 4, 3, 3, 0))
    silent = [
        name
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and not parameter.grad.any()
    ]
    assert silent == []


# Losses


def test_quaternions_of_known_rotations():
    half = math.sqrt(0.5)
    about_z = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # by 90 degrees
    about_x = torch.diag(torch.tensor([1.0, -1, -1]))  # by 180 degrees: the scalar is 0
    found = quaternions(torch.stack([torch.eye(3), about_z, about_x]))
    expected = torch.tensor([[0, 0, 0, 1.0], [0, 0, half, half], [1, 0, 0, 0]])
    torch.testing.assert_close(found.abs(), expected)
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(50, 3, 3, generator=generator))
    rotation = rotation * rotation.det()[:, None, None]
    torch.testing.assert_close(quat_to_mat(quaternions(rotation)), rotation, atol=1e-5, rtol=0)


def test_targets_are_seen_from_the_first_camera_and_have_mean_distance_one(atlas):
    inputs = sample_inputs(SETTINGS, 4, 5, 3, 0)
    _, depth = make_trainer(atlas).render(inputs)
    targets = make_targets(inputs.scenes, depth.view(2, 4, SIZE, SIZE), 14)
    torch.testing.assert_close(targets.extrinsics[:, 0], torch.eye(3, 4).expand(2, 3, 4), atol=1e-6, rtol=0)
    points = first_camera_points(targets.depth, targets.extrinsics, targets.focal, 1, 0)
    torch.testing.assert_close(points.norm(dim=-1).mean((1, 2, 3)), torch.ones(2), atol=0.02, rtol=0)
    # Into the last camera again: the pixel centres and the depth there.
    last = torch.einsum("bij,bhwj->bhwi", targets.extrinsics[:, 3, :, :3], points[:, 3])
    last = last + targets.extrinsics[:, 3, None, None, :, 3]
    torch.testing.assert_close(last[..., 2], targets.depth[:, 3], rtol=1e-4, atol=1e-4)
    columns = (last[..., 0] / last[..., 2] * targets.focal[:, :1, None] + 0.5) * SIZE
    torch.testing.assert_close(columns[0, 0], torch.arange(SIZE) + 0.5, rtol=1e-3, atol=1e-3)
    views = targets.pose[..., 7:]
    torch.testing.assert_close(torch.tan(views / 2), (0.5 / targets.focal).flip(1)[:, None].expand(-1, 4, -1))


def test_camera_losses_weigh_later_iterations_more():
    truth = torch.zeros(1, 2, 9)
    early, late = truth.clone(), truth.clone()
    early[..., 0], late[..., 8] = 3.0, 1.0
    losses = camera_losses([early, late], truth)
    # Means over 3, 4 and 2 numbers; weights 0.6 and 1 over 1.6.
    assert losses["translation"] == pytest.approx(0.6 / 1.6 * 1.0)
    assert losses["rotation"] == 0
    assert losses["field_of_view"] == pytest.approx(1 / 1.6 * 0.5)


def test_pair_losses_are_those_of_the_metrics_relative_poses():
    generator = torch.Generator().manual_seed(3)
    truth, prediction = torch.randn(2, 2, 3, 9, generator=generator)
    losses = pair_losses(prediction, truth)
    expected = {"pair_translation": [], "pair_rotation": []}
    for clip in range(2):
        motions = []
        for poses in (prediction[clip], truth[clip]):
            full = torch.eye(4).repeat(3, 1, 1)
            full[:, :3], _ = decode_pose_encoding(poses, 28, 28)
            motions.append([[b @ a.inverse() for b in full] for a in full])
        for i, j in ((i, j) for i in range(3) for j in range(3) if i != j):
            found, true = motions[0][i][j], motions[1][i][j]
            relative = (found[:3, 3] - true[:3, 3]).norm() / (true[:3, 3].norm() + PAIR_FLOOR)
            expected["pair_translation"].append(relative / (relative + PAIR_HALF))
            expected["pair_rotation"].append((found - true)[:3, :3].norm())
    for name, values in expected.items():
        assert losses[name] == pytest.approx(sum(values).item() / 12, abs=2e-4)


def test_pair_losses_have_a_gradient_at_the_truth():
    truth = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(4))
    prediction = truth.clone().requires_grad_()
    losses = pair_losses(prediction, truth)
    (losses["pair_translation"] + losses["pair_rotation"]).backward()
    assert losses["pair_translation"] < 1e-2
    assert prediction.grad.isfinite().all()


def test_confidence_pays_where_the_error_is_small():
    error, confidence = torch.tensor([0.1, 0.3]), torch.tensor([2.0, 1.0])
    expected = 0.5 * 0.2 + 0.5 * ((0.2 - 0.2 * math.log(2)) + 0.3) / 2
    assert confidence_loss(error, confidence) == pytest.approx(expected)
    # For an error of 0.1 the best confidence is 0.2 / 0.1.
    losses = [confidence_loss(torch.tensor([0.1]), torch.tensor([c])).item() for c in (1.5, 2.0, 2.5)]
    assert losses[1] == min(losses)


def test_depth_losses_by_hand():
    truth = torch.full((1, 16, 16), 2.0)
    losses = depth_losses(truth * math.e, torch.ones_like(truth), truth)
    assert losses["depth"] == pytest.approx(1.0)
    assert losses["depth_gradient"] == pytest.approx(0.0, abs=1e-6)  # one scale for all
    ramp = torch.arange(16.0).expand(1, 16, 16) * 0.01
    # Neighbours differ by 0.01 and pixels 8 apart by 0.08, across only.
    assert gradient_loss(ramp) == pytest.approx(0.01 + 0.5 * 0.08)


def test_point_loss_is_relative_to_the_depth():
    truth = torch.zeros(1, 2, 2, 3)
    predicted = truth + torch.tensor([0.0, 0.3, 0.4])
    depth = torch.tensor([[[2.0, 0.1], [2.0, 0.1]]])
    one = torch.ones(1, 2, 2)
    assert point_loss(predicted, one, truth, depth) == pytest.approx((0.25 + 1.0) / 2)


def test_patches_are_found_where_the_scene_moved():
    """A camera that steps to the right by one patch and by one more, before a wall: all moves to the left."""
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(1, 3, generator, 3, 0)
    step = 14 / 56 / 0.5 * 4.0  # metres of one patch at focal length 0.5 and 4 m
    level = torch.eye(3).flatten()
    cameras = torch.stack([torch.cat([torch.tensor([step * view, 0, 0]), level]) for view in range(3)])
    scenes = replace(scenes, cameras=cameras[None], focal=torch.full((1, 2), 0.5))
    targets = make_targets(scenes, torch.full((1, 3, 56, 56), 4.0), 14)
    number, visible = (value.view(3, 4, 4) for value in next_view_patches(targets))
    grid = torch.arange(16).view(4, 4)
    for view in range(2):
        assert torch.equal(number[view, :, 1:], grid[:, :3])
        assert visible[view, :, 1:].all()
        assert not visible[view, :, 0].any()
    # After the last view comes the first, two patches to the left.
    assert torch.equal(number[2, :, :2], grid[:, 2:])
    assert visible[2, :, :2].all()
    assert not visible[2, :, 2:].any()
    # Descriptors that say exactly this, by the column on the wall, have next to no loss; others have.
    column, row = torch.arange(4), torch.arange(4)[:, None]
    places = torch.stack([row * 8 + column + view for view in range(3)]).flatten(1)  # [S, P]
    descriptors = torch.eye(64)[places][None]
    loss, found = correspondence_loss(descriptors, targets)
    assert found == 1
    assert loss < 1e-3
    assert correspondence_loss(descriptors.flip(2), targets)[0] > 3


def test_the_auxiliary_point_loss_is_the_mean_over_layers():
    heads = AuxiliaryHeads(4, [1, 2])
    for head in heads.points.values():
        nn.init.zeros_(head[1].weight)
        nn.init.ones_(head[1].bias)
    nn.init.constant_(heads.points["2"][1].bias, 3.0)
    layers = {layer: torch.randn(1, 2, 5 + 6, 8) for layer in (1, 2)}
    assert heads.point_loss(layers, 5, torch.zeros(1, 2, 6, 3)).item() == pytest.approx(2.0)


# The optimiser


class Small(nn.Module):
    """Two matrices for Muon, one of them joint, and the rest for AdamW."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"qkv": nn.Linear(16, 48), "proj": nn.Linear(16, 16)})
        self.head = nn.Linear(16, 2)


def test_parameters_and_gradients_are_views_of_flat_buffers():
    module = Small()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = FlatOptimizer([module])
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name])
    module.head(torch.ones(1, 16)).sum().backward()
    assert optimizer.gradients.sum() == pytest.approx(2 * 16 + 2)
    assert optimizer.muon_end == 48 * 16 + 16 * 16
    optimizer.values.zero_()
    assert all(not p.any() for p in module.parameters())


def test_adam_steps_are_those_of_torch():
    torch.manual_seed(0)
    module, twin = nn.Linear(8, 3), nn.Linear(8, 3)
    twin.load_state_dict(module.state_dict())
    optimizer = FlatOptimizer([module], weight_decay=0.1)
    groups = [{"params": [twin.weight], "weight_decay": 0.1}, {"params": [twin.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    for number in range(1, 4):
        x = torch.randn(5, 8)
        optimizer.gradients.zero_()
        for one in (module, twin):
            one.zero_grad(set_to_none=False)
            one(x).square().mean().backward()
        reference.step()
        rate = torch.tensor(0.01)
        optimizer.step(rate, rate, torch.tensor(float(number)), clip=1e9)
        torch.testing.assert_close(module.weight, twin.weight)
        torch.testing.assert_close(module.bias, twin.bias)


def test_muon_makes_updates_orthogonal_and_takes_joint_projections_apart():
    matrices = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3
    torch.testing.assert_close(orthogonalise(matrices.mT), orthogonalise(matrices).mT)
    module = Small()
    optimizer = FlatOptimizer([module], weight_decay=0.0)
    before = module.blocks["qkv"].weight.detach().clone()
    optimizer.gradients.normal_(generator=torch.Generator().manual_seed(1))
    optimizer.step(torch.tensor(0.1), torch.tensor(0.0), torch.tensor(1.0))
    for part in (before - module.blocks["qkv"].weight.detach()).split(16):
        values = torch.linalg.svdvals(part) / (
            0.1 * 0.2 * 4
        )  # rate, size of the update, root of the larger side
        assert 0.6 < values.min() <= values.max() < 1.3


def test_gradients_are_clipped_to_the_norm():
    module = nn.Linear(4, 4)
    optimizer = FlatOptimizer([module])
    optimizer.gradients.fill_(3.0)
    zero = torch.tensor(0.0)
    norm = optimizer.step(zero, zero, torch.tensor(1.0), clip=1.0)
    assert norm == pytest.approx(3 * 20**0.5)
    assert optimizer.gradients.norm() == pytest.approx(1.0, abs=1e-4)


def test_a_state_of_other_parameters_is_refused():
    with pytest.raises(ValueError, match="other parameters"):
        FlatOptimizer([nn.Linear(4, 4)]).load(FlatOptimizer([nn.Linear(5, 4)]).state())


def test_the_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(step, 4, 10, 15) for step in range(16)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9:] == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert learning_rate(10**6, 4, None, None) == 1.0


# Runs


def test_inputs_pack_and_unpack_and_are_those_of_step_and_process(atlas):
    first = sample_inputs(SETTINGS, 2, mixed_seed(0, 7, 0), 3, 0)
    again = first.unpack(first.packed())
    assert torch.equal(first.packed(), again.packed())
    torch.testing.assert_close(first.scenes.cameras, again.scenes.cameras)
    assert torch.equal(first.packed(), sample_inputs(SETTINGS, 2, mixed_seed(0, 7, 0), 3, 0).packed())
    others = [mixed_seed(0, 7, 1), mixed_seed(0, 8, 0), mixed_seed(1, 7, 0)]
    assert len({mixed_seed(0, 7, 0), *others}) == 4
    assert len({mixed_seed(0, step, rank) for step in range(500) for rank in range(4)}) == 2000
    assert {step_views(SETTINGS, step) for step in range(30)} == {2, 4}


def test_the_plan_follows_the_clock():
    plan = Plan()
    plan.decide(100, left=31.0, decay=30.0, seconds_per_step=0.5)
    assert plan == Plan()
    plan.decide(110, left=29.0, decay=30.0, seconds_per_step=0.5)
    assert plan == Plan(110, 168)
    plan.decide(120, left=27.0, decay=30.0, seconds_per_step=0.25)
    assert plan == Plan(110, 228)  # steps turned out to be faster
    plan.decide(160, left=0.0, decay=30.0, seconds_per_step=0.5)
    assert plan == Plan(110, 160)
    assert Plan.of_steps(50, 100, 0.25) == Plan(125, 150)


def test_the_plan_waits_until_it_is_known_how_long_a_step_takes():
    plan = Plan()
    plan.decide(10, left=29.0, decay=30.0, seconds_per_step=None)
    assert plan == Plan()
    plan.decide(20, left=-1.0, decay=30.0, seconds_per_step=None)
    assert plan == Plan(20, 21)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys):
    state = torch.get_rng_state()
    assert main([*ARGUMENTS, "--out", str(tmp_path / "whole"), "--steps", "5"]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    step = Trainer.step

    def dies(self, *args):
        if self.step_number == 3:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Trainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        main([*ARGUMENTS, "--out", str(tmp_path / "killed"), "--steps", "5"])
    monkeypatch.undo()
    assert main([*ARGUMENTS, "--out", str(tmp_path / "killed"), "--steps", "5", "--resume"]) == 0
    whole, killed = (tmp_path / name / "mini.safetensors" for name in ("whole", "killed"))
    weights = [load_file(path) for path in (whole, killed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    states = [torch.load(path.with_name("state.pt"), weights_only=True) for path in (whole, killed)]
    for name, value in states[0]["optimizer"].items():
        assert name == "names" or torch.equal(value, states[1]["optimizer"][name]), name
    # The weights are a VGGT-mini, and the curve is there.
    assert build_mini(whole).mini_config == architecture(TINY, SIZE)
    records = json.loads((tmp_path / "whole" / "curve.json").read_text())
    assert set(records[-1]) == {"step", "seconds", "rooms", "scenes"}
    assert (tmp_path / "whole" / "curve.png").stat().st_size > 1000
    assert "5 steps of 8 images" in capsys.readouterr().out


def test_another_run_starts_from_the_weights_before_the_fall(tmp_path):
    first = [*ARGUMENTS, "--out", str(tmp_path / "first"), "--steps", "4", "--decay", "0.5"]
    assert main(first) == 0
    level = tmp_path / "first" / "level.safetensors"
    second = [*ARGUMENTS, "--out", str(tmp_path / "second"), "--steps", "2", "--from-weights", str(level)]
    assert main(second) == 0
    state = torch.load(tmp_path / "second" / "state.pt", weights_only=True)
    assert (state["step"], state["since_start"]) == (4, 2)  # from step 2 on, to scenes not seen before
    # A checkpoint without the auxiliary heads will do as well.
    checkpoint = str(tmp_path / "second" / "mini.safetensors")
    assert (
        main([*ARGUMENTS, "--out", str(tmp_path / "third"), "--steps", "1", "--from-weights", checkpoint])
        == 0
    )
    state = torch.load(tmp_path / "third" / "state.pt", weights_only=True)
    assert (state["step"], state["since_start"]) == (5, 1)
    with pytest.raises(PaceError, match="another architecture"):
        main([*second[:-1], str(level), "--config", json.dumps({**TINY, "depth": 5})])
    level.write_bytes(b"torn")
    with pytest.raises(PaceError, match=r"level\.safetensors is not a safetensors file"):
        main(second)


def test_two_processes_step_like_one_with_both_gradients(tmp_path, atlas):
    script = """
import sys, torch, torch.distributed as dist
from test_train import make_trainer
from pacevggt_patch.mini.scenes.textures import texture_atlas
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
trainer = make_trainer(texture_atlas(None, 3), rank, 2)
for step in range(2):
    trainer.step(trainer.sample(step), 1.0)
torch.save((trainer.optimizer.values, trainer.latest[1]), f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""
    tests = os.path.dirname(__file__)
    path = os.pathsep.join([tests, os.path.dirname(tests), *filter(None, sys.path)])
    common = {**os.environ, "PYTHONPATH": path, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(29000 + os.getpid() % 3000), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env={**common, "RANK": str(rank)})
        for rank in range(2)
    ]
    together = [make_trainer(atlas, rank) for rank in range(2)]
    for step in range(2):
        gradients = []
        for trainer in together:
            views, inputs, _ = trainer.sample(step)
            assert views == step_views(SETTINGS, step)
            trainer.gradients(inputs)
            gradients.append(trainer.optimizer.gradients.clone())
        for trainer in together:
            trainer.optimizer.gradients.copy_(sum(gradients) / 2)
            trainer.rates.copy_(torch.tensor([SETTINGS.muon_rate, SETTINGS.adam_rate, step + 1]))
            (norm,) = trainer.update()
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][0], together[0].optimizer.values, rtol=1e-5, atol=1e-6)
    # The optimisers hardly see a factor on the gradient; its norm does.
    torch.testing.assert_close(results[0][1], norm, rtol=1e-4, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_steps_train_as_others_do():
    atlas, losses = texture_atlas(None, 3, device="cuda"), []
    for recorded in (False, True):
        trainer = make_trainer(atlas)
        trainer.recorder.on = recorded
        rows = []
        for step in range(8):
            trainer.step(trainer.sample(step), 1.0)
            rows.append(trainer.latest_losses()["total"])
        assert bool(trainer.recorder.recordings) is recorded
        losses.append(torch.tensor(rows))
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0)


def test_training_brings_the_loss_down(atlas):
    trainer = make_trainer(atlas)
    sampled = trainer.sample(0)
    losses = []
    for _ in range(25):
        trainer.step(sampled, 1.0)
        losses.append(trainer.latest_losses()["total"])
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--frames", "9", "--steps", "1"],
            r"frames \(9\) must be divisible by each number of views \[2, 4\]",
        ),
        (["--dense", "9", "--steps", "1"], "dense must be between 1 and frames"),
        (["--size", "42", "--steps", "1"], "size must be a multiple of 28"),
        (["--decay", "1.5", "--steps", "1"], "decay is a share of the run"),
        (["--config", '{"width": 3}', "--steps", "1"], "MiniConfig has no field width; it has image_size"),
        (["--textures", "nowhere.zip", "--steps", "1"], r"nowhere\.zip is neither a folder nor a zip file"),
        (["--from-weights", "nowhere.safetensors", "--steps", "1"], r"nowhere\.safetensors does not exist"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(PaceError, match=message):
        main([*ARGUMENTS, "--out", str(tmp_path), *arguments])


def test_a_run_has_one_length(tmp_path, capsys):
    for arguments in ([], ["--steps", "2", "--seconds", "3"]):
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path), *arguments])
        assert "either --seconds or --steps" in capsys.readouterr().err


def test_another_architecture_cannot_be_resumed(tmp_path):
    out = ["--out", str(tmp_path), "--steps", "1"]
    assert main([*ARGUMENTS, *out]) == 0
    with pytest.raises(PaceError, match="can't resume: the run was started with another seed"):
        main([*ARGUMENTS, *out, "--resume", "--seed", "3"])


# Textures


def test_squares_are_cut_from_pictures_with_something_on_them(tmp_path):
    noise = torch.randint(256, (300, 400, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "noise.png")
    Image.new("RGB", (300, 300), (90, 90, 90)).save(tmp_path / "flat.png")
    Image.fromarray(noise.numpy()).save(tmp_path / "noise_norm.png")
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    source = fetch.Source("any", 5, 3)
    found = [list(fetch.squares(source, tmp_path)) for _ in range(2)]
    assert len(found[0]) == 3
    assert all(square.size == (fetch.SIDE, fetch.SIDE) for _, square in found[0])
    assert [fetch.jpeg(a) for _, a in found[0]] == [fetch.jpeg(b) for _, b in found[1]]
    assert len(list(fetch.squares(fetch.Source("any", 2, 3), tmp_path))) == 2


def test_a_package_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PaceError, match="apt-get download some-textures"):
        fetch.unpack("some-textures", tmp_path)
