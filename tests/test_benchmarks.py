"""The benchmark scripts run and write the rows they promise; no figure is judged here."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from pacevggt_patch import PaceError, PaceWeights
from pacevggt_patch.clips import render_room, save_clip
from pacevggt_patch.mini import build_mini

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_latency(tmp_path, capsys):
    latency, file = script("latency"), tmp_path / "latency.json"
    latency.BREAK_EVEN_CANDIDATES = (1,)
    arguments = [
        "--frames",
        "1,3",
        "--size",
        "28x42",
        "--repeats",
        "2",
        "--keep-ratio",
        "0.4",
        "--merge-budget",
        "0.1",
    ]
    assert latency.main([*arguments, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["environment"]["torch"] == torch.__version__
    assert [(r["variant"], r["frames"]) for r in report["rows"]] == [
        ("stock", 1), ("pace", 1), ("stock", 3), ("pace", 3),
    ]  # fmt: skip
    assert report["rows"][0].keys() == {
        "variant", "frames", "keep_ratio", "merge_budget", "seconds_median", "seconds_min", "seconds_max", "peak_gib",
        "speedup",
    }  # fmt: skip
    pace = report["rows"][3]
    assert (pace["keep_ratio"], pace["merge_budget"], pace["peak_gib"]) == (0.4, 0.1, None)
    assert pace["seconds_min"] <= pace["seconds_median"] <= pace["seconds_max"]
    assert pace["speedup"] == pytest.approx(report["rows"][2]["seconds_median"] / pace["seconds_median"])
    assert report["break_even_frames"] in (1, None)
    assert "speed-up" in capsys.readouterr().out


def test_latency_where_stock_runs_out_of_memory(tmp_path, monkeypatch):
    latency = script("latency")
    latency.BREAK_EVEN_CANDIDATES = ()
    real = latency.time_interleaved

    def scarce(runs, *args, **kwargs):
        if "stock" in runs:
            raise torch.cuda.OutOfMemoryError
        return real(runs, *args, **kwargs)

    monkeypatch.setattr(latency, "time_interleaved", scarce)
    file = tmp_path / "latency.json"
    assert latency.main(["--frames", "2", "--size", "28x28", "--repeats", "1", "--json", str(file)]) == 0
    stock, pace = json.loads(file.read_text())["rows"]
    assert stock["seconds_median"] is stock["speedup"] is pace["speedup"] is None
    assert pace["seconds_median"] > 0


def test_quality_on_rooms(tmp_path, capsys):
    quality, file = script("quality"), tmp_path / "quality.json"
    arguments = [
        "--count",
        "2",
        "--frames",
        "2",
        "--keep-ratios",
        "0.3",
        "--merge-budget",
        "0.5",
        "--weights",
        "none",
        "--global-keys",
        "0.6",
    ]
    assert quality.main([*arguments, "--json", str(file)]) == 0
    unpruned, pruned = json.loads(file.read_text())["rows"]
    assert (unpruned["keep_ratio"], unpruned["merge_budget"], unpruned["global_keys"]) == (1.0, 0.0, 1.0)
    assert pruned["global_keys"] == 0.6
    assert (pruned["keep_ratio"], pruned["merge_budget"], pruned["count"]) == (0.3, 0.5, 2)
    assert {"clips", "frames", "weights", *quality.METRICS} <= pruned.keys()
    assert unpruned["absrel"] != pruned["absrel"] and pruned["absrel_std"] > 0
    assert "AUC@30" in capsys.readouterr().out


def test_quality_on_a_folder(tmp_path):
    quality = script("quality")
    save_clip(render_room(3, 6), tmp_path / "clip")
    file = tmp_path / "quality.json"
    arguments = ["--clips", str(tmp_path / "clip"), "--frames", "2", "--stride", "2", "--starts", "0,3"]
    assert quality.main([*arguments, "--keep-ratios", "1.0", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["clips"], row["count"], row["frames"]) == ("clip", 2, 2)
    with pytest.raises(PaceError, match="has 6 frames"):
        quality.main([*arguments, "--starts", "0,5", "--json", str(file)])


def test_a_metric_that_some_clips_lack_is_not_averaged(tmp_path):
    quality = script("quality")
    args = quality.parse_arguments(["--frames", "2"])
    from hosts import tiny_vggt

    from pacevggt_patch import accelerate

    model = accelerate(tiny_vggt(), weights=None)
    some = [dict.fromkeys(quality.METRICS, 1.0), dict.fromkeys(quality.METRICS)]
    with pytest.raises(PaceError, match="auc5 is defined for 1 of 2 clips only: its mean would mislead"):
        quality.make_row(args, model, some)


def test_pace_quality(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    pace_quality = script("pace_quality")
    model = build_mini()
    for run in range(2):
        folder = tmp_path / f"run-{run}"
        folder.mkdir()
        for number, name in enumerate(("calibrated", "distilled", "pace")):
            weights = PaceWeights.new(model)
            with torch.no_grad():
                generator = torch.Generator().manual_seed(run)
                weights.merge.out.bias.normal_(std=0.3 * number, generator=generator)
            weights.save(folder / f"{name}.safetensors")
    arguments = ["--count", "1", "--frames", "2", "--keep-ratios", "0.2"]
    arguments += ["--runs", str(tmp_path / "run-0"), str(tmp_path / "run-1")]
    file, picture = tmp_path / "table.json", tmp_path / "table.png"
    assert pace_quality.main([*arguments, "--json", str(file), "--plot", str(picture)]) == 0
    report = json.loads(file.read_text())
    rows = {row["stage"]: row for row in report["rows"]}
    assert list(rows) == ["unpruned", "training-free", "calibrated", "distilled", "refined"]
    assert [row["runs"] for row in rows.values()] == [1, 1, 2, 2, 2]
    unpruned, free, refined = rows["unpruned"], rows["training-free"], rows["refined"]
    assert (unpruned["keep_ratio"], refined["keep_ratio"]) == (1.0, 0.2)
    # Untrained weights are the training-free setting; the others differ by run.
    assert rows["calibrated"]["absrel"] == pytest.approx(free["absrel"])
    assert rows["calibrated"]["absrel_loss_share"] == pytest.approx(100)
    assert rows["calibrated"]["absrel_std"] == pytest.approx(0, abs=1e-9)
    assert refined["absrel_std"] > 0 and unpruned["absrel_std"] is None
    expected = 100 * (refined["absrel"] / unpruned["absrel"] - 1)
    assert refined["absrel_change"] == pytest.approx(expected)
    share = 100 * (refined["absrel"] - unpruned["absrel"]) / (free["absrel"] - unpruned["absrel"])
    assert refined["absrel_loss_share"] == pytest.approx(share)
    assert picture.stat().st_size > 5000
    assert "refined" in capsys.readouterr().out
