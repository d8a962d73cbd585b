"""Benchmarks of training, each a script: a step, an extension, and whether LongLoRA's claims fit."""
