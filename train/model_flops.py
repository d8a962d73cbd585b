"""FLOPs of a training step of a Llama, counted from its sizes and from the block lists of its masks."""

import dataclasses
from collections.abc import Sequence

from jsparse.attention import Mask
from jsparse.masks.block_mask import BlockMask, default_block_sizes
from jsparse.masks.token_mask import causal
from jsparse.models import Llama, has_lora
from jsparse.models.layers import Linear, linear_layers
from jsparse.models.masking import ModelMask, layer_masks
from jsparse.plan.flops import Passes, StepFlops, attention_flops

# The parts of a layer that the backward pass recomputes.
_AGAIN = {
    "none": (),
    "layers": ("attention", "products"),
    "attention": ("products",),
    "dots": ("attention",),
}


def step_flops(
    model: Llama,
    mask: ModelMask | None,
    *,
    context: int,
    windows: int,
    train_embeddings: bool = True,
    remat: str = "none",
) -> StepFlops:
    """FLOPs of a step over ``windows`` windows of ``context`` tokens, on all devices together.

    - model: as it is trained, with its adapters; its arrays may be abstract. With adapters the base is
      frozen.
    - mask: as the model takes it.
    - train_embeddings: whether the embeddings are trained.
    - remat: as in ``Llama.hidden``. "layers" recomputes all of a layer except its last product, "attention"
      the same except attention, "dots" attention alone.

    In the backward pass, a product with a weight matrix costs as much again for the gradient of its input,
    and once more for that of the matrix, if it is trained. The head's product is always recomputed, a stretch
    of tokens at a time.

    The embedding has no products. Segment ids skip no blocks, so documents make no difference. Layer 0 counts
    like the others, though a run that trains nothing before it needs no gradient of its input.

    >>> from flax import nnx
    >>> from jsparse.models import LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2,
    ...     num_attention_heads=32,
    ... )
    >>> model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    >>> flops = step_flops(model, None, context=8192, windows=1)
    >>> round(16 * flops.mlp.forward / 1e12, 1)
    70.9
    """
    config, again = model.config, _AGAIN[remat]
    base_trained = not has_lora(model)

    def products(module: str) -> Passes:
        one_token = Passes()
        for path, linear in linear_layers(model):
            if f".{module}." in path:
                one_token += _linear(linear, base_trained=base_trained, last=path.endswith("down_proj"))
        passes = one_token.times(context * windows)
        return passes if "products" in again else dataclasses.replace(passes, again=0)

    def attention(masks: Sequence[Mask]) -> Passes:
        passes = Passes()
        for one in masks:
            lists = _block_mask(one, context)
            passes += attention_flops(lists, config.num_attention_heads, config.head_dim)
        passes = passes if "attention" in again else dataclasses.replace(passes, again=0)
        return passes.times(windows)

    head = 2 * config.hidden_size * config.vocab_size * context * windows
    head_trained = base_trained or (config.tie_word_embeddings and train_embeddings)
    return StepFlops(
        attention=attention(layer_masks(config, mask)),
        causal_attention=attention([causal()] * config.num_hidden_layers),
        projections=products("self_attn"),
        mlp=products("mlp"),
        head=Passes(head, 2 * head if head_trained else head, head),
    )


def _linear(linear: Linear, *, base_trained: bool, last: bool) -> Passes:
    """FLOPs of ``x W + (x A) B`` per token. Of a layer's ``last`` product only ``x A`` is recomputed."""
    rank = 0 if linear.lora_b is None else linear.lora_b.shape[0]
    base, down, up = (
        2 * n for n in (linear.in_size * linear.out_size, linear.in_size * rank, rank * linear.out_size)
    )
    return Passes(
        forward=base + down + up,
        backward=base * (2 if base_trained else 1) + 2 * (down + up),
        again=down if last else base + down + up,
    )


def _block_mask(mask: Mask, context: int) -> BlockMask:
    """The lists that ``jsparse.attention`` follows for a mask."""
    if isinstance(mask, BlockMask):
        return mask
    block_q, block_kv = default_block_sizes(context, context)
    return BlockMask.from_token_masks(mask, context, context, block_q=block_q, block_kv=block_kv)
