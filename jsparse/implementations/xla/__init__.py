"""Block-sparse attention for every device, in XLA."""
