"""Scores of a mixture of teachers against dense distributions in float64."""

from __future__ import annotations

import pytest
import torch

from megatron_tropd.teacher.several.mixture import mix
from megatron_tropd.types import TeacherScores

WEIGHTS = (0.5, 0.3, 0.2)
TOKENS, VOCAB = 40, 23


def _parts(k: int, seed: int = 0):
    """(scores of three teachers, their distributions [3, T, V] in float64, labels)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, TOKENS, VOCAB, generator=generator)
    logits[1] = logits[0].round()  # ties, within a teacher and between two
    logs = logits.double().log_softmax(-1)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    parts = []
    for teacher in logs:
        values, order = teacher.sort(dim=1, descending=True, stable=True)
        parts.append(
            TeacherScores(
                logprob=teacher.gather(1, labels[:, None])[:, 0].float(),
                topk_ids=order[:, :k].int(), topk_logprobs=values[:, :k].float(),
            )
        )  # fmt: skip
    return parts, logs.exp(), labels


def test_with_the_whole_vocabulary_it_is_the_dense_mixture():
    parts, dense, labels = _parts(VOCAB)
    mixed = mix(parts, WEIGHTS)
    expected = (torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None] * dense).sum(0)
    torch.testing.assert_close(
        mixed.logprob.double(), expected.gather(1, labels[:, None])[:, 0].log(), atol=1e-6, rtol=0
    )
    values, order = expected.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(mixed.topk_logprobs.double(), values.log(), atol=1e-6, rtol=0)
    assert (mixed.topk_ids == order).double().mean() > 0.97, "ids differ at most where sums are equal to rounding"


@pytest.mark.parametrize("k", [1, 4])
def test_a_top_k_is_that_of_the_truncated_teachers(k):
    parts, _, _ = _parts(k)
    mixed = mix(parts, WEIGHTS)
    expected = torch.zeros(TOKENS, VOCAB, dtype=torch.float64)
    for weight, part in zip(WEIGHTS, parts, strict=True):
        expected.scatter_add_(1, part.topk_ids.long(), weight * part.topk_logprobs.double().exp())
    values = expected.sort(dim=1, descending=True).values[:, :k]
    torch.testing.assert_close(mixed.topk_logprobs.double(), values.log(), atol=1e-6, rtol=0)
    held = expected.gather(1, mixed.topk_ids.long())
    torch.testing.assert_close(held.log(), mixed.topk_logprobs.double(), atol=1e-6, rtol=0)
    assert mixed.topk_ids.dtype == torch.int32 and mixed.topk_ids.shape == (TOKENS, k)


def test_one_teacher_with_all_the_weight_is_that_teacher():
    parts, _, _ = _parts(4)
    mixed = mix([parts[0]], [1.0])
    assert torch.equal(mixed.topk_ids, parts[0].topk_ids)
    torch.testing.assert_close(mixed.topk_logprobs, parts[0].topk_logprobs)
    torch.testing.assert_close(mixed.logprob, parts[0].logprob)


def test_a_token_that_one_teacher_excludes_keeps_the_others_share():
    scores = [TeacherScores(logprob=torch.tensor([value])) for value in (-torch.inf, -1.0)]
    assert mix(scores, [0.5, 0.5]).logprob.item() == pytest.approx(-1.0 + torch.tensor(0.5).log().item())
    excluded = [TeacherScores(logprob=torch.tensor([-torch.inf]))] * 2
    assert mix(excluded, [0.5, 0.5]).logprob.item() == -torch.inf


def test_what_a_mixture_cannot_give_is_refused():
    part = TeacherScores(logprob=torch.zeros(1), entropy=torch.zeros(1))
    with pytest.raises(ValueError, match="no entropy"):
        mix([part, part], [0.5, 0.5])
