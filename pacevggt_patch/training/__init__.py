"""Train scorer, merge, block changes and restoration for any VGGT: the model itself is the teacher."""

from ..calibration.calibrate import calibrate
from .attention_target import attention_target

__all__ = ["attention_target", "calibrate"]
