"""Train pace weights for any VGGT: the unpruned model itself is the teacher."""
