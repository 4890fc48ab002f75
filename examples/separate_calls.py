"""The pipeline that calls aggregator and heads one by one, as VGGT's own scripts and SLAM systems do."""

import torch

import pacevggt_patch
from pacevggt_patch.clips import BUNDLED_CLIP, load_clip
from pacevggt_patch.evaluation import decode_pose_encoding, unproject
from pacevggt_patch.mini import build_mini

device = "cuda" if torch.cuda.is_available() else "cpu"
model = build_mini().to(device)
images = (
    load_clip(BUNDLED_CLIP, width=224, mode="square", frames=8).images[None].to(device)
)  # [1, S, 3, H, W]

pacevggt_patch.accelerate(model, keep_ratio=0.3, min_frames=1)  # pruned however short

with torch.inference_mode():
    tokens, patch_start_idx = model.aggregator(images)
    pose_encoding = model.camera_head(tokens)[-1]  # [1, S, 9]
    depth, confidence = model.depth_head(tokens, images, patch_start_idx)  # [1, S, H, W, 1], [1, S, H, W]

world_to_camera, intrinsics = decode_pose_encoding(pose_encoding[0], *images.shape[-2:])
points = unproject(depth[0, ..., 0], intrinsics, world_to_camera)  # [S, H, W, 3]
print(
    f"{points.shape[0]} frames, {points[..., 0].numel():,} points, median depth {depth.median().item():.2f}"
)

# Code of your own may read the tokens, too: they are the stock list, with all tokens of every frame.
kept = pacevggt_patch.summary(model).kept
kept = 0 if kept is None else kept.shape[-1]
print("tokens of the last layer:", list(tokens[-1].shape), "| kept of each frame:", kept)
