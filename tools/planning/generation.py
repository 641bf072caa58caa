"""Seconds of an engine that writes, and when its rollouts are finished.

Decoding reads the weights once for each step and the KV cache of every sequence that is written, so a step takes

    max((weights + tokens in the cache x bytes of one) / (bandwidth x share), 2 P n / (FLOP/s x share)) + a fixed cost

for n sequences and P active parameters (the roofline of arXiv 2211.05102, section 2).  Of a model with experts n
tokens touch the share 1 - (1 - k / E)^n of the experts.  The number of sequences falls as ``lengths.py`` says: at
position t it is the number of responses longer than t.  A step happens as long as any response is longer:
1 - (1 - s(t))^S.

An engine that has no room for all its sequences at one time writes the others in the places that become free
(SGLang), or batch after batch (the embedded engine).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.models.architecture import Architecture
from tools.acceptance.flops import expert_parameters, layer_parameters, layers_flops
from tools.planning.caches import kv_bytes
from tools.planning.lengths import Lengths
from tools.planning.memory import embedded_batch, kv_room
from tools.planning.parameters import model_parameters
from tools.planning.scenario import Scenario

SLICES = 200
"""Parts of the longest response in which the batch counts as constant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A point in time of a generation."""

    seconds: float
    finished: float
    """Share of all tokens, those of prompts included, in rollouts that are finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How the engines write the rollouts of a step."""

    seconds: float
    moments: tuple[Moment, ...]
    prefill_seconds: float
    batch: int
    """Most sequences of an engine at one time."""
    sequences: int
    """Of an engine in a step."""
    new_tokens_per_second: float
    """Of an engine, on average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The model on the GPUs of one engine."""

    arch: Architecture
    itemsize: int
    bandwidth: float
    """Bytes/s of its GPUs together that decoding reaches."""
    flops: float
    """FLOP/s of its GPUs together that decoding reaches."""
    step_s: float
    """Fixed seconds of a step."""

    def step(self, sequences: float, context: float) -> float:
        """Return the seconds of a step of ``sequences`` with ``context`` tokens each."""
        head = self.arch.vocab_size * self.arch.hidden_size
        active = self.arch.num_layers * layer_parameters(self.arch) + head
        read = self.itemsize * self.weights_read(sequences) + sequences * context * kv_bytes(self.arch, self.itemsize)
        products = 2 * active * sequences + layers_flops(self.arch, 0, context) * sequences
        return max(read / self.bandwidth, products / self.flops) + self.step_s

    def weights_read(self, sequences: float) -> float:
        """Return the parameters that a step reads: all but the rows of an input table that is not the output's, and
        the experts that no token meets."""
        arch = self.arch
        read = model_parameters(arch) - (0 if arch.tie_word_embeddings else arch.vocab_size * arch.hidden_size)
        if arch.num_experts:
            router = arch.hidden_size * arch.num_experts
            one = (expert_parameters(arch) - router) / arch.num_experts_per_tok
            missed = (1 - arch.num_experts_per_tok / arch.num_experts) ** sequences
            read -= round(arch.num_layers * arch.num_experts * one * missed)
        return read


def plan_generation(scenario: Scenario) -> Generation:
    """Return the generation of one step; all engines write equally many sequences."""
    engines, lengths = scenario.engines, scenario.lengths
    assert engines
    sequences = -(-scenario.sequences // engines.number)
    if engines.fraction:
        room = int(max(kv_room(scenario), 1) / (lengths.mean_prompt + _mean_written(lengths)))
        batch = max(1, min(sequences, room))
    else:
        batch = embedded_batch(scenario)
    decoder = _decoder(scenario)
    gpu, share = scenario.machines.gpu, scenario.machines.efficiency
    prompt = lengths.mean_prompt
    flops = layers_flops(scenario.student, prompt, prompt * (prompt + 1) / 2) * sequences
    prefill = flops / (engines.layout.tp * gpu.flops(bf16=scenario.bf16) * share.score)
    moments = written(decoder, lengths, sequences, batch, refills=engines.fraction > 0)
    seconds = prefill + moments[-1].seconds
    shifted = tuple(Moment(seconds=prefill + at.seconds, finished=at.finished) for at in moments)
    return Generation(
        seconds=seconds, moments=shifted, prefill_seconds=prefill, batch=batch, sequences=sequences,
        new_tokens_per_second=sequences * lengths.mean_response / seconds,
    )  # fmt: skip


def _decoder(scenario: Scenario) -> Decoder:
    engines, gpu, share = scenario.engines, scenario.machines.gpu, scenario.machines.efficiency
    assert engines
    fixed = share.sglang_step_s if engines.fraction else share.embedded_layer_s * scenario.student.num_layers
    return Decoder(
        arch=scenario.student, itemsize=scenario.itemsize, step_s=fixed,
        bandwidth=engines.layout.tp * gpu.bandwidth * share.decode_bandwidth,
        flops=engines.layout.tp * gpu.flops(bf16=scenario.bf16) * share.decode_flops,
    )  # fmt: skip


def _mean_written(lengths: Lengths) -> float:
    """Return the written tokens of a sequence at a random moment of its writing: E[L^2] / (2 E[L])."""
    return lengths.mean_square_response / (2 * lengths.mean_response)


def written(decoder: Decoder, lengths: Lengths, sequences: int, batch: int, *, refills: bool) -> list[Moment]:
    """Return the moments of writing ``sequences``, of which ``batch`` are written at one time.

    Where places that become free are taken at once, the batch is full until the last sequence has begun.  It then has
    sequences of every age, which have E[L^2] / (2 E[L]) tokens to go on average (residual life in a renewal process).
    """
    moments = [Moment(seconds=0.0, finished=0.0)]
    if refills and sequences > batch:
        left = _mean_written(lengths)
        steps = (sequences * lengths.mean_response - batch * left) / batch
        seconds = steps * decoder.step(batch, lengths.mean_prompt + _mean_written(lengths))
        begun = batch * (lengths.mean_prompt + lengths.mean_square_response / lengths.mean_response)
        finished = max(0.0, 1 - begun / (sequences * lengths.mean))
        shares = (number / SLICES for number in range(1, SLICES + 1))
        moments += [Moment(seconds=seconds * share, finished=finished * share) for share in shares]
        return moments + _tail(decoder, lengths, batch, moments[-1], 1 - finished, aged=True)
    done = 0
    while done < sequences:
        size = min(batch, sequences - done)
        moments += _tail(decoder, lengths, size, moments[-1], size / sequences)
        done += size
    return moments


def _tail(
    decoder: Decoder, lengths: Lengths, batch: int, start: Moment, share: float, *, aged: bool = False
) -> list[Moment]:
    """Return the moments after ``start`` of a batch that is written to its end.

    ``share``: of all tokens.  ``aged``: its sequences have ages as in the middle of a generation, not 0.
    """
    width = lengths.max_response / SLICES
    seconds, ended, passed = start.seconds, 0.0, []
    for number in range(SLICES):
        middle = (number + 0.5) * width
        age = lengths.mean_age(middle) if aged else 0.0
        longer = lengths.longer_than(middle, aged=aged)
        happens = 1 - (1 - longer) ** batch
        if happens > 0:
            seconds += width * happens * decoder.step(batch * longer / happens, lengths.mean_prompt + age + middle)
        part = lengths.longer_than(number * width, aged=aged) - lengths.longer_than((number + 1) * width, aged=aged)
        ended += part * (lengths.mean_prompt + age + middle)
        passed.append((seconds, ended))
    return [Moment(seconds=at, finished=start.finished + share * part / ended) for at, part in passed]
