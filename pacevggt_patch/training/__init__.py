"""Train scorer, merge and restoration for any VGGT: the model itself is the teacher, images are all it takes."""

from .attention import attention_target
from .calibration import calibrate

__all__ = ["attention_target", "calibrate"]
