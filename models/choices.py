"""What the options of commands may be, apart from the code that does it: options are listed without jax."""

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]  # of weights; None in an option is what config.json says
KINDS = ("shifted", "grouped", "full", "longgen", "streaming")  # of attention in training
REMAT = ("none", "layers", "attention", "dots")  # what the backward pass keeps of a layer
# The RoPE kinds on which each method gives a RoPE that Hugging Face's config can spell.
EXTENSIONS: dict[str, tuple[str, ...]] = {
    "linear": ("default", "linear"),
    "ntk": ("default", "linear"),
    "yarn": ("default", "yarn"),
    "llama3": ("default", "llama3"),
}
