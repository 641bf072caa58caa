"""A rollout engine inside the trainer's process, on transformers' own model code.

It needs no server, so the quickstart runs in one process group, and it is the oracle that SGLang's
log-probabilities are compared with.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_tropd.errors import EngineError
from megatron_tropd.models.hf_config import load_architecture
from megatron_tropd.rollout.embedded.decoding import Continuation, decode
from megatron_tropd.rollout.engine import Arrived, SamplingParams, check_requests, ignore
from megatron_tropd.rollout.update_tracker import UpdateTracker
from megatron_tropd.types import Counts, GenerationRequest, Rollout

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights  # type: ignore[attr-defined,no-redef]


def _build(hf_config_dir: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return the checkpoint's transformers model, in evaluation mode, with uninitialised weights."""
    config = AutoConfig.from_pretrained(hf_config_dir, local_files_only=True, trust_remote_code=False)
    # Every weight arrives by update(); filling them at random would take minutes for a 7B model and
    # would move torch's global generator.
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


def _by_file_name(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names in checkpoint files, as views: transformers 5 stacks the experts of a layer
    (``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I]), files name each expert."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        prefix, _, kind = name.rpartition(".experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            found[name] = weight
            continue
        for expert, part in enumerate(weight):
            rows = part.chunk(2) if kind == "gate_up_proj" else (part,)
            for projection, view in zip(
                ("gate_proj", "up_proj") if len(rows) == 2 else ("down_proj",), rows, strict=True
            ):
                found[f"{prefix}.experts.{expert}.{projection}.weight"] = view
    return found


class EmbeddedEngine:
    """Implements RolloutEngine in this process.

    Args:
        hf_config_dir: HF checkpoint directory; only its ``config.json`` is read.
        stop_token_ids: a rollout ends with any of them (union of student's and teacher's).
        dtype: of weights and KV cache; tensors of another dtype are rounded to it on arrival.
        device: where the weights live.
        vocab_size: only the first so many ids can be written (the vocabulary shared with the teacher);
            by default all rows of the model.
        max_batch_size: at most so many sequences decode at once; results do not depend on it beyond
            rounding of the logits.

    Raises:
        FileNotFoundError, UnsupportedArchitecture: from reading the config.
        ValueError: no stop token, one outside the vocabulary, or a vocabulary larger than the model's.
    """

    def __init__(
        self,
        hf_config_dir: str | Path,
        *,
        stop_token_ids: Collection[int],
        vocab_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_batch_size: int = 256,
    ) -> None:
        architecture = load_architecture(hf_config_dir)
        self._vocab_size = architecture.vocab_size if vocab_size is None else vocab_size
        self._max_positions = architecture.max_position_embeddings
        self._stop_token_ids = frozenset(stop_token_ids)
        self._max_batch_size = max_batch_size
        if not self._stop_token_ids or not all(0 <= i < self._vocab_size for i in self._stop_token_ids):
            raise ValueError(
                f"stop_token_ids {sorted(self._stop_token_ids)}: expected at least one id in [0, {self._vocab_size})"
            )
        if not 1 <= self._vocab_size <= architecture.vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}; the model has {architecture.vocab_size} rows")
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; expected at least 1")
        model = _build(Path(hf_config_dir), dtype, torch.device(device))
        self._model: PreTrainedModel | None = model
        # Tied weights appear under both names and share storage.
        self._weights = _by_file_name(model.state_dict())
        tied = frozenset({"lm_head.weight"} if architecture.tie_word_embeddings else ())
        shapes = {name: tuple(weight.shape) for name, weight in self._weights.items()}
        self._tracker = UpdateTracker(shapes, optional=tied)
        self._tied_to = dict.fromkeys(tied, "model.embed_tokens.weight")
        self._tied_to |= {source: name for name, source in self._tied_to.items()}
        self._written: Counts | None = None

    @property
    def weight_version(self) -> int | None:
        """Version of the loaded weights; None while they are incomplete."""
        return None if self._model is None else self._tracker.version

    @property
    def written(self) -> Counts | None:
        """Finished responses of the current or last call of :meth:`generate`; None before the first."""
        return self._written

    def begin_update(self, version: int) -> None:
        """Stop serving and expect the tensors of ``version``."""
        self._require_open()
        self._tracker.begin(version)

    @torch.no_grad()
    def update(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy (HF name, tensor) pairs in.  A tied model may be sent ``lm_head.weight`` too; it must
        equal the embedding.  Any exception, also one of the iterable, fails the whole update."""
        self._require_open()
        try:
            for name, tensor in tensors:
                self._tracker.receive(name, tuple(tensor.shape))
                self._take(name, tensor)
        except BaseException as error:
            if not isinstance(error, EngineError):
                self._tracker.refuse(f"{type(error).__name__}: {error}")
            raise

    def _take(self, name: str, tensor: Tensor) -> None:
        weight = self._weights[name]
        other = self._tied_to.get(name)
        if other is None or not self._tracker.has(other):
            weight.copy_(tensor)
        elif not torch.equal(weight, tensor.to(weight)):
            self._tracker.fail(f"{name} differs from {other}, but config.json says tie_word_embeddings")

    def end_update(self, version: int) -> None:
        """Serve ``version``; raises EngineError if a tensor is missing."""
        self._require_open()
        self._tracker.end(version)

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, arrived: Arrived = ignore
    ) -> list[Rollout]:
        """One rollout for each request, in order.  A request without room (``max_new_tokens`` 0) comes
        back with nothing written, finished by length.  ``arrived`` is told of every batch that was decoded.

        Raises:
            EngineError: no whole set of weights, a malformed request, or NaN/infinite logits.
        """
        model, version = self._require_open(), self._tracker.require_ready()
        check_requests(requests, vocab_size=self._vocab_size, max_positions=self._max_positions)
        nothing = Continuation(token_ids=(), logprobs=(), finish="length")
        rollouts = {i: _rollout(r, nothing, version) for i, r in enumerate(requests) if r.max_new_tokens == 0}
        arrived(dict(rollouts))
        # Neighbours in length share a batch: less padding, fewer steps on half-empty batches.
        order = sorted(
            (i for i, request in enumerate(requests) if request.max_new_tokens > 0),
            key=lambda i: (requests[i].max_new_tokens, len(requests[i].token_ids)),
        )
        self._count(0, len(order))
        for start in range(0, len(order), self._max_batch_size):
            chosen = order[start : start + self._max_batch_size]
            written = self._decode(model, [requests[i] for i in chosen], params, before=start, of=len(order))
            finished = {i: _rollout(requests[i], done, version) for i, done in zip(chosen, written, strict=True)}
            arrived(finished)
            rollouts |= finished
        return [rollouts[i] for i in range(len(requests))]

    def _count(self, done: int, total: int) -> None:
        self._written = Counts(done=done, total=total, unit="responses on this rank")

    def _decode(
        self, model: PreTrainedModel, requests: list[GenerationRequest], params: SamplingParams, *, before: int, of: int
    ) -> list[Continuation]:
        """Write a batch that has ``before`` of the ``of`` requests before it."""
        try:
            return decode(
                model, requests, params, stop_token_ids=self._stop_token_ids, vocab_size=self._vocab_size,
                on_finished=lambda count: self._count(before + count, of),
            )  # fmt: skip
        except ValueError as error:
            uids = sorted({request.prompt_uid for request in requests})
            raise EngineError(
                f"weight version {self.weight_version}, batch of prompts {uids[0]}..{uids[-1]}: {error}"
            ) from error

    def health(self) -> None:
        """Raise EngineError, saying why, if ``generate`` would be refused now."""
        self._require_open()
        self._tracker.require_ready()

    def close(self) -> None:
        """Free the weights.  May be called twice."""
        self._model = None
        self._weights = {}
        gc.collect()

    def _require_open(self) -> PreTrainedModel:
        if self._model is None:
            raise EngineError("the embedded engine is closed")
        return self._model


def _rollout(request: GenerationRequest, written: Continuation, version: int) -> Rollout:
    return Rollout(
        prompt_uid=request.prompt_uid,
        sample_index=request.sample_index,
        token_ids=request.token_ids + written.token_ids,
        prompt_len=request.prompt_len,
        guidance_len=request.guidance_len,
        logprobs=written.logprobs,
        weight_version=(version, version),
        finish=written.finish,
        topk_ids=written.topk_ids,
    )
