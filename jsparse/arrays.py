"""Names for the arrays in dataclasses that are pytrees.

Tree functions put shapes, placeholders and shardings where arrays stand, and rebuild the dataclass with them.
A type checked at run time would refuse those, so the names below say to readers and to a type checker what a
field holds, and nothing at run time.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array

AnyArray = jax.Array | np.ndarray

if TYPE_CHECKING:
    Arrays = Array  # any shape; the field's comment gives it
else:
    Arrays = Any
