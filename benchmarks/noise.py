"""How far a faster pruned forward is from a plain one, beside how far rounding alone takes the plain one.

    python benchmarks/noise.py --backbone vggt-1b --device cuda --size 392x518 --frames 8 --json FILE

Three ways through one model: float32 weights, narrow (bfloat16) weights as they are, and narrow weights with
compile=True and attention by a library where there is one. Printed are relative differences ||a - b|| / ||b||. That of
"plain" from "float32" is the noise: what the narrow dtype costs whoever computes. At keep ratio 1 all ways see the same
tokens; below it rounding may also change which tokens are kept, in the plain way as in the fast one. Random weights
barely use their blocks, whose layer scales are 0.01 then: they are set to 0.3.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from models import SEED, build, random_clip

from pacevggt_patch import PaceError, accelerate, summary
from pacevggt_patch.config import GLOBAL, MODES
from pacevggt_patch.method.restored_tokens import RestoredTokens
from pacevggt_patch.runtime import attention
from pacevggt_patch.runtime.device import usable_device
from pacevggt_patch.runtime.files import environment, write_json

LAYER_SCALE = 0.3
PAIRS = (("plain", "float32"), ("fast", "float32"), ("fast", "plain"))


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = usable_device(args.device)
    model = build(args.backbone, device, None, "bfloat16")
    if args.backbone != "mini":
        with torch.no_grad():
            for block in (*model.aggregator.frame_blocks, *model.aggregator.global_blocks):
                block.ls1.gamma.fill_(LAYER_SCALE)
                block.ls2.gamma.fill_(LAYER_SCALE)
    images = random_clip(args.frames, args.size, "bfloat16", device)
    found: dict[tuple[str, float], dict[str, torch.Tensor]] = {}
    for way in ("plain", "fast", "float32"):  # the last one widens the weights: rounded ones, so equal
        if way == "float32":
            model, images = model.float(), images.float()
        for ratio in (1.0, *args.keep_ratios):
            found[way, ratio] = outputs(model, images, ratio, args.mode, way == "fast")
    rows = [
        {"keep_ratio": ratio, "of": way, "from": other, **differences(found[way, ratio], found[other, ratio])}
        for ratio in (1.0, *args.keep_ratios)
        for way, other in PAIRS
    ]
    report = {
        "environment": environment(device),
        "backbone": args.backbone,
        "mode": args.mode,
        "frames": args.frames,
        "size": f"{args.size[0]}x{args.size[1]}",
        "seed": SEED,
        "attention": attention.kernel_name(device, torch.bfloat16),
        "rows": rows,
    }
    if args.json:
        write_json(args.json, report)
    print(f"attention of the fast way: {report['attention']}")
    for row in rows:
        cells = "  ".join(f"{name} {row[name]:.2e}" for name in ("tokens", "pose_enc", "depth", "points"))
        print(
            f"keep {row['keep_ratio']:<5g}{row['of']:>6s} from {row['from']:8s}{cells}  "
            f"same tokens kept {row['kept']:.1%}"
        )
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=("mini", "vggt-1b"), default="mini")
    parser.add_argument("--mode", choices=MODES, default=GLOBAL)
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one if not given)")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument(
        "--size", type=lambda text: tuple(int(n) for n in text.split("x")), default=(224, 224)
    )
    parser.add_argument("--keep-ratios", type=lambda text: [float(n) for n in text.split(",")], default=[0.3])
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


@torch.inference_mode()
def outputs(model: Any, images: torch.Tensor, ratio: float, mode: str, fast: bool) -> dict[str, torch.Tensor]:
    """Outputs of one pruned forward, of the heads under autocast where the weights are narrow.

    `tokens` are those of the last layer, of pre-AA pruning special and kept ones alone. `kept` are the tokens that were
    kept, if any were dropped.
    """
    library = attention.library if fast else lambda device: None
    with mock.patch.object(attention, "library", library):
        accelerate(model, ratio, weights=None, mode=mode, min_frames=1, compile=fast)
        narrow = images.dtype == torch.bfloat16
        tokens, start = model.aggregator(images)
        kept = summary(model).kept
        last = tokens.compact[max(tokens.compact)] if isinstance(tokens, RestoredTokens) else tokens[-1]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=narrow):
            return {
                **({} if kept is None else {"kept": kept}),
                "tokens": last,
                "pose_enc": model.camera_head(tokens)[-1],
                "depth": model.depth_head(tokens, images, start)[0],
                "points": model.point_head(tokens, images, start)[0],
            }


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """||a - b|| / ||b|| of each output, and the share of the kept tokens that is the same."""
    row = {
        name: ((a[name].double() - b[name].double()).norm() / b[name].double().norm()).item()
        for name in a
        if name != "kept"
    }
    if "kept" not in a:
        return row | {"kept": 1.0}
    same = (a["kept"].unsqueeze(-1) == b["kept"].unsqueeze(-2)).any(-1)
    return row | {"kept": same.double().mean().item()}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PaceError as error:
        sys.exit(f"noise.py: {error}")
