"""The script for VGGT-1B, on a small model of the same code that comes from a Hub, and a small 7-Scenes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from hosts import LAYERS
from seven_scenes import write_scene
from torch import nn
from vggt.heads.camera_head import CameraHead
from vggt.heads.dpt_head import DPTHead
from vggt.layers.vision_transformer import DinoVisionTransformer
from vggt.models import aggregator, vggt

from pacevggt_patch import PaceError, PaceWeights, is_accelerated, summary
from pacevggt_patch.clips import load_seven_scenes
from pacevggt_patch.clips.seven_scenes import Calibration
from pacevggt_patch.evaluation import evaluate_predictions

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
DEPTH, NUM_HEADS = 17, 16  # the published heads lie in blocks 11 to 15 of 16 heads


class SmallVGGT(vggt.VGGT):
    """Stock parts in small sizes, which config.json gives as it gives those of VGGT-1B."""

    def __init__(self, embed_dim: int = 8, depth: int = 2, num_heads: int = 2):
        nn.Module.__init__(self)
        self.aggregator = aggregator.Aggregator(
            img_size=56, embed_dim=embed_dim, depth=depth, num_heads=num_heads, patch_embed="conv",
            cached_layer_indices=LAYERS, init_values=1.0,
        )  # fmt: skip
        self.aggregator.patch_embed = DinoVisionTransformer(
            img_size=56, patch_size=14, embed_dim=embed_dim, depth=1, num_heads=2, init_values=None, block_chunks=0,
            num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0,
        )  # fmt: skip
        self.camera_head = CameraHead(dim_in=2 * embed_dim, trunk_depth=1, num_heads=2, init_values=1.0)
        dpt = dict(features=8, out_channels=[8, 8, 8, 8], intermediate_layer_idx=list(LAYERS))
        self.depth_head = DPTHead(
            2 * embed_dim, output_dim=2, activation="exp", conf_activation="expp1", **dpt
        )
        self.point_head = DPTHead(
            2 * embed_dim, output_dim=4, activation="inv_log", conf_activation="expp1", **dpt
        )
        self.track_head = None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The files of a repository: random weights, and their sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallVGGT(embed_dim=64, depth=DEPTH, num_heads=NUM_HEADS)
        with torch.no_grad():
            for parameter in model.parameters():  # else tokens hardly differ
                parameter.add_(0.1 * torch.randn_like(parameter))
            for block in model.aggregator.global_blocks[11:16]:  # whose heads look for single tokens
                block.attn.q_norm.weight.mul_(6)
                block.attn.proj.weight.mul_(4)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["depth"] == DEPTH
    return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("7scenes")
    for name, sequences, test in (("chess", {1: 4, 3: 4}, (3,)), ("fire", {4: 5}, (4,))):
        write_scene(folder / name, sequences, test, Calibration())
    (folder / "notes").mkdir()
    return folder


@pytest.fixture
def script(hub, checkpoint, monkeypatch):
    """The script, with the small class in the place of VGGT."""
    hub.repository("facebook/VGGT-1B").commit(checkpoint)
    monkeypatch.setattr(vggt, "VGGT", SmallVGGT)
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("vggt_1b", BENCHMARKS / "vggt_1b.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(scenes, out, *more):
    given = ["--scenes", str(scenes), "--out", str(out), "--device", "cpu", "--width", "56"]
    return [*given, "--stride", "1", "--frames", "4", "--repeats", "1", *more]


def report_of(out):
    return json.loads((out / "report.json").read_text())


def test_everything_is_measured_once(script, scenes, hub, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert script.main(arguments(scenes, out)) == 0
    fetched = {request.split("/")[-1] for request in hub.requests if "facebook/VGGT-1B" in request}
    assert {"config.json", "model.safetensors"} <= fetched
    report = report_of(out)
    assert (report["backbone"], report["size"], report["keep_ratio"]) == ("facebook/VGGT-1B", "42x56", 0.3)

    found = report["calibration"]
    assert (found["clip"], found["frames"]) == ("chess seq-01", 4)
    assert torch.tensor(found["errors"]).shape == (DEPTH, NUM_HEADS)
    published = {tuple(head) for head in found["published_found"] + found["published_missed"]}
    assert published == {(11, 14), (13, 10), (13, 15), (14, 4), (14, 10), (14, 14), (15, 8)}
    assert len(found["published_found"]) + found["others"] == len(found["full_heads"]) > 0
    least = min(found["errors"][block][head] for block, head in found["full_heads"])
    assert all(found["errors"][block][head] <= least for block, head in found["published_missed"])
    assert [list(head) for head in PaceWeights.load(out / "heads.safetensors").full_heads] == found[
        "full_heads"
    ]

    stock, pace = report["speed"]
    assert (stock["variant"], pace["variant"], pace["frames"]) == ("stock", "pace", 4)
    assert pace["speedup"] == pytest.approx(stock["seconds_median"] / pace["seconds_median"])
    clips = [(row["scene"], row["sequence"], row["frames"]) for row in report["quality"]]
    assert clips == [("chess", 3, 4), ("fire", 4, 5)]
    # As the model itself gives it, loaded and called by hand.
    model = SmallVGGT.from_pretrained("facebook/VGGT-1B").eval()
    clip = load_seven_scenes(scenes / "fire", sequence=4, width=56)
    with torch.inference_mode():
        expected = evaluate_predictions(model(clip.images), clip)
    assert report["quality"][1]["stock"] == pytest.approx(expected)
    assert report["quality"][1]["stock"] != report["quality"][1]["pace"]
    for row, variant in zip(report["means"], ("stock", "pace"), strict=True):
        values = [clip[variant]["absrel"] for clip in report["quality"]]
        assert row["absrel"] == pytest.approx(sum(values) / 2)
    printed = capsys.readouterr().out
    assert f"of the 7 correspondence heads of SAF3R: {len(found['published_found'])} found" in printed
    assert "about" in printed and str(out / "report.json") in printed

    def again(*_):
        raise AssertionError("measured twice")

    for name in ("measure", "judge", "find_full_heads"):
        monkeypatch.setattr(script, name, again)
    assert script.main(arguments(scenes, out)) == 0
    assert report_of(out) == report


def test_an_interrupted_run_goes_on(script, scenes, tmp_path, monkeypatch):
    real = script.judge

    def interrupted(bench, clip, args):
        if clip[0] == "fire":
            raise KeyboardInterrupt
        return real(bench, clip, args)

    monkeypatch.setattr(script, "judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments(scenes, tmp_path))
    before = report_of(tmp_path)
    assert [row["scene"] for row in before["quality"]] == ["chess"] and before["means"] is None
    judged = []
    monkeypatch.setattr(
        script, "judge", lambda bench, clip, args: judged.append(clip) or real(bench, clip, args)
    )
    assert script.main(arguments(scenes, tmp_path)) == 0
    after = report_of(tmp_path)
    assert [clip[0] for clip in judged] == ["fire"]
    assert after["quality"][0] == before["quality"][0] and after["speed"] == before["speed"]
    assert len(after["quality"]) == 2 and after["means"][0]["absrel"] > 0


def test_what_does_not_fit_into_memory_is_said(script, scenes, tmp_path, monkeypatch, capsys):
    forward = SmallVGGT.forward

    def scarce(self, images):
        """Of five frames, and in the timed runs, the stock model has no room."""
        unpruned = not is_accelerated(self) or summary(self).paused
        if unpruned and (images.ndim == 5 or images.shape[0] == 5):
            raise torch.cuda.OutOfMemoryError
        return forward(self, images)

    monkeypatch.setattr(SmallVGGT, "forward", scarce)
    assert script.main(arguments(scenes, tmp_path)) == 0
    report = report_of(tmp_path)
    stock, pace = report["speed"]
    assert stock["seconds_median"] is None and pace["seconds_median"] > 0 and pace["speedup"] is None
    chess, fire = report["quality"]
    assert chess["out_of_memory"] == [] and fire["out_of_memory"] == ["stock"]
    assert fire["stock"] is None and fire["pace"]["absrel"] > 0
    assert report["means"][0]["absrel"] == chess["stock"]["absrel"]  # of the clip that both ran on
    printed = capsys.readouterr().out
    assert "out of memory" in printed and "fire/seq-04 (5 frames): stock" in printed


def test_quick_is_one_clip(script, scenes):
    args = script.parse_arguments(arguments(scenes, "out", "--quick"))
    assert args.frames == [24] and args.repeats == 1
    assert script.find_clips(args) == [("chess", 3, 4)]


def test_heads_are_compared(script):
    found = script.compare_heads(((3, 1), (11, 14), (15, 0), (15, 8)))
    assert found["published_found"] == [[11, 14], [15, 8]] and found["others"] == 2
    assert found["published_missed"] == [[13, 10], [13, 15], [14, 4], [14, 10], [14, 14]]
    assert script.has_published((24, 16)) and script.has_published((16, 16))
    assert not script.has_published((15, 16)) and not script.has_published((24, 15))


def test_other_settings_do_not_go_on(script, scenes, tmp_path, monkeypatch):
    assert script.main(arguments(scenes, tmp_path, "--clip-frames", "4")) == 0
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(PaceError) as caught:
        script.main(arguments(scenes, tmp_path, "--clip-frames", "5"))
    assert "clip_frames" in str(caught.value) and "--out" in str(caught.value)
    assert (tmp_path / "report.json").read_bytes() == before
    (tmp_path / "report.json").write_text("[1]")
    with pytest.raises(PaceError, match="report.json"):
        script.main(arguments(scenes, tmp_path))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: (folder / "notes.txt").write_text("mine"), None),
        (lambda folder: (folder / "fire/seq-04/frame-000003.depth.png").unlink(), ["frame-000003.depth.png"]),
        (
            lambda folder: (folder / "chess/seq-03/frame-000001.pose.txt").write_text("nan"),
            ["frame-000001.pose.txt"],
        ),
        (lambda folder: shutil.rmtree(folder / "chess/seq-01"), ["unpack seq-01.zip"]),
        (lambda folder: [shutil.rmtree(folder / name) for name in ("chess", "fire")], ["TestSplit.txt"]),
    ],
)
def test_what_is_wrong_is_told_before_the_model_is_loaded(
    break_it, words, script, scenes, tmp_path, monkeypatch
):
    class Loaded(Exception):
        pass

    def load(*_):
        raise Loaded

    monkeypatch.setattr(script, "load_backbone", load)
    folder = shutil.copytree(scenes, tmp_path / "scenes")
    break_it(folder)
    with pytest.raises(Loaded if words is None else PaceError) as caught:
        script.main(arguments(folder, tmp_path / "out"))
    assert all(word in str(caught.value) for word in words or [])


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--width", "57"], "--width"),
        (["--frames", "1"], "--frames"),
        (["--stride", "0"], "--stride"),
        (["--clip-frames", "2"], "--clip-frames"),
        (["--device", "abacus"], "abacus"),
        (["--backbone", "user/none"], "user/none"),
    ],
)
def test_arguments_that_do_not_fit(more, word, script, scenes, tmp_path):
    with pytest.raises(PaceError, match=word):
        script.main(arguments(scenes, tmp_path, *more))
