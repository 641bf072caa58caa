"""The plan as text for people, and as a value for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_tropd.parallel.layout import ParallelLayout
from tools.planning.advice import changes, remarks, what_fits
from tools.planning.caches import kv_bytes
from tools.planning.memory import PHASES, RankMemory, kv_room, plan_memory
from tools.planning.parameters import model_parameters
from tools.planning.scenario import Scenario
from tools.planning.seconds import StepPlan, plan_step

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Memory and seconds of a scenario."""

    scenario: Scenario
    memory: tuple[RankMemory, ...]
    step: StepPlan

    @classmethod
    def of(cls, scenario: Scenario) -> RunPlan:
        """Plan ``scenario``."""
        return cls(scenario=scenario, memory=plan_memory(scenario), step=plan_step(scenario))

    @property
    def fits(self) -> bool:
        """Whether every GPU has room."""
        return all(rank.fits for rank in self.memory)


def layout_text(layout: ParallelLayout) -> str:
    """Return a layout in short."""
    sizes = {"TP": layout.tp, "CP": layout.cp, "PP": layout.pp, "EP": layout.ep, "DP": layout.dp}
    text = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1 or name == "TP")
    return text + (f" ETP{layout.expert_tp}" if layout.expert_tp != layout.tp else "")


def text(plan: RunPlan) -> str:
    """Return the report for people."""
    scenario = plan.scenario
    lines = [*_head(plan), "", *_memory(plan), "", *_seconds(plan), ""]
    lines += _verdict(plan)
    lines += [f"  - {line}" for line in remarks(scenario, plan.step)]
    lines += ["", "Counted, not measured: docs/scaling.md says what is assumed.  Nothing here was run on a GPU."]
    return "\n".join(lines)


def _head(plan: RunPlan) -> Iterator[str]:
    s, step = plan.scenario, plan.step
    machines, dtype = s.machines, "bf16" if s.bf16 else "fp32"
    memory = machines.gpu.memory / GB
    yield f"GPUs       {s.total_gpus} x {machines.gpu.name} ({memory:g} GB), {machines.gpus_per_node} a node"
    yield f"student    {model_parameters(s.student) / GB:.2f} B parameters in {dtype}, {layout_text(s.student_layout)}"
    if s.teacher:
        where = layout_text(s.teacher_layout) if s.teacher_layout else ""
        if s.teacher_engine:
            number = machines.teacher_world_size // s.teacher_engine.tp
            where = f"{number} servers of {s.teacher_engine.tp} GPUs"
        size = model_parameters(s.teacher) / GB
        yield f"teacher    {size:.2f} B parameters, {machines.teacher_placement} {where}".rstrip()
    if s.engines:
        kind = "SGLang" if s.engines.fraction else "embedded"
        beside = "on the trainer's GPUs" if s.engines.shared_ranks else "on GPUs of their own"
        cut = f" of {s.engines.layout.tp} GPUs" if s.engines.layout.tp > 1 else ""
        yield f"engines    {s.engines.number} x {kind}{cut}, {beside}"
    yield (
        f"a step     {s.sequences} rollouts, prompts of {s.lengths.mean_prompt:,.0f} tokens and responses of "
        f"{s.lengths.mean_response:,.0f} on average, at most {s.lengths.max_response:,}; lag {machines.rollout_lag}"
    )
    train, score = step.train_flops / 1e15, step.score_flops / 1e15
    yield f"           training {train:,.1f} PFLOP, scoring {score:,.1f} PFLOP of the models"


def _memory(plan: RunPlan) -> Iterator[str]:
    s = plan.scenario
    room = s.machines.gpu.memory - s.machines.reserve
    yield f"Memory in GB, of {room / GB:.1f} (the GPU's without --memory-reserve-gb {s.machines.reserve / GB:g})"
    yield f"  {'':48s}" + "".join(f"{phase:>10s}" for phase in PHASES)
    for rank in plan.memory:
        yield f"  {rank.who} ({rank.ranks} GPUs)"
        for item in rank.items:
            cells = "".join(f"{item.bytes / GB if phase in item.phases else 0:10.2f}" for phase in PHASES)
            yield f"    {item.name:46s}{cells}"
        total = "".join(f"{rank.of(phase) / GB:10.2f}" for phase in PHASES)
        yield f"    {'together' + ('' if rank.fits else '  <- does not fit'):46s}{total}"
    if s.engines and s.engines.fraction:
        one, room = kv_bytes(s.student, s.itemsize) / 1e6, max(kv_room(s), 0)
        yield f"  KV cache: {one:.3f} MB a token, room for {room:,.0f} tokens in an engine"
    if s.teacher:
        size = plan.step.score_payload / GB
        one = plan.step.score_payload / (s.sequences * s.lengths.mean_response)
        yield f"  teacher's scores: {one:.0f} bytes a token, {size:.2f} GB a step, through host memory"


def _seconds(plan: RunPlan) -> Iterator[str]:
    step, generation = plan.step, plan.step.generation
    yield f"Seconds of a step: {step.step_s:.1f}"
    if generation:
        yield (
            f"  generate {step.generate_s:10.1f}   {generation.new_tokens_per_second:,.0f} new tokens/s an engine, at "
            f"most {generation.batch} of its {generation.sequences} sequences at one time"
        )
    late = step.waits_for_scores_s
    after = "" if late == step.score_s else f"{late:.1f} of them after the last rollout"
    yield f"  score    {step.score_s:10.1f}   {after}".rstrip()
    yield f"  train    {step.train_s:10.1f}"
    yield f"  push     {step.push_s:10.1f}   {step.push_bytes / GB:.2f} GB to the engines"
    for pool in step.pools:
        yield f"  {pool.name}: {pool.gpus} GPUs, busy {step.busy(pool):.0%} of the step"


def _verdict(plan: RunPlan) -> Iterator[str]:
    if plan.fits:
        yield "Everything fits."
        return
    for rank in plan.memory:
        if not rank.fits:
            yield (f"Does not fit: {rank.who}, {rank.peak / GB:.1f} GB of {rank.room / GB:.1f} in phase {rank.fullest}")
    for change in changes(plan.scenario):
        yield f"  {change.flags}: {change.saves / GB:.1f} GB less{', then everything fits' if change.fits else ''}"
    together = what_fits(plan.scenario)
    if len(together) > 1:
        yield f"  fits with {' '.join(together)}"
    elif not together:
        yield "  no few flags are enough: more GPUs, --teacher-placement dedicated or server, or smaller models"


def as_value(plan: RunPlan) -> dict[str, Any]:
    """Return the plan for a program; bytes and seconds."""
    s, step = plan.scenario, plan.step
    return {
        "gpus": s.total_gpus,
        "gpu": s.machines.gpu.name,
        "student": {"parameters": model_parameters(s.student), "layout": layout_text(s.student_layout)},
        "teacher": s.teacher and {
            "parameters": model_parameters(s.teacher), "placement": s.machines.teacher_placement,
            "layout": layout_text(s.teacher_layout) if s.teacher_layout else None,
        },
        "fits": plan.fits,
        "memory": [
            {
                "who": rank.who, "ranks": rank.ranks, "room": rank.room, "fits": rank.fits,
                "phases": {phase: rank.of(phase) for phase in PHASES},
                "items": [{"name": i.name, "bytes": i.bytes, "phases": list(i.phases)} for i in rank.items],
            }
            for rank in plan.memory
        ],
        "seconds": {
            "generate": step.generate_s, "score": step.score_s, "waits_for_scores": step.waits_for_scores_s,
            "train": step.train_s, "push": step.push_s, "step": step.step_s,
        },
        "flops": {"score": step.score_flops, "train": step.train_flops},
        "bytes": {"scores": step.score_payload, "push": step.push_bytes},
        "busy": {pool.name: {"gpus": pool.gpus, "share": step.busy(pool)} for pool in step.pools},
        "changes": [] if plan.fits else [
            {"flags": c.flags, "saves": c.saves, "fits": c.fits} for c in changes(s)
        ],
        "fits_with": [] if plan.fits else what_fits(s),
        "remarks": remarks(s, step),
    }  # fmt: skip
