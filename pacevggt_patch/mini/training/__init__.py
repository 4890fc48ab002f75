"""Training of VGGT-mini itself; nothing of it is needed to accelerate a model."""
