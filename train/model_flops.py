"""FLOPs of a training step of a Llama, counted from its sizes and from the block lists of its masks."""

import dataclasses
from collections.abc import Collection, Sequence

from jsparse.attention import Mask
from jsparse.masks.block_mask import BlockMask, default_block_sizes
from jsparse.masks.token_mask import causal
from jsparse.models import Llama, has_lora
from jsparse.models.layers import Linear, linear_layers
from jsparse.models.masking import ModelMask, layer_masks
from jsparse.models.peft_names import EMBEDDING, HEAD, module_name
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
    whole: Collection[str] = (),
    remat: str = "none",
) -> StepFlops:
    """FLOPs of a step over ``windows`` windows of ``context`` tokens, on all devices together.

    - model: as it is trained, with its adapters; its arrays may be abstract. With adapters the base is
      frozen.
    - mask: as the model takes it.
    - train_embeddings: whether the embeddings are trained.
    - whole: modules of a frozen base that are trained nevertheless, by their names in transformers.
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
                trained = base_trained or module_name(path) in whole
                one_token += _linear(linear, base_trained=trained, last=path.endswith("down_proj"))
        passes = one_token.times(context * windows)
        return passes if "products" in again else dataclasses.replace(passes, again=0)

    def attention(masks: Sequence[Mask]) -> Passes:
        passes = Passes()
        for one in masks:
            lists = _block_mask(one, context)
            passes += attention_flops(lists, config.num_attention_heads, config.head_dim)
        passes = passes if "attention" in again else dataclasses.replace(passes, again=0)
        return passes.times(windows)

    tied = config.tie_word_embeddings
    head_trained = base_trained or HEAD in whole or (tied and (train_embeddings or EMBEDDING in whole))
    head = _head(model, base_trained=head_trained).times(context * windows)
    return StepFlops(
        attention=attention(layer_masks(config, mask)),
        causal_attention=attention([causal()] * config.num_hidden_layers),
        projections=products("self_attn"),
        mlp=products("mlp"),
        head=head,
    )


def _head(model: Llama, *, base_trained: bool) -> Passes:
    """FLOPs of the head per token, with its adapter."""
    rank = 0 if model.lm_head is None else _rank(model.lm_head)
    return _product(
        model.config.hidden_size, model.config.vocab_size, rank, base_trained=base_trained, last=False
    )


def _linear(linear: Linear, *, base_trained: bool, last: bool) -> Passes:
    return _product(linear.in_size, linear.out_size, _rank(linear), base_trained=base_trained, last=last)


def _rank(linear: Linear) -> int:
    return 0 if linear.lora_b is None else linear.lora_b.shape[0]


def _product(inputs: int, outputs: int, rank: int, *, base_trained: bool, last: bool) -> Passes:
    """FLOPs of ``x W + (x A) B`` per token. Of a layer's ``last`` product only ``x A`` is recomputed."""
    base, down, up = (2 * n for n in (inputs * outputs, inputs * rank, rank * outputs))
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
