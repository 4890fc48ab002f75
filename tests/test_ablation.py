"""Ablations: what is changed in the method, and what is left alone; tokens left out in groups; clips that lose most."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from hosts import random_images, tiny_vggt, with_heads

from pacevggt_patch import PaceError, accelerate, is_accelerated, remove
from pacevggt_patch.clips import Clip
from pacevggt_patch.method.global_pruning import Plan, keep_best, run_on_kept
from pacevggt_patch.method.propagation import make_propagation
from pacevggt_patch.method.scoring import DISTINCTNESS_WEIGHT
from pacevggt_patch.method.selection import merge_quotas
from pacevggt_patch.mini.scenes.rooms import render_room
from pacevggt_patch.runtime.attention import InterceptAttention

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

ablation = importlib.import_module("ablation")
gallery = importlib.import_module("gallery")
occlusion = importlib.import_module("occlusion")
quality = importlib.import_module("quality")

GRID, KEEP = (6, 5), 9


@pytest.fixture
def features():
    return torch.randn(3, GRID[0] * GRID[1], 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def subject():
    model = tiny_vggt()
    weights = with_heads(model, (1, 0), (2, 1))
    return ablation.Subject(model, random_images(6)[0], 6, 5, 20, 6, 8, weights)


def test_rules_of_selection_keep_as_many_tokens_of_each_frame(features, subject):
    rules = {}
    for variant in ablation.selection_study(subject):
        changed = [value for module, name, value in variant.places if name == "keep_best"]
        rules[variant.name] = changed[0] if changed else keep_best
    assert len(rules) == 7 + ablation.RANDOM_DRAWS
    found = {name: rule(features, GRID, KEEP) for name, rule in rules.items()}
    for kept in found.values():
        assert kept.shape == (3, KEEP) and bool((kept.diff(dim=1) > 0).all())
        assert int(kept.min()) >= 0 and int(kept.max()) < features.shape[1]
    assert len({tuple(kept.flatten().tolist()) for kept in found.values()}) >= len(found) - 1
    # Coverage with the weight that ships is what ships.
    assert torch.equal(
        ablation.covering(DISTINCTNESS_WEIGHT)(features, GRID, KEEP), keep_best(features, GRID, KEEP)
    )
    on_grid = ablation.covering(0.0, torch.ones_like)(features, GRID, KEEP)
    assert torch.equal(on_grid[0], on_grid[1])  # places know nothing of the frame


def test_propagation_is_changed_as_the_rows_say(features, subject):
    kept = keep_best(features, GRID, KEEP)
    plan = make_propagation(features, kept, GRID, 1, torch.float32)
    nearest = ablation.propagates(ablation.nearest_alone)(features, kept, GRID, 1, torch.float32)
    rows = [i for i in range(1, 31) if i - 1 not in kept[0].tolist()]  # dropped tokens of frame 0
    assert nearest.weights[0, rows].sum(1).tolist() == [1.0] * len(rows)
    assert torch.equal(nearest.weights[0, rows].argmax(1), plan.weights[0, rows].argmax(1))

    tokens = torch.randn(1, 3 * 31, 16, generator=torch.Generator().manual_seed(1))
    nothing = next(one for one in ablation.propagation_study(subject) if one.name.startswith("nothing"))
    with ablation.swapped(*nothing.places):
        made = next(value for _, name, value in nothing.places if name == "make_propagation")
        still = made(features, kept, GRID, 1, torch.float32)
        after = run_on_kept(tokens, Plan(kept, still), lambda x: x + 1).view(3, 31, 16)
    before = tokens.view(3, 31, 16)
    torch.testing.assert_close(after[0, rows], before[0, rows], rtol=0, atol=1e-6)
    taken = [0, *(kept[0] + 1).tolist()]
    torch.testing.assert_close(after[0, taken], before[0, taken] + 1)


def test_even_quotas_share_all_merges():
    saliency = torch.rand(2, 5)
    for total in (0, 3, 20):
        quotas = ablation.even_quotas(saliency, total, 4)
        assert quotas.sum(1).tolist() == [total] * 2 == merge_quotas(saliency, total, 4).sum(1).tolist()
        assert int(quotas.max() - quotas.min()) <= 1


@pytest.mark.parametrize("study", ["heads", "merging", "keys"])
def test_every_variant_of_a_study_runs_another_model(study, subject):
    """Each gives outputs of its own, but for those that say they are what ships."""
    model, found = subject.model, {}
    for variant in ablation.STUDIES[study](subject):
        arguments = {"weights": subject.weights, "mode": "global"} | variant.more
        with ablation.swapped(*variant.places), torch.inference_mode():
            accelerate(model, 0.3, min_frames=1, **arguments)
            found[variant.name] = model(subject.images)["depth"]
    remove(model)
    assert all(bool(depth.isfinite().all()) for depth in found.values())
    different = {tuple(depth.flatten()[::97].tolist()) for depth in found.values()}
    # Six frames are fewer than any number of frames from which keys are a sample.
    assert len(different) >= (2 if study == "keys" else len(found) - 2)


def test_a_study_is_measured_and_written(tmp_path, monkeypatch, capsys):
    model = tiny_vggt()
    monkeypatch.setattr(quality, "build_mini", lambda checkpoint: model)
    monkeypatch.setattr(ablation, "calibrate", lambda model, images: with_heads(model, (1, 0)))
    file = tmp_path / "ablation.json"
    arguments = ["--study", "propagation", "--frames", "2", "--count", "2", "--json", str(file)]
    assert ablation.main(arguments) == 0
    report = json.loads(file.read_text())
    names = [row["variant"] for row in report["rows"]]
    assert names[0] == "unpruned" and names[1].startswith("shipped") and len(set(names)) == 7
    assert {round(row["pairs"], 9) for row in report["rows"][1:]} == {round(report["rows"][1]["pairs"], 9)}
    assert all(len(row["per_clip"]) == 2 for row in report["rows"]) and report["study"] == "propagation"
    assert not is_accelerated(model) and names[-1] in capsys.readouterr().out


def test_cells_are_parts_of_the_grid():
    cells = occlusion.cells_of((8, 12), "cpu")
    assert cells.shape == (6, 16) and sorted(cells.flatten().tolist()) == list(range(96))
    assert cells[1].tolist() == [row * 12 + column for row in range(4) for column in range(4, 8)]
    scores = torch.rand(2, 96)
    means = occlusion.by_cells(scores, cells)
    assert means[1, 4].item() == pytest.approx(scores[1].view(8, 12)[4:, 4:8].mean().item())


def test_each_cell_of_each_frame_is_left_out_once(monkeypatch):
    out = []
    monkeypatch.setattr(occlusion, "without", lambda model, images, cells: out.append(cells))
    moves = iter(range(100))

    def change(found, unpruned):
        move = next(moves)
        return {measure: torch.full((5,), float(move)) for measure in occlusion.MEASURES}

    monkeypatch.setattr(occlusion, "change", change)
    cells = torch.arange(16)[:, None]  # of one token each
    worth = occlusion.worth_of_cells(None, torch.zeros(5, 3, 1, 1), cells, {})
    left_out = torch.cat(out, dim=1)  # [frames, passes]
    assert left_out.sort(1).values.tolist() == [list(range(16))] * 5
    assert all(len(set(column.tolist())) == 5 for column in left_out.T)  # another cell in each frame
    for frame in range(5):
        for number, cell in enumerate(left_out[frame].tolist()):
            assert worth["depth"][frame, cell] == number


def test_tokens_that_are_left_out_are_no_keys():
    model, images = tiny_vggt(), random_images(3)[0]
    patches = images.shape[-1] // 14 * (images.shape[-2] // 14)
    keys = set()

    def count(run, query, key, value, options):
        keys.add(key.shape[2])
        return run(query, key, value)

    out = torch.tensor([[0, 1], [4, 7], [patches - 1, 2]])
    with InterceptAttention(count):
        found = occlusion.without(model, images, out)
    assert 3 * (patches - 2 + 5) in keys and 3 * (patches + 5) not in keys
    assert not is_accelerated(model) and bool(found["depth"].isfinite().all())


def test_change_is_after_one_scale_and_counts_a_camera_in_all_its_pairs():
    model, images = tiny_vggt(), random_images(4)[0]
    with torch.inference_mode():
        out = model(images)
    same = occlusion.change(out | {"depth": 3 * out["depth"]}, out)
    assert same["depth"].max() < 1e-3 and same["camera"].max() < 1e-3
    depth = out["depth"].clone()
    depth[0, 2] *= 1.1
    moved = occlusion.change(out | {"depth": depth}, out)["depth"]
    assert moved.tolist() == pytest.approx([0, 0, 10, 0], abs=1e-2)
    pose = out["pose_enc"].clone()
    pose[0, 1, 3:7] = torch.tensor([0.0, 0.0, 2**-0.5, 2**-0.5])
    turned = occlusion.change(out | {"pose_enc": pose}, out)["camera"]
    assert turned.argmax() == 1 and turned[0] > 0  # others see it turn, too


def test_worst_clips_come_first(tmp_path, monkeypatch, capsys):
    model = tiny_vggt()
    monkeypatch.setattr(gallery, "build_mini", lambda checkpoint: model)
    weights = with_heads(model, (1, 0))
    monkeypatch.setattr(
        gallery, "accelerate", lambda *given, **more: accelerate(*given, **more | {"weights": weights})
    )
    monkeypatch.setattr(gallery, "SHOWN", 2)
    picture, file = tmp_path / "gallery.png", tmp_path / "gallery.json"
    arguments = ["--frames", "3", "--count", "3", "--out", str(picture), "--json", str(file)]
    assert gallery.main(arguments) == 0
    lost = [row["auc30_change"] for row in json.loads(file.read_text())["rows"]]
    assert len(lost) == 3 and lost == sorted(lost)
    assert picture.read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out.count("clip ") == 3


def test_a_clip_without_truth_is_refused():
    room = render_room(5, 2)
    model = accelerate(tiny_vggt(), weights=None, min_frames=1)
    bare = Clip("bare", room.images)
    with pytest.raises(PaceError, match="clip 7"):
        gallery.measured(model, bare, 7)
