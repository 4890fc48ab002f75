"""The `pacevggt` command."""
