"""The vocab-parallel head: from hidden states to numbers reduced over the vocabulary.

``ops/`` is the only package that sees logits; the names below are those that other packages use.  Logits exist
for one chunk of tokens at a time and nothing of size [T, V] is kept.  The rows of the output table are split over
tensor-parallel ranks; rows at or beyond ``vocab_size`` are padding and are cut off BEFORE the product, so
that they have no logit, no probability and a gradient of exactly zero.
"""

from megatron_tropd.ops.head import HeadMode, HeadOutput, HeadSettings, gather_hidden, head_loss, student_token_stats
from megatron_tropd.ops.quantile import quantile_threshold
from megatron_tropd.ops.shard import VocabShard
from megatron_tropd.ops.teacher_head import nan_problem, teacher_scores, unchecked_teacher_scores

__all__ = [
    "HeadMode",
    "HeadOutput",
    "HeadSettings",
    "VocabShard",
    "gather_hidden",
    "head_loss",
    "nan_problem",
    "quantile_threshold",
    "student_token_stats",
    "teacher_scores",
    "unchecked_teacher_scores",
]
