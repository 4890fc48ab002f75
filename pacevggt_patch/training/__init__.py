"""Train scorer, merge, block changes and restoration for any VGGT: the model itself is the teacher."""

from .attention import attention_target
from .calibration import calibrate

__all__ = ["attention_target", "calibrate"]
