"""What the rest runs on: attention libraries, compilation, chunks, CUDA graphs, files."""
