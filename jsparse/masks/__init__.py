"""What may be seen: token masks, lists of blocks, head patterns, and estimates that make lists."""

from typing import TYPE_CHECKING

from jsparse.lazy import lazy_face

if TYPE_CHECKING:
    from jsparse.masks.block_mask import BlockMask as BlockMask
    from jsparse.masks.bounds import page_bounds as page_bounds
    from jsparse.masks.bounds import page_scores as page_scores
    from jsparse.masks.estimate import Estimate as Estimate
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
