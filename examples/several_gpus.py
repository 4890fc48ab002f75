"""One clip over several GPUs, a process for each.

torchrun --nproc-per-node 4 examples/several_gpus.py --checkpoint facebook/VGGT-1B --images FOLDER --weights FILE
torchrun --nproc-per-node 2 examples/several_gpus.py     # VGGT-mini and the bundled clip; without GPUs on the CPU

FILE is what `calibrate(model, images).save(FILE)` wrote, in one process.
"""

import argparse
import datetime

import torch
import torch.distributed as dist

import pacevggt_patch
from pacevggt_patch.clips import BUNDLED_CLIP, count_frames, load_clip
from pacevggt_patch.mini import build_mini
from pacevggt_patch.runtime.device import usable_device

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", help="VGGT on the Hugging Face Hub (VGGT-mini if not given)")
parser.add_argument("--weights", default="auto", help="pace weights; VGGT-mini's are bundled")
parser.add_argument("--images", default=BUNDLED_CLIP, help="folder of images")
args = parser.parse_args()

device = usable_device(None)  # the GPU that torchrun gives this process
if device.type == "cuda":
    torch.cuda.set_device(device)
# A rank that hangs ends all of them after this time.
dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=2))
rank, world = dist.get_rank(), dist.get_world_size()

# Each process loads the frames that are its own.
mine = pacevggt_patch.split_frames(count_frames(args.images), rank, world)
some = {"start": mine.start, "frames": mine.stop - mine.start}
if args.checkpoint:
    from vggt.models.vggt import VGGT

    model = VGGT.from_pretrained(args.checkpoint).to(device).eval()
    images = load_clip(args.images, **some).images.to(device)
else:
    model = build_mini().to(device)
    images = load_clip(args.images, **some, width=224, mode="square").images.to(device)

pacevggt_patch.accelerate(model, weights=args.weights, process_group=True)
with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
    predictions = model(images)  # of the frames here
print(f"rank {rank}: frames {mine.start} to {mine.stop - 1}, depth {list(predictions['depth'].shape)}")

# All cameras on rank 0; leave out what is too large for one GPU.
cameras = pacevggt_patch.gather_outputs({"pose_enc": predictions["pose_enc"]})
if cameras is not None:
    print(f"all cameras: {list(cameras['pose_enc'].shape)}")
dist.destroy_process_group()
