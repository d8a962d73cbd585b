"""Draws the gallery's pictures: which keys each query sees. ``conf.py`` calls it at every build."""

import sys
from pathlib import Path

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

import jsparse
from jsparse.examples import gallery
from jsparse.implementations.reference import visible_keys
from jsparse.models.patterns import StridedBlocks, strided_block_mask

TOKENS, BLOCK = 64, 4
COLORS = ListedColormap(["#eeeeee", "#56b4e9", "#0072b2"])  # not visited; visited and hidden; seen


def keys_with_a_needle():
    """Queries and keys with something to find: a column that all attend to, and a diagonal."""
    shape = (1, TOKENS, 1, 16)
    q, k = jax.random.normal(jax.random.key(0), (2, *shape))
    position = np.arange(TOKENS)
    q, k = (x.at[..., 0].set(8.0) for x in (q, k.at[..., 0].set(0)))
    k = k.at[:, 20:22, :, 0].set(7.0)
    angle = position[None, :, None] * 0.7
    for x, turn in ((0, np.cos), (1, np.sin)):
        q = q.at[..., 2 + x].set(7 * turn(angle))
        k = k.at[..., 2 + x].set(7 * turn(angle))
    return q, k


def all_masks() -> dict[str, tuple[str, jsparse.TokenMask | jsparse.BlockMask]]:
    """By file name: the title of a picture, and the mask that it shows."""
    q, k = keys_with_a_needle()
    strided = StridedBlocks(block=BLOCK, window=3, stride=4)
    pooled = jsparse.PooledBlocks(budget=5 * BLOCK, block=BLOCK)
    local = gallery.local_and_global(4, 12, window=3, block=BLOCK)
    slash = jsparse.VerticalSlash(
        vertical=2 * BLOCK, slash=2 * BLOCK, last_queries=8, block=BLOCK, segment=TOKENS // 2
    )
    return {
        "causal": ("causal()", jsparse.causal()),
        "window": ("sliding_window(16)", jsparse.sliding_window(16)),
        "streaming": ("streaming(sink=4, window=12)", jsparse.streaming(4, 12)),
        "groups": ("shifted_groups(16, 0)", jsparse.shifted_groups(16, 0)),
        "shifted_groups": ("shifted_groups(16, 8)", jsparse.shifted_groups(16, 8)),
        "longgen_full": ("LongGen: middle third of the layers", jsparse.causal()),
        "longgen_streaming": ("LongGen: the other layers", jsparse.streaming(4, 12)),
        "strided": ("StridedBlocks(4, window=3, stride=4)", strided_block_mask(strided, TOKENS)),
        "vertical_slash": ("VerticalSlash", slash.block_mask(q, k)),
        "pooled": ("PooledBlocks", pooled.block_mask(q, k)),
        "routed_regions": ("BiFormer: routed_regions", gallery.routed_regions(q, k, region=8, top=3)),
        "criss_cross": ("CCNet: criss_cross(8, 8)", gallery.criss_cross(8, 8)),
        "arrow": ("SeNER: arrow", gallery.arrow(16, window=3, block=BLOCK)),
        "local_and_global": ("Scale-DiT: local_and_global", local),
    }


def cells(mask: jsparse.TokenMask | jsparse.BlockMask) -> np.ndarray:
    """0, 1 or 2 for each query and key: not visited, visited and hidden, or seen."""
    if isinstance(mask, jsparse.TokenMask):
        mask = jsparse.BlockMask.from_token_masks(mask, TOKENS, TOKENS, block_q=BLOCK, block_kv=BLOCK)
    seen = np.asarray(visible_keys(mask, 1))[0, 0]
    blocks = seen.reshape(mask.num_q_blocks, mask.block_q, mask.num_kv_blocks, mask.block_kv)
    visited = np.kron(blocks.any(axis=(1, 3)), np.ones((mask.block_q, mask.block_kv), bool))
    return seen.astype(int) + visited


def draw(title: str, mask: jsparse.TokenMask | jsparse.BlockMask, path: Path) -> None:
    figure = Figure(figsize=(2.9, 3.1), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)  # without it, saving picks a canvas by the file's name and may need a display
    axes = figure.add_subplot()
    axes.imshow(cells(mask), cmap=COLORS, vmin=0, vmax=2, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("key", fontsize=8)
    axes.set_ylabel("query", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.savefig(path)


def draw_all(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (title, mask) in all_masks().items():
        draw(title, mask, folder / f"{name}.png")


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
