"""Rendered scenes that VGGT-mini is trained and judged on."""
