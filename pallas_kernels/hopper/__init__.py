"""The kernels for Hopper GPUs (Pallas, Mosaic GPU)."""
