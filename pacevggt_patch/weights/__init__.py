"""Weight files: their format, where they come from, and whether they fit a model."""
