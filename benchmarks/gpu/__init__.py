"""The GPU benchmark: the kernels beside cuDNN, torch and the floor (``python benchmarks/gpu``)."""
