"""Networks of the small world and their supervised training on lessons."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from .arithmetic import PROMPT_LEN, USUAL, Lesson, Problem, Style
from .language import EOS_ID, PAD_ID, WORDS, encode

REPORT_EVERY = 100
EMBEDDING_SPEED = 20.0
"""Learning rate of the embedding, relative to the other weights.  Its entries are an order of magnitude larger and
AdamW steps are not, so at the same rate it hardly moves and one teacher in three learns too late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Size of a network and how it is trained."""

    name: str
    hidden_size: int
    num_lessons: int
    learning_rate: float
    max_steps: int
    decay: bool
    """Cosine decay to 5% at ``max_steps``, or a constant learning rate."""
    batch_size: int = 32
    warmup_steps: int = 30
    stop_accuracy: float = math.inf
    """Stop as soon as accuracy with top-p 0.7 reaches it; infinite to train to the end."""
    stop_from_step: int = 160
    stop_every: int = 10
    style: Style = USUAL
    """How its lessons are written."""

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the update after ``step`` updates."""
        warmup = (step + 1) / self.warmup_steps
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / self.max_steps)) if self.decay else 1.0
        return self.learning_rate * min(warmup, decay)

    def may_stop_at(self, step: int) -> bool:
        """Whether accuracy is measured after ``step`` updates, to decide on stopping."""
        return self.stop_accuracy < math.inf and step >= self.stop_from_step and step % self.stop_every == 0


TEACHER = Recipe(name="teacher", hidden_size=64, num_lessons=20_000, learning_rate=5e-3, max_steps=700, decay=True)
STUDENT = Recipe(
    name="student",
    hidden_size=48,
    num_lessons=15_000,
    learning_rate=2e-3,  # at 4e-3 some seeds leap from 30% to 90% within 20 steps, past the point to stop at
    max_steps=1500,
    decay=False,
    stop_accuracy=0.35,
)


@dataclass(frozen=True, slots=True)
class LessonBook:
    """Lessons as tensors: prompt + response padded at the right."""

    token_NL: Tensor  # int64
    taught_NR: Tensor  # bool, False on wrong results and on padding


def make_book(problems: Sequence[Problem], lessons: Sequence[Lesson]) -> LessonBook:
    """Stack the lessons, one per problem."""
    longest = max(len(lesson.token_ids) for lesson in lessons)
    tokens = torch.full((len(lessons), PROMPT_LEN + longest), PAD_ID)
    taught = torch.zeros((len(lessons), longest), dtype=torch.bool)
    for row, (problem, lesson) in enumerate(zip(problems, lessons, strict=True)):
        length = len(lesson.token_ids)
        tokens[row, : PROMPT_LEN + length] = torch.tensor([*encode(problem.prompt), *lesson.token_ids])
        taught[row, :length] = torch.tensor(lesson.taught)
    return LessonBook(tokens, taught)


def make_model(hidden_size: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of two layers with random weights."""
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # any config takes it
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).float()
        _initialize(model)
    return model


def _initialize(model: Qwen3ForCausalLM) -> None:
    """Draw weights for unit-variance activations; the standard deviation 0.02 of large models starts slowly here."""
    quiet = 0.5 / math.sqrt(model.config.num_hidden_layers)  # for weights whose output is added to the residual stream
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        std = 1 / math.sqrt(weight.shape[1])
        if "embed_tokens" in name:
            std = 1.0
        elif "lm_head" in name:
            std = 0.02
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= quiet
        torch.nn.init.normal_(weight, 0.0, std)


def lesson_loss(model: Qwen3ForCausalLM, token_BL: Tensor, taught_BR: Tensor) -> Tensor:
    """Mean cross entropy of the taught tokens.

    Padding stands at the right, where causal attention of a real token never reaches, so no mask is needed.
    """
    length = PROMPT_LEN + int(taught_BR.any(0).nonzero().max()) + 1
    token_BL, taught_BR = token_BL[:, :length], taught_BR[:, : length - PROMPT_LEN]
    logits = model(input_ids=token_BL[:, :-1], use_cache=False, logits_to_keep=taught_BR.shape[1]).logits
    return F.cross_entropy(logits[taught_BR], token_BL[:, PROMPT_LEN:][taught_BR])


def _make_optimizer(model: Qwen3ForCausalLM) -> torch.optim.Optimizer:
    embedding = model.get_input_embeddings().weight
    others = [weight for weight in model.parameters() if weight is not embedding]
    groups = [{"params": others, "speed": 1.0}, {"params": [embedding], "speed": EMBEDDING_SPEED}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The outcome of a training."""

    steps: int
    loss: float
    """Mean of the last 20 steps."""
    cpu_seconds: float
    wall_seconds: float


def train(
    model: Qwen3ForCausalLM,
    book: LessonBook,
    recipe: Recipe,
    seed: int,
    measure: Callable[[], float],
    report: Callable[[str], None] = print,
) -> Training:
    """Train in place; ``measure`` gives the accuracy that is reported and, for a student, ends the training."""
    cpu, wall = time.process_time(), time.perf_counter()
    optimizer = _make_optimizer(model)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step in range(recipe.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = group["speed"] * recipe.learning_rate_at(step)
        rows = torch.randint(len(book.token_NL), (recipe.batch_size,), generator=generator)
        loss = lesson_loss(model, book.token_NL[rows], book.taught_NR[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done % REPORT_EVERY and not recipe.may_stop_at(done):
            continue
        measured = measure()
        good_enough = recipe.may_stop_at(done) and measured >= recipe.stop_accuracy
        if good_enough or done % REPORT_EVERY == 0:
            report(f"{recipe.name}  step {done:4d}  loss {losses[-1]:.3f}  accuracy {measured:6.1%}")
        if good_enough:
            break
    recent = losses[-20:]
    return Training(
        steps=len(losses),
        loss=sum(recent) / len(recent),
        cpu_seconds=time.process_time() - cpu,
        wall_seconds=time.perf_counter() - wall,
    )
