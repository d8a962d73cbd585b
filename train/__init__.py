"""Training: fine-tuning and pretraining, attention patterns, data, checkpoints, perplexity, passkeys."""

from jsparse.train.config import FinetuneConfig as FinetuneConfig
from jsparse.train.data import Batch as Batch
from jsparse.train.data import Windows as Windows
from jsparse.train.data import batch_at as batch_at
from jsparse.train.data import open_windows as open_windows
from jsparse.train.data import read_documents as read_documents
from jsparse.train.data import write_windows as write_windows
from jsparse.train.evaluate import Perplexity as Perplexity
from jsparse.train.evaluate import evaluate_perplexity as evaluate_perplexity
from jsparse.train.evaluate import perplexity_by_context as perplexity_by_context
from jsparse.train.export import MergeConfig as MergeConfig
from jsparse.train.export import merge as merge
from jsparse.train.finetune import FinetuneResult as FinetuneResult
from jsparse.train.finetune import finetune as finetune
from jsparse.train.heads import HeadsConfig as HeadsConfig
from jsparse.train.heads import HeadsResult as HeadsResult
from jsparse.train.heads import learn_heads as learn_heads
from jsparse.train.longlora import shifted_head_masks as shifted_head_masks
from jsparse.train.patterns import AttentionPattern as AttentionPattern
from jsparse.train.patterns import load_pattern as load_pattern
from jsparse.train.patterns import save_pattern as save_pattern
from jsparse.train.plan import plan_finetune as plan_finetune
from jsparse.train.retrieval import PasskeyAccuracy as PasskeyAccuracy
from jsparse.train.retrieval import evaluate_passkeys as evaluate_passkeys
