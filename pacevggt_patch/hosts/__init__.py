"""What is known of each family of models, and nothing of the method. A family registers itself where it is imported."""

from . import depth_anything_3, pi3, vggt, vggt_omega  # noqa: F401
