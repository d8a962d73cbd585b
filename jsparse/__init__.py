"""Block-sparse attention for long-context Llama models in JAX."""

from jsparse.attention import attention as attention
from jsparse.block_mask import BlockMask as BlockMask
from jsparse.decode import decode_attention as decode_attention
from jsparse.estimate import PooledBlocks as PooledBlocks
from jsparse.estimate import VerticalSlash as VerticalSlash
from jsparse.heads import HeadPattern as HeadPattern
from jsparse.masks import TokenMask as TokenMask
from jsparse.masks import causal as causal
from jsparse.masks import shifted_groups as shifted_groups
from jsparse.masks import sliding_window as sliding_window
from jsparse.masks import streaming as streaming
from jsparse.select import page_bounds as page_bounds
from jsparse.select import page_scores as page_scores
