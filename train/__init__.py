"""Training: fine-tuning and pretraining, attention patterns, data, checkpoints, perplexity, passkeys."""

from typing import TYPE_CHECKING

from jsparse.lazy import lazy_face

if TYPE_CHECKING:
    from jsparse.evaluate.passkeys import PasskeyAccuracy as PasskeyAccuracy
    from jsparse.evaluate.passkeys import evaluate_passkeys as evaluate_passkeys
    from jsparse.evaluate.perplexity import Perplexity as Perplexity
    from jsparse.evaluate.perplexity import evaluate_perplexity as evaluate_perplexity
    from jsparse.evaluate.perplexity import perplexity_by_context as perplexity_by_context
    from jsparse.models.longlora import shifted_head_masks as shifted_head_masks
    from jsparse.models.patterns import AttentionPattern as AttentionPattern
    from jsparse.models.patterns import load_pattern as load_pattern
    from jsparse.models.patterns import save_pattern as save_pattern
    from jsparse.texts.documents import read_documents as read_documents
    from jsparse.train.config import FinetuneConfig as FinetuneConfig
    from jsparse.train.data.batches import batch_at as batch_at
    from jsparse.train.data.windows import TrainBatch as TrainBatch
    from jsparse.train.data.windows import Windows as Windows
    from jsparse.train.data.windows import open_windows as open_windows
    from jsparse.train.data.windows import write_windows as write_windows
    from jsparse.train.export import MergeConfig as MergeConfig
    from jsparse.train.export import merge as merge
    from jsparse.train.finetuning import FinetuneResult as FinetuneResult
    from jsparse.train.finetuning import finetune as finetune
    from jsparse.train.heads import HeadsConfig as HeadsConfig
    from jsparse.train.heads import HeadsResult as HeadsResult
    from jsparse.train.heads import learn_heads as learn_heads
    from jsparse.train.plan import plan_finetune as plan_finetune
    from jsparse.train.pretraining import PretrainConfig as PretrainConfig
    from jsparse.train.pretraining import PretrainResult as PretrainResult
    from jsparse.train.pretraining import pretrain as pretrain
else:
    __getattr__, __dir__ = lazy_face(__name__, __file__)
