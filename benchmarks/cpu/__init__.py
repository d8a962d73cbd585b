"""The CPU benchmark: jsparse beside torch, onnxruntime and transformers (``python benchmarks/cpu``)."""
