"""Models: the Llama family in Flax NNX, RoPE, LoRA, Hugging Face checkpoints, tokenizers, chat templates."""

from typing import TYPE_CHECKING

from jsparse.lazy import lazy_face

if TYPE_CHECKING:
    from jsparse.models.adapter_loading import load_adapter as load_adapter
    from jsparse.models.adapter_saving import save_adapter as save_adapter
    from jsparse.models.checkpoint import load_config as load_config
    from jsparse.models.config import LlamaConfig as LlamaConfig
    from jsparse.models.frozen_base import dequantize_base as dequantize_base
    from jsparse.models.frozen_base import quantize_base as quantize_base
    from jsparse.models.head_order import reorder_heads as reorder_heads
    from jsparse.models.layers import LoRAParam as LoRAParam
    from jsparse.models.llama import Llama as Llama
    from jsparse.models.lora import add_lora as add_lora
    from jsparse.models.lora import has_lora as has_lora
    from jsparse.models.lora import merge_lora as merge_lora
    from jsparse.models.lora import set_dropout_keys as set_dropout_keys
    from jsparse.models.masking import ModelMask as ModelMask
    from jsparse.models.rope import RopeConfig as RopeConfig
    from jsparse.models.sharding import MeshConfig as MeshConfig
    from jsparse.models.shipped import shipped_model as shipped_model
    from jsparse.texts.chat_template import ChatTemplate as ChatTemplate
    from jsparse.texts.chat_template import load_chat_template as load_chat_template
    from jsparse.texts.tokenizer import byte_tokenizer as byte_tokenizer
    from jsparse.texts.tokenizer import load_tokenizer as load_tokenizer
    from jsparse.texts.tokenizer import plain_text_tokenizer as plain_text_tokenizer
    from jsparse.texts.tokenizer import text_encoder as text_encoder
    from jsparse.texts.tokenizer import train_tokenizer as train_tokenizer
else:
    __getattr__, __dir__ = lazy_face(__name__, __file__)
