"""The benchmark scripts run and write the rows they promise; no figure is judged here."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import hosts_doubles
import numpy as np
import pytest
import torch
from PIL import Image

from pacevggt_patch import PaceConfig, PaceError, PaceWeights
from pacevggt_patch.clips import save_clip
from pacevggt_patch.mini import build_mini
from pacevggt_patch.mini.scenes.rooms import render_room

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUICK = ["--device", "cpu", "--size", "28x42", "--break-even-frames", ""]
SMALL = [*QUICK, "--repeats", "2", "--mode", "pre-aa", "--merge-budget", "0.1"]


def test_latency(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    latency, file, picture = script("latency"), tmp_path / "latency.json", tmp_path / "latency.png"
    arguments = [
        "--frames",
        "1,3",
        "--pace-frames",
        "4",
        "--once-frames",
        "5",
        "--keep-ratios",
        "0.4,0.2",
        *SMALL,
    ]
    arguments += ["--head-dtype", "bfloat16", "--break-even-frames", "1"]
    arguments += ["--budget-frames", "3", "--plot", str(picture), "--json", str(file)]
    assert latency.main(arguments) == 0
    report = json.loads(file.read_text())
    assert report["environment"]["torch"] == torch.__version__
    assert (report["compile"], report["head_dtype"], report["attention"]) == (False, "bfloat16", "torch SDPA")
    assert report["first_call_seconds"] > 0
    ratios = (None, 0.4, 0.2)  # None is stock
    settings = [(n, ratio) for n in (1, 3) for ratio in ratios] + [(4, 0.4), (4, 0.2), (5, 0.4)]
    assert [
        (r["frames"], r["keep_ratio"] if r["variant"] == "pace" else None) for r in report["rows"]
    ] == settings
    assert report["rows"][0].keys() == {
        "variant", "frames", "keep_ratio", "merge_budget", "runs", "seconds_median", "seconds_min", "seconds_max",
        "peak_gib", "speedup", "tflop", "tflop_per_second", "floor_seconds", "floor_share",
    }  # fmt: skip
    stock, pace, less = report["rows"][3:6]
    assert (pace["keep_ratio"], pace["merge_budget"], pace["peak_gib"], pace["runs"]) == (0.4, 0.1, None, 2)
    assert pace["seconds_min"] <= pace["seconds_median"] <= pace["seconds_max"]
    assert pace["speedup"] == pytest.approx(stock["seconds_median"] / pace["seconds_median"])
    assert stock["tflop"] > pace["tflop"] > less["tflop"] > 0
    assert pace["tflop_per_second"] == pytest.approx(pace["tflop"] / pace["seconds_median"])
    assert pace["floor_share"] == pytest.approx(pace["floor_seconds"] / pace["seconds_median"])
    alone, once = report["rows"][6], report["rows"][8]
    assert alone["speedup"] is once["speedup"] is None and once["runs"] == 1
    assert once["seconds_min"] == once["seconds_max"]

    # Stages, for all but the size that runs once.
    assert [(d["frames"], d["variant"]) for d in report["details"]] == [
        (n, "pace" if ratio else "stock") for n, ratio in settings[:-1]
    ]
    names = [stage["stage"] for stage in report["details"][1]["stages"]]
    assert set(names) == {
        "DINO", "selection", "merging", "frame blocks", "global blocks", "restoration", "camera_head",
        "depth_head", "point_head", "other",
    }  # fmt: skip
    stage = report["details"][1]["stages"][0]
    assert stage["seconds"] > 0 and stage["floor_share"] == pytest.approx(
        stage["floor_seconds"] / stage["seconds"]
    )
    assert (
        report["details"][1]["kernels"] is report["details"][1]["host_syncs"] is None
    )  # the CPU has neither

    assert report["largest_frames"] is None and report["skipped"] == []
    assert report["break_even_frames"].keys() == {"0.4", "0.2"}
    checked = report["budget"]
    assert [(row["frames"], row["keep_ratio"]) for row in checked] == [(3, 0.4), (3, 0.2)]
    assert checked[0]["measured_seconds"] == pace["seconds_median"]
    assert checked[0]["error"] == pytest.approx(checked[0]["predicted_seconds"] / pace["seconds_median"] - 1)
    out = capsys.readouterr().out
    assert (
        "about" in out and "speed-up" in out and "not measured on the CPU" in out and "fit_budget, 3" in out
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mode", ["global", "pre-aa"])
def test_noise(mode, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("pacevggt_patch.runtime.compiling.BACKEND", "eager")
    file = tmp_path / "noise.json"
    arguments = ["--device", "cpu", "--size", "28x42", "--frames", "2", "--keep-ratios", "0.4"]
    arguments += ["--mode", mode]
    assert script("noise").main([*arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    pairs = [("plain", "float32"), ("fast", "float32"), ("fast", "plain")]
    assert [(row["keep_ratio"], (row["of"], row["from"])) for row in rows] == [
        (k, p) for k in (1.0, 0.4) for p in pairs
    ]
    for row in rows[:3]:
        assert row["kept"] == 1 and all(0 < row[name] < 0.05 for name in ("tokens", "pose_enc", "depth"))
    assert all(0 < row["kept"] <= 1 for row in rows[3:])
    assert "same tokens kept 100.0%" in capsys.readouterr().out


def test_latency_of_global_pruning(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    latency, file = script("latency"), tmp_path / "latency.json"
    small = [*QUICK, "--repeats", "1", "--frames", "2"]
    assert latency.main([*small, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert (report["mode"], report["full_heads"]) == ("global", "0")
    assert report["break_even_frames"] == {}  # not tried, which is not "never"
    stock, pace = ({stage["stage"]: stage for stage in d["stages"]} for d in report["details"])
    assert (
        "propagation" in pace and not {"restoration", "merging"} & pace.keys() and "propagation" not in stock
    )
    assert pace["frame blocks"]["tflop"] == stock["frame blocks"]["tflop"]
    assert pace["global blocks"]["tflop"] < stock["global blocks"]["tflop"]
    assert "global pruning" in capsys.readouterr().out
    for heads in ("3", "1/2,3/0,6/1"):
        assert latency.main([*small, "--full-heads", heads, "--json", str(file)]) == 0
        report = json.loads(file.read_text())
        assert report["full_heads"] == heads
        _, more = ({stage["stage"]: stage for stage in d["stages"]} for d in report["details"])
        assert more["global blocks"]["tflop"] > pace["global blocks"]["tflop"]
    for heads in ("33", "8/0", "x", "published"):
        with pytest.raises(PaceError, match=f"--full-heads {heads}"):
            latency.main([*small, "--full-heads", heads])


def test_latency_where_stock_runs_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    latency = script("latency")
    import bench

    real = bench.time_interleaved

    def scarce(runs, *args, **kwargs):
        if "None" in runs:
            raise torch.cuda.OutOfMemoryError
        return real(runs, *args, **kwargs)

    monkeypatch.setattr(bench, "time_interleaved", scarce)
    file = tmp_path / "latency.json"
    assert latency.main([*QUICK, "--frames", "2", "--repeats", "1", "--json", str(file)]) == 0
    stock, pace = json.loads(file.read_text())["rows"]
    assert stock["seconds_median"] is stock["speedup"] is pace["speedup"] is None
    assert pace["seconds_median"] > 0


def test_latency_keeps_to_its_minutes_and_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    latency, file = script("latency"), tmp_path / "latency.json"
    assert latency.main([*SMALL, "--frames", "1", "--minutes", "0", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert (report["rows"], report["skipped"]) == ([], [{"frames": 1, "reason": "--minutes 0"}])
    assert "1 frames: skipped, --minutes 0" in capsys.readouterr().out

    def interrupted(bench, job):
        if job.frames == 2:
            raise KeyboardInterrupt
        return real(bench, job)

    real = latency.measure
    monkeypatch.setattr(latency, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        latency.main([*SMALL, "--frames", "1,2", "--json", str(file)])
    assert [row["frames"] for row in json.loads(file.read_text())["rows"]] == [1, 1]


def test_latency_beside_another_code(tmp_path, monkeypatch, capsys):
    from hosts import fork_of_vggt

    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("sys.path", [*sys.path])
    fork_of_vggt(tmp_path / "fork", "vggt")
    code = tmp_path / "fork" / "vggt" / "models" / "vggt.py"
    picky = """
print("{not a row}")
stock = VGGT.forward
def picky(self, images):
    if images.shape[1] == 2:
        raise ValueError("not two frames")
    return stock(self, images)
VGGT.forward = picky
"""
    code.write_text(code.read_text() + picky)
    (tmp_path / "half" / "vggt" / "models").mkdir(parents=True)  # must not be joined with the installed one
    latency, file = script("latency"), tmp_path / "latency.json"
    folders = [tmp_path / "fork", tmp_path / "half", tmp_path / "none"]
    compare = [argument for folder in folders for argument in ("--compare", str(folder))]
    assert latency.main([*SMALL, "--frames", "1,2", *compare, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    (stock,) = (row for row in rows if (row["variant"], row["frames"]) == ("stock", 1))
    (other,) = (row for row in rows if (row["variant"], row["frames"]) == ("fork", 1))
    assert other["seconds_min"] <= other["seconds_median"] <= other["seconds_max"]
    assert other["speedup"] == pytest.approx(stock["seconds_median"] / other["seconds_median"])
    failed = [row for row in rows if "error" in row]
    assert [(row["variant"], row["frames"]) for row in failed] == [
        ("fork", 2), ("half", 1), ("half", 2), ("none", 1), ("none", 2),
    ]  # fmt: skip
    assert failed[0]["error"] == "ValueError: not two frames"
    assert "No module named 'vggt." in failed[1]["error"]
    assert "has no folder vggt/models: pass the folder that holds the vggt package" in failed[3]["error"]
    assert "ValueError: not two frames" in capsys.readouterr().out


def test_largest_clip_for_a_card(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    latency = script("latency")
    rows = [
        {"variant": "pace", "keep_ratio": 0.3, "frames": n, "peak_gib": 3 + 0.02 * n}
        for n in (100, 300, 1000)
    ]
    rows += [{"variant": "pace", "keep_ratio": 0.3, "frames": 9000, "peak_gib": None}]
    rows += [{"variant": "stock", "keep_ratio": 1.0, "frames": 100, "peak_gib": 9.0}]
    rows += [{"variant": "fork", "frames": n, "peak_gib": 10.0 + n, "keep_ratio": None} for n in (1, 2)]
    lines = latency.largest_frames(rows)
    found = {
        line["card_gib"]: (line["frames"], line["measured"]) for line in lines if line["variant"] == "pace"
    }
    expected = {12: 400, 16: 600, 24: 1000, 40: 1800, 80: 3800}  # (card - 1 - 3) / 0.02
    assert {card: frames for card, (frames, _) in found.items()} == pytest.approx(expected, abs=1)
    assert [found[card][1] for card in (12, 16, 40, 80)] == [True, True, False, False]
    report = dict(
        backbone="x", size="1x1", precision="p", repeats=1, rows=[], details=[], skipped=[], budget=[]
    )
    latency.print_report(report | {"largest_frames": lines, "break_even_frames": {"0.3": 4}})
    out = capsys.readouterr().out
    assert "largest N in 12 GB, pace keep 0.3: 400 (measured)" in out.replace("399", "400")
    assert "largest N in 16 GB, fork: 5 (extrapolated)" in out and "stock" not in out


def test_models_whose_times_would_mislead_are_refused(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import models

    model, cpu = build_mini(), torch.device("cpu")
    models.check_values(model, (28, 28), "float32", cpu)
    with torch.no_grad():
        model.aggregator.global_blocks[-1].mlp.fc2.bias.fill_(float("nan"))
    with pytest.raises(PaceError, match="hold NaN or are all alike"):
        models.check_values(model, (28, 28), "float32", cpu)


def test_quality_of_the_default(tmp_path, capsys):
    quality, file = script("quality"), tmp_path / "quality.json"
    arguments = ["--count", "2", "--frames", "2", "--seed", "7"]
    assert quality.main([*arguments, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert (report["clips"], report["count"], report["frames"], report["seeds"]) == ("rooms", 2, 2, [7, 8])
    assert report["environment"]["torch"] == torch.__version__ and report["scale_weights"] == 0
    unpruned, pruned = report["rows"]
    default = PaceConfig()
    assert unpruned["keep_ratio"] == 1 and unpruned["absrel_change"] == 0
    assert (pruned["keep_ratio"], pruned["mode"], pruned["merge_budget"]) == (
        default.keep_ratio,
        "global",
        None,
    )
    assert pruned["weights"].startswith("bundled pace-vggt-mini-global") and len(pruned["full_heads"]) == 5
    clips = [clip["absrel"] for clip in pruned["per_clip"]]
    before = [clip["absrel"] for clip in unpruned["per_clip"]]
    assert clips[0] != before[0] and len(clips) == len(before) == 2
    assert pruned["absrel"] == pytest.approx(sum(clips) / 2)
    assert (pruned["absrel_min"], pruned["absrel_max"]) == (min(clips), max(clips))
    assert pruned["absrel_std"] == pytest.approx((max(clips) - min(clips)) / 2**0.5)
    assert pruned["absrel_change"] == pytest.approx(100 * (sum(clips) / sum(before) - 1))
    apart = [one - other for one, other in zip(clips, before, strict=True)]
    error = 100 * abs(apart[0] - apart[1]) / sum(before)  # of two: their distance, halved, over the mean
    assert pruned["absrel_change_error"] == pytest.approx(error)
    assert "AUC@30" in capsys.readouterr().out


def test_quality_of_weights_without_a_file(tmp_path, cache):
    cache.mkdir()
    (cache / "heads-of-another-run.safetensors").write_text("must not be read")
    quality, file = script("quality"), tmp_path / "quality.json"
    arguments = ["--count", "1", "--frames", "4", "--scale-weights", "1e-3", "--keep-ratios", "0.3,0.15"]
    assert quality.main([*arguments, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["scale_weights"] == 1e-3
    for row in report["rows"][1:]:
        assert row["weights"].startswith("calibrated on the first clip")
        assert row["calibrated_on"] == "4 frames of the first clip"
    assert len(list(cache.iterdir())) == 1


def test_quality_with_settings(tmp_path, monkeypatch):
    # As for so short clips on a GPU.
    monkeypatch.setattr("pacevggt_patch.patching.state.pruning_pays", lambda *_: False)
    quality, file = script("quality"), tmp_path / "quality.json"
    arguments = ["--count", "1", "--frames", "2", "--keep-ratios", "0.3", "--merge-budget", "0.5"]
    arguments += ["--mode", "pre-aa", "--weights", "none", "--head-dtype", "bfloat16"]
    with pytest.raises(
        PaceError, match="^a clip of 2 frames ran unpruned, as the faster one here: pass --min-"
    ):
        quality.main([*arguments, "--json", str(file)])
    assert quality.main([*arguments, "--min-frames", "1", "--json", str(file)]) == 0
    _, pruned = json.loads(file.read_text())["rows"]
    found = [pruned[name] for name in ("mode", "merge_budget", "head_dtype", "weights", "full_heads")]
    assert found == ["pre-aa", 0.5, "bfloat16", "none (training-free)", []]


def test_quality_on_a_folder(tmp_path):
    quality = script("quality")
    save_clip(render_room(3, 6), tmp_path / "clip")
    file = tmp_path / "quality.json"
    arguments = ["--clips", str(tmp_path / "clip"), "--frames", "2", "--stride", "2", "--starts", "0,3"]
    assert quality.main([*arguments, "--keep-ratios", "1.0", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert (report["clips"], report["count"], report["frames"]) == ("clip", 2, 2)
    assert (report["starts"], report["stride"], report["seeds"]) == ([0, 3], 2, None)
    stock, same = report["rows"]  # of one that keeps all tokens
    assert stock["per_clip"] == same["per_clip"]
    with pytest.raises(PaceError, match="has 6 frames"):
        quality.main([*arguments, "--starts", "0,5", "--json", str(file)])


def test_a_metric_that_some_clips_lack_is_not_averaged():
    quality = script("quality")
    every, none = dict.fromkeys(quality.METRICS, 1.0), dict.fromkeys(quality.METRICS)
    with pytest.raises(PaceError, match="auc5 is defined for 1 of 2 clips only: its mean would mislead"):
        quality.make_row({}, [every, none], [every, every])
    row = quality.make_row({}, [none, none], [none, none])
    assert row["auc5"] is row["auc5_min"] is row["auc5_change"] is row["auc5_change_error"] is None


def test_pace_quality(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    # As for so short clips on a GPU.
    monkeypatch.setattr("pacevggt_patch.patching.state.pruning_pays", lambda *_: False)
    pace_quality = script("pace_quality")
    model = build_mini()
    for run in range(2):
        folder = tmp_path / f"run-{run}"
        folder.mkdir()
        for number, name in enumerate(("calibrated", "distilled", "pace")):
            weights = PaceWeights.new(model, mode="pre-aa")
            with torch.no_grad():
                generator = torch.Generator().manual_seed(run)
                weights.merge.out.bias.normal_(std=0.3 * number, generator=generator)
            weights.save(folder / f"{name}.safetensors")
    arguments = ["--count", "1", "--frames", "2", "--keep-ratios", "0.2", "--mode", "pre-aa"]
    arguments += ["--runs", str(tmp_path / "run-0"), str(tmp_path / "run-1")]
    file, picture = tmp_path / "table.json", tmp_path / "table.png"
    assert pace_quality.main([*arguments, "--json", str(file), "--plot", str(picture)]) == 0
    report = json.loads(file.read_text())
    assert (report["mode"], report["seeds"]) == ("pre-aa", [1_000_000])
    rows = {row["stage"]: row for row in report["rows"]}
    assert list(rows) == ["unpruned", "training-free", "calibrated", "distilled", "refined"]
    assert [row["runs"] for row in rows.values()] == [1, 1, 2, 2, 2]
    unpruned, free, refined = rows["unpruned"], rows["training-free"], rows["refined"]
    assert (unpruned["keep_ratio"], refined["keep_ratio"]) == (1.0, 0.2)
    # Untrained weights are the training-free setting; the others differ by run.
    assert rows["calibrated"]["absrel"] == pytest.approx(free["absrel"])
    assert rows["calibrated"]["absrel_loss_share"] == pytest.approx(100, rel=1e-4)
    assert rows["calibrated"]["absrel_std"] == pytest.approx(0, abs=1e-9)
    assert refined["absrel_std"] > 0 and unpruned["absrel_std"] is None
    expected = 100 * (refined["absrel"] / unpruned["absrel"] - 1)
    assert refined["absrel_change"] == pytest.approx(expected)
    share = 100 * (refined["absrel"] - unpruned["absrel"]) / (free["absrel"] - unpruned["absrel"])
    assert refined["absrel_loss_share"] == pytest.approx(share)
    assert picture.stat().st_size > 5000
    assert "refined" in capsys.readouterr().out


def test_head_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    head_errors, file, picture = script("head_errors"), tmp_path / "heads.json", tmp_path / "heads.png"
    real = head_errors.alone
    # Four of the heads: each takes a forward.
    monkeypatch.setattr(head_errors, "alone", lambda model, clips, *_: real(model, clips, 1, 4))
    arguments = ["--count", "1", "--frames", "2", "--alone", "--json", str(file), "--plot", str(picture)]
    assert head_errors.main(arguments) == 0
    report = json.loads(file.read_text())
    errors = torch.tensor(report["errors"])
    assert errors.shape == (8, 4) and (errors > 0).all()
    for block, head in report["full_heads"]:
        assert errors[block, head] >= report["least_error"]
    assert [len(row) for row in report["alone"]] == [4]
    assert all(found["depth"] > 0 for found in report["alone"][0])
    assert "full-attention heads (block, head): (" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_tables_of_the_documentation_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    tables = script("write_tables")
    for path, name, table in tables.TABLES:
        text = path.read_text()
        assert tables.filled(text, name, table()) == text, f"{path}: run benchmarks/write_tables.py"
        with pytest.raises(PaceError, match=f"^there must be one <!-- {name} --> and one <!-- /{name} -->$"):
            tables.filled(text.replace(f"<!-- /{name} -->", ""), name, table())


@pytest.mark.parametrize(
    ("mode", "heads", "views"), [("global", 5, (2, 3)), ("global", 0, (2,)), ("pre-aa", 0, (2,))]
)
def test_train_step(mode, heads, views, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    train_step, file = script("train_step"), tmp_path / "step.json"
    arguments = ["--backbone", "mini", "--device", "cpu", "--size", "28", "42", "--views", *map(str, views)]
    arguments += ["--clips", "2", "--supervised-frames", "1", "--repeats", "2", "--json", str(file)]
    seen, real = [], train_step.Fit.step
    step = lambda fit, drawn: (seen.append(len(fit.weights.full_heads)), real(fit, drawn))  # noqa: E731
    monkeypatch.setattr(train_step.Fit, "step", step)
    assert train_step.main([*arguments, "--mode", mode, "--full-heads", f"{heads}"]) == 0
    assert set(seen) == {heads}
    report = json.loads(file.read_text())
    assert report["size"] == [28, 42] and report["checkpointing"] is False
    assert (report["mode"], report["full_heads"], report["supervised"]) == (mode, heads, 1)
    settings = [(row["stage"], row["views"]) for row in report["rows"]]
    stages = ("calibrate", "distil", "refine")
    assert settings == [(stage, count) for count in views for stage in stages]
    for row in report["rows"]:
        once = row["stage"] == "calibrate"
        assert (row["runs"], row["clips"]) == ((1, 8) if once else (2, 2)) and row["peak_gib"] is None
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]


def test_the_picture_of_the_readme(tmp_path, monkeypatch):
    picture = script("make_readme_picture")
    out, file = tmp_path / "pictures" / "result.png", tmp_path / "result.json"
    arguments = ["--frames", "2", "--repeats", "1", "--out", str(out), "--json", str(file)]
    monkeypatch.setattr(picture, "SHOWN", (1, 7))
    assert picture.main(arguments) == 0
    report = json.loads(file.read_text())
    assert (report["backbone"], report["frames"], report["keep_ratio"]) == ("vggt-mini", 2, 0.3)
    for name in ("stock", "accelerated"):
        assert report["seconds_median"][name] == report["seconds"][name][0] > 0
        assert report["quality"][name]["absrel"] > 0
    assert report["quality"]["stock"] != report["quality"]["accelerated"]
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB")) / 255
    assert image.width == 1600 and out.stat().st_size < 400_000
    frame, kept, stock, pace = (pixels[80:440, 400 * i + 20 : 400 * i + 380] for i in range(4))
    # Kept tokens are as they were, and most are not.
    assert 0.2 < (np.abs(kept - frame).max(-1) < 0.1).mean() < 0.7 and kept.mean() < 0.7 * frame.mean()
    assert 0 < np.abs(stock - pace).mean() < 0.1 < stock.std()
    assert (pixels[:, :5] == 1).all()  # white around it


@pytest.mark.parametrize("family", ["pi3", "vggt-omega"])
def test_siblings(family, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    siblings, file = script("siblings"), tmp_path / "siblings.json"
    double = ("hosts_doubles", family.replace("-", "_"))
    monkeypatch.setitem(siblings.FAMILIES, family, siblings.FAMILIES[family]._replace(tests=double))
    arguments = ["--family", family, "--tiny", "--device", "cpu", "--frames", "2,3", "--size", "70x100"]
    assert siblings.main([*arguments, "--repeats", "2", "--full-heads", "1", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    patch = 14 if family == "pi3" else 16
    pixels = f"{70 // patch * patch}x{100 // patch * patch}"
    assert [(r["variant"], r["frames"], r["pixels"], r["keep_ratio"]) for r in report["rows"]] == [
        (variant, frames, pixels, keep)
        for frames in (2, 3)
        for variant, keep in (("stock", 1.0), ("pace", 0.3))
    ]
    for stock, ours in zip(report["rows"][::2], report["rows"][1::2], strict=True):
        assert ours["speedup"] == stock["seconds_median"] / ours["seconds_median"]
        assert (
            len(ours["seconds"]) == 2 and ours["seconds_min"] <= ours["seconds_median"] <= ours["seconds_max"]
        )
    assert report["family"] == family and report["environment"]["torch"] == torch.__version__
    assert len(report["full_heads"]) == 1 and {"global blocks"} <= {s["stage"] for s in report["stages"]["3"]}
    assert "speed-up" in capsys.readouterr().out


def test_a_sibling_by_its_package_takes_images_alone(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    siblings, package = script("siblings"), ModuleType("a_package_of_models")
    package.Pi3X = hosts_doubles.Pi3XDouble
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(
        siblings.FAMILIES, "pi3x", siblings.FAMILIES["pi3x"]._replace(module=package.__name__)
    )
    model = siblings.build("pi3x", torch.device("cpu"))
    with torch.inference_mode():
        found = model(torch.rand(1, 2, 3, 28, 28))
    assert all(bool(t.isfinite().all()) for t in found.values())


def test_random_weights_are_finite_wherever_a_model_is_empty(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    model = hosts_doubles.OmegaDouble()
    assert any(bool(buffer.isnan().any()) for buffer in model.buffers())
    with torch.no_grad():
        model.camera_head.weight.fill_(torch.nan)
        model.camera_head.bias.fill_(1e30)
        model.aggregator.frame_blocks[0].ls1.gamma.fill_(torch.inf)
    assert script("random_weights").with_random_weights(model, 3) is model and not model.training
    values = [*model.parameters(), *model.buffers()]
    assert all(bool(t.isfinite().all()) and t.abs().max() < 10 for t in values)
    assert all(len(parameter.unique()) > 1 for parameter in model.parameters())
    mask = model.aggregator.frame_blocks[0].attn.qkv.bias_mask
    assert mask.tolist() == [1] * 32 + [0] * 32 + [1] * 32


def test_siblings_without_their_package(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    siblings = script("siblings")
    monkeypatch.setitem(siblings.FAMILIES, "pi3", siblings.FAMILIES["pi3"]._replace(module="no_such_package"))
    with pytest.raises(PaceError, match="no_such_package.*PYTHONPATH"):
        siblings.main(["--family", "pi3", "--device", "cpu"])
