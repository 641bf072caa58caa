"""Seconds of every phase and of a step, and what is idle.

Scoring and training are products, so their seconds are FLOPs / (ranks x peak x share).  A token costs 2 P forward and
4 P backward (P the parameters in products with it; arXiv 2001.08361), and attention 4 a for each pair of tokens of its
triangle and layer (a the columns of all query heads).  ``--recompute-granularity full`` computes the layers' forward
pass twice; ``--head-mode recompute`` multiplies by the output table four times instead of three.  A pipeline of PP
stages and m micro-batches is busy m / (m + PP - 1) of its time (arXiv 1811.06965), with v virtual stages
m / (m + (PP - 1) / v) (arXiv 2104.04473), and goes at the pace of the stage with the most layers.

How phases follow each other:

    teacher colocated, lag 0     generate, score, train and push take turns
    dedicated or server          the teacher scores finished rollouts while others are written.  The last score is made
                                 at max over t of (t + work that arrives from t on / rate), as a queue has it that
                                 is served without a pause
    lag 1                        a batch is written, and scored elsewhere, while the one before is trained on: the
                                 longer of both, and then the push.  Only other GPUs can work at the same time
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from tools.acceptance.flops import head_flops, layers_flops
from tools.planning.activations import repeated
from tools.planning.caches import score_bytes, score_text_bytes
from tools.planning.generation import Generation, Moment, plan_generation
from tools.planning.parameters import model_parameters, rank_parameters
from tools.planning.scenario import Scenario

_UPDATE_BYTES = {True: 30, False: 28}
"""Bytes a parameter that AdamW reads and writes, by bf16: gradient, both moments and masters both ways, weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """GPUs that do the same."""

    name: str
    gpus: int
    busy_s: float
    """Seconds of a step in which they work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Seconds of a step."""

    generate_s: float
    score_s: float
    """Of all rollouts, whatever else happens at that time."""
    waits_for_scores_s: float
    """From the last rollout to the last score."""
    train_s: float
    push_s: float
    step_s: float
    generation: Generation | None
    score_payload: float
    """Bytes of scores in a step."""
    push_bytes: float
    """Bytes of weights that reach engines in a step."""
    train_flops: float
    score_flops: float
    pools: tuple[Pool, ...]
    overlaps: bool
    """Whether lag 1 makes anything happen at one time."""

    def busy(self, pool: Pool) -> float:
        """Return the share of the step in which a pool works."""
        return pool.busy_s / self.step_s


def plan_step(scenario: Scenario) -> StepPlan:
    """Return the seconds of a step; see the module."""
    generation = plan_generation(scenario) if scenario.engines else None
    generate = generation.seconds if generation else 0.0
    score_flops = _score_flops(scenario)
    score, tail = _score_seconds(scenario, score_flops, generation)
    reference = _reference_seconds(scenario)
    train_flops, train = _train(scenario)
    push_bytes, push = _push(scenario)
    separate = bool(scenario.engines and not scenario.engines.shared_ranks)
    lag = scenario.machines.rollout_lag == 1
    own_teacher = scenario.machines.teacher_placement in ("dedicated", "server", "file")
    arrives = generate + tail
    if lag and separate and own_teacher:
        step = max(arrives, reference + train) + push
    elif lag and separate:
        step = max(generate, score + reference + train) + push
    else:
        step = arrives + reference + train + push
    colocated_s = 0.0 if own_teacher else score
    return StepPlan(
        generate_s=generate, score_s=score, waits_for_scores_s=tail, train_s=reference + train, push_s=push,
        step_s=step, generation=generation, score_payload=_payload(scenario), push_bytes=push_bytes,
        train_flops=train_flops, score_flops=score_flops, overlaps=lag and separate,
        pools=tuple(_pools(scenario, generate, score, colocated_s + reference + train, push)),
    )  # fmt: skip


def _pools(scenario: Scenario, generate: float, score: float, trains: float, push: float) -> list[Pool]:
    engines, machines = scenario.engines, scenario.machines
    shared = engines.shared_ranks if engines else 0
    trainers = scenario.student_ranks
    pools = [Pool(name="trainer", gpus=trainers, busy_s=trains + push + generate * shared / trainers)]
    if scenario.teacher and machines.teacher_placement in ("dedicated", "server"):
        pools.append(Pool(name="teacher", gpus=machines.teacher_world_size, busy_s=score))
    if engines and engines.own_gpus:
        pools.append(Pool(name="engines", gpus=engines.own_gpus, busy_s=generate + push))
    return pools


def _labels(scenario: Scenario) -> float:
    """Return the response tokens of a step."""
    return scenario.sequences * scenario.lengths.mean_response


def pass_flops(scenario: Scenario, arch: Architecture) -> tuple[float, float]:
    """Return the FLOPs of a forward pass over all rollouts of a step: those of the layers, those of the head."""
    sequences, lengths = scenario.sequences, scenario.lengths
    layers = layers_flops(arch, sequences * lengths.mean, sequences * lengths.mean_pairs)
    return layers, head_flops(arch, _labels(scenario))


def _score_flops(scenario: Scenario) -> float:
    if not scenario.teacher or scenario.machines.teacher_placement == "file":
        return 0.0
    return sum(pass_flops(scenario, scenario.teacher))


def _stretch(arch: Architecture, layout: ParallelLayout, microbatches: float) -> float:
    """Return the seconds of a pipeline as a multiple of those of its work, evenly split and without a pause."""
    stages = [layout.chunks * len(layout.stage_layers(arch.num_layers, stage)) for stage in range(layout.pp)]
    unevenness = max(stages) * layout.pp / arch.num_layers
    return unevenness * (microbatches + (layout.pp - 1) / layout.chunks) / microbatches


def _frozen_stretch(scenario: Scenario, arch: Architecture, layout: ParallelLayout) -> float:
    tokens = scenario.sequences * scenario.lengths.mean / layout.dp
    microbatches = max(1.0, tokens / scenario.config.training.max_tokens_per_microbatch)
    return _stretch(arch, layout, microbatches)


def _frozen_seconds(scenario: Scenario, arch: Architecture, layout: ParallelLayout, flops: float) -> float:
    rate = layout.world_size * scenario.machines.gpu.flops(bf16=scenario.bf16) * scenario.machines.efficiency.score
    seconds = flops * repeated(arch, layout) * _frozen_stretch(scenario, arch, layout) / rate
    if scenario.config.teacher.teacher_offload:
        largest = max(rank_parameters(arch, layout, stage).total for stage in range(layout.pp))
        seconds += 2 * largest * scenario.itemsize / _host(scenario)
    return seconds


def _host(scenario: Scenario) -> float:
    return scenario.machines.gpu.host * scenario.machines.efficiency.link


def _score_seconds(scenario: Scenario, flops: float, generation: Generation | None) -> tuple[float, float]:
    """Return the seconds of scoring all rollouts, and those between the last rollout and the last score."""
    teacher, machines = scenario.teacher, scenario.machines
    if not teacher or machines.teacher_placement == "file":
        return 0.0, 0.0
    if scenario.teacher_engine:
        rate = machines.teacher_world_size * machines.gpu.flops(bf16=scenario.bf16) * machines.efficiency.score
        seconds, replicas = flops / rate, machines.teacher_world_size // scenario.teacher_engine.tp
        seconds += _labels(scenario) * score_text_bytes(scenario.needs.score) / (machines.efficiency.http * replicas)
    else:
        assert scenario.teacher_layout
        layout = scenario.teacher_layout
        seconds, replicas = _frozen_seconds(scenario, teacher, layout, flops), layout.dp
        seconds += _payload(scenario) / (_host(scenario) * layout.world_size)
    if machines.teacher_placement == "colocated" or generation is None:
        return seconds, seconds
    end = last_score(generation.moments, seconds)
    longest = scenario.lengths.longest / (scenario.sequences * scenario.lengths.mean)
    last = seconds * replicas * longest  # one sequence, on one replica
    return seconds, max(end - generation.seconds, last)


def last_score(moments: Sequence[Moment], seconds: float) -> float:
    """Return when the last score is made if finished rollouts wait in a queue for a teacher that needs ``seconds`` for
    all of them: it works without a pause from the last moment at which the queue was empty."""
    return max(at.seconds + seconds * (1 - before.finished) for before, at in itertools.pairwise(moments))


def _reference_seconds(scenario: Scenario) -> float:
    if not scenario.reference or not scenario.reference_layout:
        return 0.0
    flops = sum(pass_flops(scenario, scenario.reference))
    return _frozen_seconds(scenario, scenario.reference, scenario.reference_layout, flops)


def _payload(scenario: Scenario) -> float:
    if not scenario.teacher:
        return 0.0
    if scenario.machines.teacher_placement == "server":
        return _labels(scenario) * score_text_bytes(scenario.needs.score)
    one = score_bytes(scenario.needs.score, hidden=scenario.teacher.hidden_size, itemsize=scenario.itemsize)
    return _labels(scenario) * one


def _train(scenario: Scenario) -> tuple[float, float]:
    """Return the FLOPs of the model in training, and the seconds with what is computed again, the reduction of
    gradients and the updates."""
    config, layout, machines = scenario.config, scenario.student_layout, scenario.machines
    layers, head = pass_flops(scenario, scenario.student)
    flops = work = 3 * (layers + head)
    work += layers * (config.model.recompute_granularity == "full") + head * (config.training.head_mode == "recompute")
    work += (layers + head) * scenario.needs.old_policy
    rate = layout.world_size * machines.gpu.flops(bf16=scenario.bf16) * machines.efficiency.train
    seconds = work * _stretch(scenario.student, layout, scenario.microbatches) / rate
    parameters = max(rank_parameters(scenario.student, layout, stage).total for stage in range(layout.pp))
    replicas = layout.dp * layout.cp
    reduced = 2 * 4 * parameters * (replicas - 1) / replicas / _link(scenario, layout.world_size)
    cut = replicas if config.parallel.use_distributed_optimizer else 1
    update = _UPDATE_BYTES[scenario.bf16] * parameters / cut / (machines.gpu.bandwidth * machines.efficiency.link)
    return flops, seconds + config.training.num_minibatches * (reduced + update)


def _link(scenario: Scenario, ranks: int) -> float:
    """Return the bytes/s between ranks: NVLink inside a node, the network beyond."""
    gpu = scenario.machines.gpu
    return (gpu.nvlink if ranks <= scenario.machines.gpus_per_node else gpu.network) * scenario.machines.efficiency.link


def _push(scenario: Scenario) -> tuple[float, float]:
    """Return the bytes of weights that reach engines, and the seconds until they have them."""
    engines, transport = scenario.engines, scenario.config.engine.update_weight_transport
    if not engines:
        return 0.0, 0.0
    weights = model_parameters(scenario.student) * scenario.itemsize
    total = float(weights * engines.number)
    gathered = weights / _link(scenario, scenario.student_ranks)
    if not engines.fraction:
        return total, gathered  # every rank receives the export that fills its own engine
    if transport.startswith("planned"):
        link = _link(scenario, scenario.machines.gpus_per_node if engines.shared_ranks else 10**9)
        return total, max(total / scenario.student_ranks, weights / engines.layout.tp) / link
    own = not scenario.config.engine.rollout_engine_urls
    if transport == "shared" or (transport == "auto" and own):
        # Into memory that the host's processes share, and from there by every engine at one time.
        return total, gathered + 2 * weights / _host(scenario)
    return total, gathered + total * 4 / 3 / scenario.machines.efficiency.http  # rank 0 sends base64 to each
