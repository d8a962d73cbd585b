"""Where keys and values are kept while a sequence is decoded, and attention over them."""

from typing import TYPE_CHECKING

from jsparse.lazy import lazy_face

if TYPE_CHECKING:
    from jsparse.cache.decode import decode_attention as decode_attention
    from jsparse.cache.layer import LayerKVCache as LayerKVCache
    from jsparse.cache.pages import PagedKVCache as PagedKVCache
    from jsparse.cache.ring import StreamingKVCache as StreamingKVCache
    from jsparse.cache.select import Selection as Selection
    from jsparse.cache.tokens import Tokens as Tokens
else:
    __getattr__, __dir__ = lazy_face(__name__, __file__)
