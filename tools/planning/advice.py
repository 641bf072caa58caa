"""What does not fit, what cannot be, and which flags change that.

A change is judged by planning the changed run: the bytes that it saves are those of the plan, not an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_tropd.cli import ConfigError
from megatron_tropd.config import TrainConfig
from tools.planning.activations import repeated
from tools.planning.memory import embedded_batch, kv_room, over, plan_memory
from tools.planning.scenario import Machines, Scenario, make_scenario
from tools.planning.seconds import StepPlan

_WORTH = 0.5e9
"""Bytes that a change must save to be named."""
_MOST_CHANGES = 5
_IDLE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A flag and what it does to the fullest GPU."""

    flags: str
    saves: float
    """Bytes."""
    fits: bool
    """Whether everything fits after it."""
    scenario: Scenario


def _sections(config: TrainConfig, section: str, **values: Any) -> TrainConfig:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def _candidates(scenario: Scenario) -> Iterator[tuple[str, TrainConfig, Machines]]:
    """Yield (flags, configuration, machines) of runs that need less memory."""
    config, machines = scenario.config, scenario.machines
    training, parallel, teacher = config.training, config.parallel, config.teacher

    def flag(name: str, value: Any, section: str, **values: Any) -> tuple[str, TrainConfig, Machines]:
        text = f"--{name}" if value is True else f"--{name} {value}"
        return text, _sections(config, section, **values), machines

    if not parallel.use_distributed_optimizer:
        yield flag("use-distributed-optimizer", True, "parallel", use_distributed_optimizer=True)
    if config.model.recompute_granularity != "full":
        yield flag("recompute-granularity", "full", "model", recompute_granularity="full")
    if scenario.student_layout.tp > 1 and not parallel.sequence_parallel:
        yield flag("sequence-parallel", True, "parallel", sequence_parallel=True)
    if training.max_tokens_per_microbatch > (tokens := scenario.lengths.longest + (not scenario.needs.rollouts)):
        yield flag("max-tokens-per-microbatch", tokens, "training", max_tokens_per_microbatch=tokens)
    if (chunk := scenario.chunk // 4) >= 1024:
        yield flag("logits-chunk-tokens", chunk, "training", logits_chunk_tokens=chunk)
    for axis in ("tensor", "pipeline"):
        name = f"{axis}_model_parallel_size"
        size = 2 * getattr(parallel, name)
        yield flag(name.replace("_", "-"), size, "parallel", **{name: size})
        size = 2 * getattr(teacher, f"teacher_{name}")
        yield flag(f"teacher-{name.replace('_', '-')}", size, "teacher", **{f"teacher_{name}": size})
    if scenario.teacher and scenario.teacher.num_experts:
        size = 2 * teacher.teacher_expert_model_parallel_size
        yield flag(
            "teacher-expert-model-parallel-size", size, "teacher", teacher_expert_model_parallel_size=size
        )  # fmt: skip
    if machines.teacher_placement == "colocated" and not teacher.teacher_offload and scenario.teacher:
        yield flag("teacher-offload", True, "teacher", teacher_offload=True)
    yield from _engine_candidates(scenario, flag)


def _engine_candidates(scenario: Scenario, flag: Callable[..., tuple[str, TrainConfig, Machines]]) -> Iterator[Any]:
    engines, config = scenario.engines, scenario.config
    if engines is None:
        return
    if not engines.fraction:
        if (size := embedded_batch(scenario) // 4) >= 1:
            yield flag("rollout-max-batch-size", size, "rollout", rollout_max_batch_size=size)
        number = scenario.student_ranks
        engine = replace(config.engine, rollout_engine="sglang", rollout_num_engines=number)
        flags = {**config.sglang_flags, "mem-fraction-static": ("0.3",)}
        text = f"--rollout-engine sglang --rollout-num-engines {number} --sglang-mem-fraction-static 0.3"
        yield text, replace(config, engine=engine, sglang_flags=flags), scenario.machines
    elif engines.shared_ranks and engines.fraction > 0.15:
        fraction = round(engines.fraction - 0.1, 2)
        flags = {**config.sglang_flags, "mem-fraction-static": (str(fraction),)}
        text = f"--sglang-mem-fraction-static {fraction}"
        yield text, replace(config, sglang_flags=flags), scenario.machines


def changes(scenario: Scenario) -> list[Change]:
    """Return the changes of one flag that save memory on the fullest GPU, the best first."""
    before, found = over(plan_memory(scenario)), []
    for flags, config, machines in _candidates(scenario):
        try:
            changed = make_scenario(config, machines)
        except ConfigError:
            continue  # the model or the ranks do not allow it
        if too_little_kv(changed) and not too_little_kv(scenario):
            continue
        after = over(plan_memory(changed))
        if before - after >= _WORTH:
            found.append(Change(flags=flags, saves=before - after, fits=after <= 0, scenario=changed))
    return sorted(found, key=lambda change: (not change.fits, -change.saves))


def what_fits(scenario: Scenario) -> list[str]:
    """Return flags that together make the run fit, found by taking the best one again and again; [] if none were
    found."""
    taken: dict[str, str] = {}
    while len(taken) < _MOST_CHANGES:
        found = changes(scenario)
        if not found:
            return []
        best = found[0]
        taken[best.flags.split()[0]] = best.flags
        if best.fits:
            return list(taken.values())
        scenario = best.scenario
    return []


def too_little_kv(scenario: Scenario) -> bool:
    """Return whether an SGLang server has no room for one longest sequence."""
    return bool(scenario.engines and scenario.engines.fraction and kv_room(scenario) < scenario.lengths.longest)


def remarks(scenario: Scenario, step: StepPlan) -> list[str]:
    """Return what to know about the plan: what is idle, what waits, what was assumed in the place of a flag."""
    found, machines, engines = list(scenario.warnings), scenario.machines, scenario.engines
    if not scenario.bf16:
        found.append("--bf16 is off: products count with the peak of fp32, and weights and activations have 4 bytes")
    if too_little_kv(scenario) and engines:
        found.append(
            f"a server has room for {max(kv_room(scenario), 0):,.0f} tokens, less than one longest sequence of "
            f"{scenario.lengths.longest:,}: raise --sglang-mem-fraction-static or --sglang-tp-size"
        )
    if machines.rollout_lag and not step.overlaps:
        found.append(
            "--rollout-lag 1 saves nothing here: engines and trainer share GPUs, so they take turns; give the engines "
            "GPUs of their own with --rollout-engine-urls"
        )
    if step.generation and step.generation.batch < step.generation.sequences:
        flag = "--sglang-mem-fraction-static" if engines and engines.fraction else "--rollout-max-batch-size"
        found.append(
            f"an engine has {step.generation.sequences} sequences in a step and writes {step.generation.batch} at one "
            f"time: {flag} or more engines"
        )
    layout = scenario.teacher_layout
    if scenario.teacher and layout and (times := repeated(scenario.teacher, layout)) > 1:
        found.append(
            f"the teacher's tensor-parallel ranks send the same tokens to its experts, {times:.1f} times the FLOPs of "
            "the model: lower --teacher-tensor-model-parallel-size, raise --teacher-expert-model-parallel-size"
        )
    own = machines.teacher_placement in ("dedicated", "server")
    for pool in step.pools:
        if (share := step.busy(pool)) < _IDLE:
            found.append(
                f"{pool.name}: its {pool.gpus} GPUs are idle {1 - share:.0%} of a step: {_idle(pool.name, step)}"
            )
    if own and step.waits_for_scores_s > 0.2 * step.step_s:
        found.append(
            f"the step waits {step.waits_for_scores_s:.0f} s for scores after the last rollout: raise "
            "--teacher-world-size (dedicated) or --teacher-num-servers (server)"
        )
    return found


def _idle(pool: str, step: StepPlan) -> str:
    """Return what would leave a pool less idle."""
    lag = "" if step.overlaps else ", or --rollout-lag 1 with engines that have GPUs of their own"
    hints = {
        "teacher": "lower --teacher-world-size or --teacher-num-servers, or --teacher-placement colocated",
        "engines": f"fewer engines{lag}",
        "trainer": f"fewer ranks and more engines{lag}",
    }
    return hints[pool]
