"""Calibration on the first clip that comes, and the files in which it is kept."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hosts import assert_equal, random_images, run, tiny_vggt, with_heads

from pacevggt_patch import (
    PaceError,
    PaceWeights,
    UnsupportedModelError,
    accelerate,
    calibrate,
    fit_budget,
    remove,
    summary,
)
from pacevggt_patch.hosts.base import find_host
from pacevggt_patch.method import full_heads
from pacevggt_patch.mini import build_mini
from pacevggt_patch.mini.scenes.rooms import render_room
from pacevggt_patch.patching import first_clip
from pacevggt_patch.patching.install import state_of
from pacevggt_patch.weights import cache as kept

FIVE = ((1, 2), (3, 0), (4, 2), (6, 0), (6, 1))  # of VGGT-mini


@pytest.fixture(scope="module")
def room():
    return render_room(1_000_000, 4).images


@pytest.fixture
def other_mini():
    """VGGT-mini as another checkpoint, for which there are no weights."""
    model = build_mini()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    return model


@pytest.fixture
def found(monkeypatch):
    """Heads of tiny models are found, whatever their errors."""
    monkeypatch.setattr(full_heads, "LEAST_ERROR", 0.0)


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "pacevggt_patch"]


# ---- VGGT-mini


def test_calibrate_finds_the_five_heads_of_vggt_mini(room):
    assert calibrate(build_mini(), room).full_heads == FIVE


def test_the_first_clip_tells_the_five_heads_of_another_checkpoint(room, other_mini, cache, caplog):
    accelerate(other_mini)
    assert state_of(other_mini).pending and "first clip" in summary(other_mini).weights
    first = run(other_mini, room)
    weights = state_of(other_mini).weights
    assert weights.full_heads == FIVE and not state_of(other_mini).pending
    (line,) = said(caplog)
    assert "5 of 32 heads" in line and "block 1 head 2" in line and str(cache) in line
    # That very clip ran with them.
    assert_equal(run(other_mini, room), first)
    assert_equal(run(accelerate(remove(other_mini), weights=weights), room), first)
    # Another model of this checkpoint takes what is kept.
    accelerate(remove(other_mini))
    assert not state_of(other_mini).pending and str(cache) in summary(other_mini).weights
    assert_equal(run(other_mini, room), first)
    assert len(said(caplog)) == 1


def test_the_bundled_weights_come_first(cache):
    model = accelerate(build_mini())
    state = state_of(model)
    assert not state.pending and state.weights.full_heads == FIVE and "bundled" in state.weights.source
    assert kept.entries() == []


# ---- which clip


@pytest.mark.usefixtures("found")
def test_a_clip_that_is_too_short_waits_and_says_so_once(caplog):
    model = accelerate(tiny_vggt())
    images = random_images(3)
    expected = run(accelerate(tiny_vggt(), weights=None), images)
    with pytest.warns(UserWarning, match="3 frames is too short .*4"):
        first = run(model, images)
    assert_equal(first, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_equal(run(model, images), expected)
        accelerate(model, 0.4)  # nor once more with other settings
        run(model, images)
        assert state_of(model).pending and not said(caplog)
        run(model, random_images(4))
    assert not state_of(model).pending and len(said(caplog)) == 1
    assert len(state_of(model).weights.full_heads) == 1


def test_a_model_without_such_heads_is_told_of_none(monkeypatch, caplog):
    monkeypatch.setattr(full_heads, "LEAST_ERROR", float("inf"))
    run(accelerate(tiny_vggt(), 0.4), random_images(4))
    (line,) = said(caplog)
    assert "0 of 8 heads" in line and "none" not in line and "(" not in line


@pytest.mark.usefixtures("found")
def test_it_finds_what_calibrate_finds(caplog):
    for frames, group in ((4, 1), (6, 2)):
        model, images = tiny_vggt(group=group), random_images(frames, seed=frames)
        wanted = calibrate(model, images)
        run(accelerate(model), images)
        weights = state_of(model).weights
        assert weights.full_heads == wanted.full_heads and weights.fingerprints == wanted.fingerprints
        assert weights.training["calibrated_on"] == f"{frames} frames of the first clip"


@pytest.mark.usefixtures("found")
def test_of_a_long_clip_evenly_spread_frames_are_taken(monkeypatch, caplog):
    monkeypatch.setattr(first_clip, "MOST_FRAMES", 5)
    seen, real = [], first_clip.training_free_plan
    monkeypatch.setattr(first_clip, "training_free_plan", lambda s, f: seen.append(f.clone()) or real(s, f))
    model, images = tiny_vggt(), random_images(11, batch=2)
    taken = []
    model.aggregator.frame_blocks[0].register_forward_hook(lambda _, args, __: taken.append(args[0][:, 5:]))
    run(accelerate(model), images)
    assert torch.equal(seen[0], taken[0][[0, 2, 4, 6, 8]])  # of the first clip of the batch
    assert "5 frames" in said(caplog)[0]


@pytest.mark.usefixtures("found")
def test_clips_that_run_unpruned_do_not_calibrate():
    model = accelerate(tiny_vggt(), min_frames=6)
    run(model, random_images(4))
    assert state_of(model).pending
    assert not state_of(accelerate(tiny_vggt(), 1.0)).pending
    assert not state_of(accelerate(tiny_vggt(), mode="pre-aa")).pending
    assert not state_of(accelerate(tiny_vggt(), weights=None)).pending


@pytest.mark.usefixtures("found")
def test_settings_may_change_afterwards():
    """What was found stays, unless other weights are asked for."""
    model = accelerate(tiny_vggt())
    run(model, random_images(4))
    heads = state_of(model).weights.full_heads
    accelerate(model, 0.5)
    assert not state_of(model).pending and state_of(model).weights.full_heads == heads
    accelerate(model, 0.5, weights=None)
    assert state_of(model).weights is None and not state_of(model).pending
    accelerate(model, 0.5)
    assert state_of(model).pending
    other = with_heads(model, (0, 0))
    accelerate(model, 0.5, weights=other)
    accelerate(model, 0.5)
    assert state_of(model).pending  # given weights are not found ones


@pytest.mark.usefixtures("found")
def test_a_model_that_gets_another_checkpoint_is_calibrated_anew():
    model = accelerate(tiny_vggt())
    run(model, random_images(4))
    model.load_state_dict(tiny_vggt(seed=1).state_dict())
    accelerate(model)
    assert state_of(model).pending


@pytest.mark.usefixtures("found")
def test_hooks_and_random_numbers_are_left_alone():
    model, calls = tiny_vggt(), []
    for block in model.aggregator.global_blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    accelerate(model)
    before = torch.get_rng_state()
    run(model, random_images(4))
    assert len(calls) == 4 and torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("found")
def test_gradients_go_on_without():
    model, images = tiny_vggt(), random_images(4)
    expected = accelerate(tiny_vggt(), weights=None)(images)["depth"]
    accelerate(model)
    with pytest.warns(UserWarning, match="gradients"):
        out = model(images)["depth"]
    assert out.requires_grad and torch.equal(out, expected) and state_of(model).pending
    out.mean().backward()
    model.requires_grad_(False)  # nothing is recorded of a frozen model
    model(images)
    assert not state_of(model).pending


@pytest.mark.usefixtures("found")
def test_what_fails_is_said_once_and_left_out():
    model, images = tiny_vggt(), random_images(4)
    expected = run(accelerate(tiny_vggt(), weights=None), images)
    for block in model.aggregator.global_blocks:
        block.attn.fused_attn = False  # no call of scaled_dot_product_attention
    accelerate(model)
    with pytest.warns(UserWarning, match="calibration on the first clip failed"):
        found = run(model, images)
    torch.testing.assert_close(found["depth"], expected["depth"], rtol=1e-4, atol=1e-4)
    assert state_of(model).weights is None and not state_of(model).pending


@pytest.mark.usefixtures("found")
def test_inference_mode_leaves_weights_that_can_be_copied():
    model, images = tiny_vggt(), random_images(4)
    accelerate(model)
    with torch.inference_mode():
        expected = model(images)
    weights = state_of(model).weights
    assert_equal(run(accelerate(tiny_vggt(), weights=weights), images), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("found")
def test_models_in_other_dtypes_are_calibrated(dtype, cache):
    model = tiny_vggt()
    model.aggregator.to(dtype)
    accelerate(model)
    with torch.inference_mode():
        model.aggregator(random_images(4).to(dtype))
    assert len(state_of(model).weights.full_heads) == 1 and len(kept.entries()) == 1
    other = tiny_vggt()
    other.aggregator.to(dtype)
    assert not state_of(accelerate(other)).pending


@pytest.mark.usefixtures("found")
def test_threads_that_meet_at_the_first_clip_get_one_set_of_heads(cache):
    model = accelerate(tiny_vggt())
    images = random_images(4)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: run(model, images), range(4)):
            assert out["depth"].isfinite().all()
    heads = state_of(model).weights.full_heads
    assert heads == calibrate(tiny_vggt(), images).full_heads and len(kept.entries()) == 1
    again = run(model, images)
    assert_equal(again, run(accelerate(tiny_vggt(), weights=state_of(model).weights), images))


# ---- the files


def store_one(seed: int = 0, head: tuple[int, int] = (1, 0)) -> tuple[Path | None, torch.nn.Module]:
    model = tiny_vggt(seed=seed)
    return kept.store(PaceWeights.of_heads(find_host(model), (head,), {})), model


def test_kept_calibrations_are_found_by_their_checkpoint(cache):
    assert kept.find(find_host(tiny_vggt())) is None and kept.entries() == []
    paths = [store_one(seed, (seed, 0))[0] for seed in (0, 1)]
    assert len(kept.entries()) == 2 and all(path.parent == cache for path in paths)
    for seed in (0, 1):
        assert kept.find(find_host(tiny_vggt(seed=seed))).full_heads == ((seed, 0),)
    assert kept.find(find_host(tiny_vggt(seed=2))) is None
    store_one(0, (2, 1))  # anew
    assert len(kept.entries()) == 2 and kept.find(find_host(tiny_vggt())).full_heads == ((2, 1),)
    assert kept.clear() == 2 and kept.entries() == [] and kept.clear() == 0


def test_a_narrow_copy_of_a_model_is_the_same_checkpoint(cache):
    store_one()
    assert kept.find(find_host(tiny_vggt().bfloat16())).full_heads == ((1, 0),)


@pytest.mark.parametrize("word", ["off", "OFF", "0", "none"])
def test_nothing_is_kept_where_that_is_switched_off(word, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PACEVGGT_CACHE", word)
    assert kept.folder() is None and store_one()[0] is None
    assert kept.entries() == [] and kept.clear() == 0 and list(tmp_path.iterdir()) == []


def test_where_calibrations_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PACEVGGT_CACHE", "~/mine")
    assert kept.folder() == tmp_path / "mine"
    monkeypatch.delenv("PACEVGGT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kept.folder() == tmp_path / "xdg" / "pacevggt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kept.folder() == tmp_path / ".cache" / "pacevggt"


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\0" * 100, "cut"])
def test_a_broken_file_counts_as_none_and_is_written_anew(content, cache):
    path, model = store_one()
    path.write_bytes(path.read_bytes()[:-9] if content == "cut" else content)
    (cache / "heads-other.safetensors").write_bytes(b"?")
    (cache / "readme.txt").write_text("not ours")
    assert kept.find(find_host(model)) is None
    assert state_of(accelerate(model)).pending
    store_one()
    assert kept.find(find_host(model)).full_heads == ((1, 0),)
    assert kept.clear() == 2 and [p.name for p in cache.iterdir()] == ["readme.txt"]


@pytest.mark.usefixtures("found")
def test_a_folder_that_can_not_be_written_keeps_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PACEVGGT_CACHE", str(tmp_path / "file" / "kept"))
    model = accelerate(tiny_vggt())
    run(model, random_images(4))
    assert len(state_of(model).weights.full_heads) == 1 and "kept in" not in said(caplog)[0]


def test_threads_that_write_at_once_leave_one_whole_file(cache):
    model = tiny_vggt()
    host = find_host(model)
    weights = [PaceWeights.of_heads(host, ((i % 4, 0),), {}) for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(kept.store, weights))
    assert len(paths) == 1 and list(cache.iterdir()) == [*paths]
    assert kept.find(host).full_heads in {((i, 0),) for i in range(4)}


SCRIPT = """
import logging, sys
sys.path.insert(0, sys.argv[1])
logging.basicConfig(stream=sys.stdout, format="%(name)s")
from hosts import random_images, run, tiny_vggt
from pacevggt_patch import accelerate, summary
from pacevggt_patch.method import full_heads
full_heads.LEAST_ERROR = 0.0
model = accelerate(tiny_vggt())
run(model, random_images(4))
print(summary(model).weights)
"""


def test_processes_share_what_is_kept(cache):
    """Two at once that both calibrate, then one that finds it."""
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parent.parent
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root)
        for _ in range(2)
    ]
    assert all("1 full-attention head;" in process.communicate()[0] for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert len(list(cache.iterdir())) == 1
    model = accelerate(tiny_vggt())
    assert not state_of(model).pending and str(cache) in summary(model).weights


@pytest.mark.usefixtures("found")
def test_images_far_from_the_unit_range_calibrate_nothing(cache):
    """A wrong calibration would be kept."""
    model, images = accelerate(tiny_vggt()), random_images(5)
    with pytest.warns(UserWarning, match=r"far from \[0, 1\]"):
        run(model, images * 255)
    assert state_of(model).pending and not kept.entries()
    run(model, images)
    assert not state_of(model).pending and len(kept.entries()) == 1
    with pytest.raises(PaceError, match=r"in \[0, 1\]"):
        calibrate(tiny_vggt(), images * 255)


def test_a_model_without_values_is_not_measured():
    with pytest.raises(UnsupportedModelError, match="no values"):
        fit_budget(tiny_vggt().to("meta"), 2, (56, 56), seconds=5, weights=None)
    model = tiny_vggt()
    model.aggregator.global_blocks[1].to("meta")
    for mode in ("global", "pre-aa"):
        with pytest.raises(UnsupportedModelError, match="offloaded"):
            calibrate(model, random_images(4), mode=mode)
