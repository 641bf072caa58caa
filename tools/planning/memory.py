"""Bytes of every kind of rank, by phase: what lives on its GPU, and when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from tools.planning.activations import forward_bytes, training_bytes
from tools.planning.caches import head_bytes, kv_bytes
from tools.planning.parameters import (
    engine_parameters,
    largest_tensor,
    model_parameters,
    rank_parameters,
    training_state,
)
from tools.planning.scenario import Engines, Scenario

Phase = Literal["generate", "score", "train", "push"]
PHASES: tuple[Phase, ...] = ("generate", "score", "train", "push")
_EXPORT_BUCKET = 512 << 20
_SAMPLING_BYTES = 4 + 3 * 8
"""Of a row's logit in the embedded engine: fp32, and three copies in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Something that lives on a GPU."""

    name: str
    bytes: float
    phases: tuple[Phase, ...] = PHASES


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """One kind of rank: all ranks of it hold the same."""

    who: str
    ranks: int
    items: tuple[Item, ...]
    room: float
    """Bytes that may be used."""

    def of(self, phase: Phase) -> float:
        """Return the bytes in a phase."""
        return sum(item.bytes for item in self.items if phase in item.phases)

    @property
    def peak(self) -> float:
        """Bytes in the fullest phase."""
        return max(map(self.of, PHASES))

    @property
    def fullest(self) -> Phase:
        """The phase that needs most."""
        return max(PHASES, key=self.of)

    @property
    def fits(self) -> bool:
        """Whether no phase needs more than there is."""
        return self.peak <= self.room


def plan_memory(scenario: Scenario) -> tuple[RankMemory, ...]:
    """Return every kind of GPU of the run: trainer ranks, those of a teacher of its own, and servers."""
    kinds: dict[tuple[int, int, int, bool], int] = {}
    for rank in range(scenario.student_ranks):
        kind = _kind(scenario, rank)
        kinds[kind] = kinds.get(kind, 0) + 1
    several = len({kind[0] for kind in kinds}) > 1
    found = [
        RankMemory(
            who="student" + (f", stage {stage}" if several else "")
            + (f", teacher's stage {frozen}" if scenario.teacher_layout and scenario.teacher_layout.pp > 1 else "")
            + (", with a server" if beside else ""),
            ranks=count, items=tuple(_trainer_items(scenario, stage, frozen, other, beside)), room=_room(scenario),
        )
        for (stage, frozen, other, beside), count in kinds.items()
    ]  # fmt: skip
    found += _teacher_ranks(scenario)
    if scenario.engines and scenario.engines.own_gpus:
        engine = scenario.engines
        items = _server_items(scenario, scenario.student, engine, engine.fraction)
        found.append(RankMemory(who="engine", ranks=engine.own_gpus, items=tuple(items), room=_room(scenario)))
    return tuple(found)


def _room(scenario: Scenario) -> float:
    return scenario.machines.gpu.memory - scenario.machines.reserve


def _kind(scenario: Scenario, rank: int) -> tuple[int, int, int, bool]:
    """Return (stage of the student, of a colocated teacher, of the reference, whether a server is on the same GPU)."""
    engines, colocated = scenario.engines, scenario.machines.teacher_placement == "colocated"
    frozen = scenario.teacher_layout.coords(rank).pp if scenario.teacher_layout and colocated else 0
    other = scenario.reference_layout.coords(rank).pp if scenario.reference_layout else 0
    beside = bool(engines and engines.fraction and rank < engines.shared_ranks)
    return scenario.student_layout.coords(rank).pp, frozen, other, beside


def _trainer_items(scenario: Scenario, stage: int, frozen: int, other: int, beside: bool) -> Iterator[Item]:
    yield from _student_items(scenario, stage)
    colocated = scenario.machines.teacher_placement == "colocated"
    if scenario.teacher and scenario.teacher_layout and colocated:
        yield from _frozen_items(scenario, "teacher", scenario.teacher, scenario.teacher_layout, frozen)
    if scenario.reference and scenario.reference_layout:
        yield from _frozen_items(scenario, "reference", scenario.reference, scenario.reference_layout, other)
    engines = scenario.engines
    if engines and not engines.fraction:
        yield from _embedded_items(scenario)
    if beside and engines:
        size = engines.fraction * scenario.machines.gpu.memory
        yield Item(name="SGLang server: weights and KV cache", bytes=size)
    if engines:
        largest = largest_tensor(scenario.student) * scenario.itemsize
        size = 2 * max(_EXPORT_BUCKET, largest)
        if scenario.config.engine.update_weight_transport.startswith("planned"):
            size = scenario.config.engine.update_weight_buffer_size
        yield Item(name="buffers of the weight push", bytes=size, phases=("push",))


def _student_items(scenario: Scenario, stage: int) -> Iterator[Item]:
    layout, config, arch = scenario.student_layout, scenario.config, scenario.student
    state = training_state(
        rank_parameters(arch, layout, stage), layout, bf16=scenario.bf16,
        distributed_optimizer=config.parallel.use_distributed_optimizer,
    )  # fmt: skip
    yield Item(name="student: weights", bytes=state.weights)
    yield Item(name="student: gradients", bytes=state.gradients)
    yield Item(name="student: optimizer state", bytes=state.optimizer)
    shape = scenario.student_shape
    kept = training_bytes(arch, layout, stage, shape, config.model.recompute_granularity, scenario.microbatches)
    yield Item(name="student: activations", bytes=kept, phases=("train",))
    if stage == layout.pp - 1:
        yield Item(name="student: head", bytes=student_head(scenario), phases=("train",))
        if scenario.needs.divergence and scenario.teacher:
            columns = layout.padded_vocab_size(arch.vocab_size) // layout.tp
            rows = min(scenario.chunk, shape.tokens) * columns * scenario.itemsize
            width = scenario.teacher.hidden_size * scenario.itemsize
            size = rows + (columns + shape.tokens) * width
            yield Item(name="teacher's logits, rows and hidden states", bytes=size, phases=("train",))


def student_head(scenario: Scenario) -> int:
    """Return the bytes of the student's head on a rank of the last stage."""
    layout, training = scenario.student_layout, scenario.config.training
    return head_bytes(
        tokens=scenario.student_tokens, chunk=scenario.chunk, itemsize=scenario.itemsize,
        columns=layout.padded_vocab_size(scenario.student.vocab_size) // layout.tp, hidden=scenario.student.hidden_size,
        logits=4 if training.logits_dtype == "fp32" else scenario.itemsize, mode=training.head_mode,
    )  # fmt: skip


def _frozen_items(
    scenario: Scenario, who: str, arch: Architecture, layout: ParallelLayout, stage: int
) -> Iterator[Item]:
    parameters = rank_parameters(arch, layout, stage).total
    offload = scenario.config.teacher.teacher_offload
    yield Item(
        name=f"{who}: weights", bytes=parameters * scenario.itemsize, phases=("score",) if offload else PHASES
    )  # fmt: skip
    shape = scenario.frozen_shape
    yield Item(name=f"{who}: forward pass", bytes=forward_bytes(arch, layout, shape), phases=("score",))
    if stage == layout.pp - 1:
        columns = layout.padded_vocab_size(arch.vocab_size) // layout.tp
        rows = min(scenario.chunk, shape.tokens)
        yield Item(name=f"{who}: logits of a chunk", bytes=rows * columns * scenario.itemsize, phases=("score",))


def _embedded_items(scenario: Scenario) -> Iterator[Item]:
    """An embedded engine: the whole student, and a KV cache in which every response reaches the limit."""
    arch, lengths = scenario.student, scenario.lengths
    yield Item(name="embedded engine: weights", bytes=model_parameters(arch) * scenario.itemsize)
    batch = embedded_batch(scenario)
    cache = kv_bytes(arch, scenario.itemsize) * batch * lengths.longest
    # transformers joins cache and new token of one layer at a time in new memory.
    size = cache * (1 + 1 / arch.num_layers) + batch * arch.vocab_size * _SAMPLING_BYTES
    yield Item(name="embedded engine: KV cache and sampling", bytes=size, phases=("generate",))


def embedded_batch(scenario: Scenario) -> int:
    """Return the sequences that one embedded engine writes at one time."""
    return min(scenario.config.rollout.rollout_max_batch_size, -(-scenario.sequences // scenario.student_ranks))


def _server_items(scenario: Scenario, arch: Architecture, engine: Engines, fraction: float) -> Iterator[Item]:
    weights = engine_parameters(arch, engine.layout) * scenario.itemsize
    yield Item(name="server: weights", bytes=weights)
    cache = max(0.0, fraction * scenario.machines.gpu.memory - weights)
    yield Item(name="server: KV cache", bytes=cache)


def kv_room(scenario: Scenario) -> float:
    """Return the tokens whose KV cache one SGLang engine has room for, over all of its GPUs; below 0: the weights alone
    do not fit."""
    engine = scenario.engines
    assert engine and engine.fraction
    weights = engine_parameters(scenario.student, engine.layout) * scenario.itemsize
    left = engine.fraction * scenario.machines.gpu.memory - weights
    repeats = max(1, engine.layout.tp // scenario.student.num_query_groups)
    return left * engine.layout.tp / (kv_bytes(scenario.student, scenario.itemsize) * repeats)


def _teacher_ranks(scenario: Scenario) -> list[RankMemory]:
    """Return the GPUs that belong to the teacher alone."""
    teacher, machines = scenario.teacher, scenario.machines
    if teacher and scenario.teacher_layout and machines.teacher_placement == "dedicated":
        layout = scenario.teacher_layout
        return [
            RankMemory(
                who="teacher" + (f", stage {stage}" if layout.pp > 1 else ""), ranks=layout.stage_size,
                items=tuple(_frozen_items(scenario, "teacher", teacher, layout, stage)), room=_room(scenario),
            )
            for stage in range(layout.pp)
        ]  # fmt: skip
    if teacher and scenario.teacher_engine:
        weights = engine_parameters(teacher, scenario.teacher_engine) * scenario.itemsize
        shape = scenario.frozen_shape
        layout = ParallelLayout(tp=scenario.teacher_engine.tp)
        work = forward_bytes(teacher, layout, shape)
        items = (
            Item(name="teacher's server: weights", bytes=weights),
            Item(name="teacher's server: forward pass", bytes=work, phases=("score",)),
        )
        ranks, room = machines.teacher_world_size, _room(scenario)
        return [RankMemory(who="teacher's server", ranks=ranks, items=items, room=room)]
    return []


def over(memory: tuple[RankMemory, ...]) -> float:
    """Return the bytes by which the fullest GPU exceeds its room; below 0 where all fit."""
    return max(rank.peak - rank.room for rank in memory)
