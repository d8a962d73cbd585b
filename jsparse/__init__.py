"""Block-sparse attention for long-context Llama models in JAX."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from jsparse.lazy import lazy_face

if TYPE_CHECKING:
    from jsparse.attention import attention as attention
    from jsparse.cache.decode import decode_attention as decode_attention
    from jsparse.masks.block_mask import BlockMask as BlockMask
    from jsparse.masks.bounds import page_bounds as page_bounds
    from jsparse.masks.bounds import page_scores as page_scores
    from jsparse.masks.head_pattern import HeadPattern as HeadPattern
    from jsparse.masks.pooled import PooledBlocks as PooledBlocks
    from jsparse.masks.token_mask import TokenMask as TokenMask
    from jsparse.masks.token_mask import causal as causal
    from jsparse.masks.token_mask import shifted_groups as shifted_groups
    from jsparse.masks.token_mask import sliding_window as sliding_window
    from jsparse.masks.token_mask import streaming as streaming
    from jsparse.masks.vertical_slash import VerticalSlash as VerticalSlash
else:
    __getattr__, __dir__ = lazy_face(__name__, __file__)

    class _Face(types.ModuleType):
        """``jsparse.attention`` is the function, also after the module of that name was imported."""

        @property
        def attention(self) -> Any:
            return vars(self).get("_attention") or importlib.import_module("jsparse.attention").attention

        @attention.setter
        def attention(self, value: Any) -> None:
            if not isinstance(value, types.ModuleType):  # which the import system sets
                vars(self)["_attention"] = value

    sys.modules[__name__].__class__ = _Face
