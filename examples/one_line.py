"""One line on an existing pipeline.

python examples/one_line.py --checkpoint facebook/VGGT-1B --images FOLDER   # your pipeline, on a GPU
python examples/one_line.py                                                 # VGGT-mini and the bundled clip
"""

import argparse

import torch

import pacevggt_patch
from pacevggt_patch.clips import BUNDLED_CLIP, load_clip
from pacevggt_patch.mini import build_mini

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", help="VGGT on the Hugging Face Hub (VGGT-mini if not given)")
parser.add_argument("--images", default=BUNDLED_CLIP, help="folder of images")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

# Your pipeline as it is.
if args.checkpoint:
    from vggt.models.vggt import VGGT

    model = VGGT.from_pretrained(args.checkpoint).to(device).eval()
    images = load_clip(args.images, width=518).images.to(device)
else:
    model = build_mini().to(device)
    images = load_clip(args.images, width=224, mode="square").images[:8].to(device)

# The one line. VGGT-mini has weights in the package. Another checkpoint is calibrated on the first clip: which heads of
# global attention must see all tokens is found out, and kept on this machine.
pacevggt_patch.accelerate(model)

with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
    predictions = model(images)
print({name: list(value.shape) for name, value in predictions.items() if isinstance(value, torch.Tensor)})
print(pacevggt_patch.summary(model, images))

# The stock model for a moment, and for good.
with torch.inference_mode(), pacevggt_patch.paused(model):
    model(images)
pacevggt_patch.remove(model)
