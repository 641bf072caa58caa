"""A checked configuration with the machines that it is planned for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_tropd.checkpoints.directory import hf_directory
from megatron_tropd.cli import ConfigError, to_flags
from megatron_tropd.config import TrainConfig
from megatron_tropd.hub import MODEL_CONFIG_FILES, is_hub_name, resolve
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.hf_config import load_architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.setup.checks import check_lengths, check_method
from megatron_tropd.setup.engine_checks import check_engine_flags
from megatron_tropd.setup.model_specs import Models, ModelSpec, TeacherSpec
from megatron_tropd.setup.objective import objective_of
from megatron_tropd.setup.problems import Problems
from megatron_tropd.setup.ranges import check_ranges
from megatron_tropd.training.student import training_errors
from megatron_tropd.types import Needs
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout
from tools.model_sizes import NAMES, find_architecture
from tools.planning.activations import PassShape
from tools.planning.hardware import Efficiency, Gpu
from tools.planning.lengths import Lengths

Placement = Literal["colocated", "dedicated", "server", "file"]
PLACEMENTS: tuple[Placement, ...] = ("colocated", "dedicated", "server", "file")
_SGLANG_FRACTION = 0.5
"""``--mem-fraction-static`` of servers that the trainer starts on GPUs (sglang/server/command.py)."""
_ALONE_FRACTION = 0.85
"""Assumed of servers that have their GPUs to themselves."""
_CHUNK_ON_GPU = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What the run is to run on, and what is not in its configuration."""

    num_gpus: int
    """Ranks that torchrun starts: the student's, and those of a dedicated teacher."""
    gpus_per_node: int
    gpu: Gpu
    efficiency: Efficiency = field(default_factory=Efficiency)
    reserve: float = 6e9
    """Bytes of every GPU that are not counted: CUDA context, NCCL's and cuBLAS's buffers, gaps of the allocator."""
    mean_prompt_length: float | None = None
    """None: an eighth of the longest."""
    mean_response_length: float | None = None
    """None: half of the longest."""
    teacher_placement: Placement = "colocated"
    teacher_world_size: int = 0
    """Ranks of a dedicated teacher; GPUs of a teacher behind servers."""
    rollout_lag: int = 0

    def problems(self) -> list[str]:
        """Return what is wrong with the numbers."""
        flags = {"--num-gpus": self.num_gpus, "--gpus-per-node": self.gpus_per_node}
        found = [f"{flag} {value} must be at least 1" for flag, value in flags.items() if value < 1]
        if self.rollout_lag not in (0, 1):
            found.append(f"--rollout-lag {self.rollout_lag} must be 0 or 1")
        if self.teacher_placement == "dedicated" and self.teacher_world_size < 1:
            found.append("--teacher-placement dedicated needs --teacher-world-size N, the ranks of the teacher")
        if self.teacher_placement not in ("dedicated", "server") and self.teacher_world_size:
            found.append(
                f"--teacher-world-size {self.teacher_world_size} has no meaning with --teacher-placement "
                f"{self.teacher_placement}; choose dedicated"
            )
        if self.teacher_placement == "dedicated" and self.teacher_world_size >= self.num_gpus >= 1:
            found.append(
                f"--teacher-world-size {self.teacher_world_size} leaves no rank of --num-gpus {self.num_gpus} to the "
                "student"
            )
        if not 0 <= self.reserve < self.gpu.memory:
            found.append(
                f"--memory-reserve-gb {self.reserve / 1e9:g} must be from 0 to the GPU's {self.gpu.memory / 1e9:g}"
            )
        for name in ("score", "train", "decode_bandwidth", "link"):
            if not 0 < (value := getattr(self.efficiency, name)) <= 1:
                found.append(f"--{name.replace('_', '-')}-efficiency {value:g} must be above 0 and at most 1")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """The engines that write."""

    number: int
    layout: EngineLayout
    """Cut of an SGLang server; one whole model for an embedded engine."""
    shared_ranks: int
    """Trainer ranks, from 0 on, whose GPUs the engines share; 0: engines have GPUs of their own."""
    fraction: float
    """Share of a GPU's memory that a server takes for weights and KV cache; 0 for embedded engines."""

    @property
    def own_gpus(self) -> int:
        """GPUs that only the engines use."""
        return 0 if self.shared_ranks else self.number * self.layout.tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything that a plan is computed from."""

    config: TrainConfig
    machines: Machines
    needs: Needs
    guided: bool
    lengths: Lengths
    student: Architecture
    student_layout: ParallelLayout
    teacher: Architecture | None
    teacher_layout: ParallelLayout | None
    """None also where the teacher is behind servers or its scores come from files."""
    teacher_engine: EngineLayout | None
    """Cut of each of the teacher's servers."""
    reference: Architecture | None
    reference_layout: ParallelLayout | None
    engines: Engines | None
    """None for supervised finetuning, which writes nothing."""
    warnings: tuple[str, ...] = ()

    @property
    def bf16(self) -> bool:
        """Whether the models are in bf16."""
        return self.config.model.bf16

    @property
    def itemsize(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.bf16 else 4

    @property
    def chunk(self) -> int:
        """Tokens whose logits exist at one time, on a GPU."""
        return self.config.training.logits_chunk_tokens or _CHUNK_ON_GPU

    @property
    def sequences(self) -> int:
        """Rollouts of a step."""
        return self.config.rollout.rollout_batch_size * (
            self.config.rollout.n_samples_per_prompt if self.needs.rollouts else 1
        )

    @property
    def student_ranks(self) -> int:
        """Ranks that train."""
        return self.student_layout.world_size

    @property
    def total_gpus(self) -> int:
        """All GPUs, those of servers included."""
        servers = self.machines.teacher_world_size if self.teacher_engine else 0
        return self.machines.num_gpus + servers + (self.engines.own_gpus if self.engines else 0)

    @property
    def microbatches(self) -> int:
        """Micro-batches of a replica in an update, about."""
        tokens = self.sequences * self.lengths.mean / self.config.training.num_minibatches / self.student_layout.dp
        return max(1, -(-int(tokens) // self.config.training.max_tokens_per_microbatch))

    @property
    def student_tokens(self) -> int:
        """Tokens of a micro-batch that a rank of the student holds: context parallelism cuts them."""
        return -(-self.config.training.max_tokens_per_microbatch // self.student_layout.cp)

    @property
    def student_shape(self) -> PassShape:
        """How the student's pass over a micro-batch is computed."""
        split = self.config.parallel.sequence_parallel and self.student_layout.tp > 1
        return self._shape(self.student_tokens, sequence_parallel=split)

    @property
    def frozen_shape(self) -> PassShape:
        """How a frozen model's pass over a micro-batch is computed."""
        return self._shape(self.config.training.max_tokens_per_microbatch, sequence_parallel=False)

    def _shape(self, tokens: int, *, sequence_parallel: bool) -> PassShape:
        return PassShape(
            tokens=tokens, itemsize=self.itemsize, fused=self.bf16, sequence_parallel=sequence_parallel
        )  # fmt: skip


def find_model(name: str, flag: str, megatron: str = "") -> Architecture:
    """Return the architecture of a model: a directory with a ``config.json``, a size of tools/model_sizes.py (also as
    the last part of its name on the Hub), another name on the Hub, of which no weights are fetched, or else that of the
    Megatron checkpoint ``megatron``.

    Raises:
        ValueError: it is none of these, or not supported; the message names the flag.
    """
    if megatron and not name:
        return load_architecture(hf_directory(megatron))
    if not name:
        raise ValueError(f"{flag} is missing: give a directory with a config.json or one of {', '.join(NAMES)}")
    if Path(name).exists():
        return load_architecture(Path(name).parent if Path(name).name == "config.json" else Path(name))
    short = name.rpartition("/")[2].partition("@")[0].lower()
    if short in NAMES:
        return find_architecture(short)
    if "/" in name and is_hub_name(name):
        found = resolve(name, repo_type="model", allow_patterns=MODEL_CONFIG_FILES, flag=flag)
        return load_architecture(found.path)
    raise ValueError(f"{flag} {name} is no directory with a config.json and none of {', '.join(NAMES)}")


def make_scenario(config: TrainConfig, machines: Machines) -> Scenario:
    """Check everything together and return the scenario.

    Raises:
        ConfigError: something cannot be used; one message lists everything that was found.
    """
    problems = Problems()
    problems.errors.extend(machines.problems())
    problems.require(not config.teachers, "--teacher-config: a plan is of one teacher; plan with the flags of each")
    check_ranges(config, problems)
    check_engine_flags(config, problems)
    objective = problems.attempt(lambda: objective_of(config))
    if objective:
        check_method(config, objective, problems)
    needs = objective.needs if objective else Needs()
    model, frozen, reference = config.model, config.teacher, config.reference
    student = problems.attempt(lambda: find_model(model.hf_checkpoint, "--hf-checkpoint", model.pretrained_checkpoint))
    teacher = other = None
    if needs.teacher:
        teacher = problems.attempt(
            lambda: find_model(frozen.teacher_hf_checkpoint, "--teacher-hf-checkpoint", frozen.teacher_load)
        )
    if needs.reference_logprob and (reference.reference_hf_checkpoint or reference.reference_load):
        other = problems.attempt(
            lambda: find_model(reference.reference_hf_checkpoint, "--reference-hf-checkpoint", reference.reference_load)
        )
    data = config.data
    lengths = problems.attempt(
        lambda: Lengths(
            mean_prompt=_given(machines.mean_prompt_length, data.max_prompt_length / 8),
            mean_response=_given(machines.mean_response_length, data.max_response_length / 2),
            max_prompt=data.max_prompt_length, max_response=data.max_response_length,
        )
    )  # fmt: skip
    problems.stop_if_any()
    assert student and objective and lengths
    made = _Layouts.make(config, machines, student, teacher, other, problems)
    engines = _engines(config, machines, student, problems) if needs.rollouts else None
    problems.stop_if_any()
    assert made.student
    scenario = Scenario(
        config=config, machines=machines, needs=needs, guided=config.guidance.mode != "none", lengths=lengths,
        student=student, student_layout=made.student, teacher=teacher, teacher_layout=made.teacher,
        teacher_engine=made.teacher_engine, engines=engines,
        reference=(other or student) if needs.reference_logprob else None,
        reference_layout=(made.reference or made.student.frozen) if needs.reference_logprob else None,
        warnings=tuple(problems.warnings),
    )  # fmt: skip
    check_lengths(config, _as_models(scenario), objective, problems)
    problems.stop_if_any()
    return scenario


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layouts:
    """The layouts of all models; None where there is none, or where it has errors."""

    student: ParallelLayout | None
    teacher: ParallelLayout | None
    teacher_engine: EngineLayout | None
    reference: ParallelLayout | None

    @classmethod
    def make(
        cls, config: TrainConfig, machines: Machines, student: Architecture, teacher: Architecture | None,
        reference: Architecture | None, problems: Problems,
    ) -> _Layouts:  # fmt: skip
        """Return the layouts; what does not fit goes to ``problems``."""
        dedicated = machines.teacher_world_size if machines.teacher_placement == "dedicated" else 0
        ranks = machines.num_gpus - dedicated
        given = config.parallel.student_world_size
        problems.require(
            given in (0, ranks),
            f"--student-world-size {given}: --num-gpus {machines.num_gpus} leaves the student {ranks}; change one",
        )
        own = problems.attempt(lambda: _layout(config, student, ranks, ""))
        if own:
            sequence_parallel = config.parallel.sequence_parallel
            problems.errors.extend(
                f"student: {error}" for error in training_errors(student, own, sequence_parallel=sequence_parallel)
            )
        theirs = engine = None
        if teacher and machines.teacher_placement in ("colocated", "dedicated"):
            world = dedicated or ranks
            theirs = problems.attempt(lambda: _layout(config, teacher, world, "teacher-"))
        elif teacher and machines.teacher_placement == "server":
            engine = problems.attempt(lambda: _teacher_engine(config, teacher))
        third = problems.attempt(lambda: _layout(config, reference, ranks, "teacher-")) if reference else None
        return cls(student=own, teacher=theirs, teacher_engine=engine, reference=third)


def _layout(config: TrainConfig, arch: Architecture, world: int, owner: Literal["", "teacher-"]) -> ParallelLayout:
    flags: dict[str, Any] = to_flags(config)
    sizes = {axis: flags[f"{owner}{axis}-parallel-size"] for axis in ("tensor-model", "pipeline-model", "expert-model")}
    tp, pp, ep = sizes.values()
    chunks = 1 if owner else config.parallel.num_virtual_stages_per_pipeline_rank
    optional = {
        "etp": flags[f"{owner}expert-tensor-parallel-size"] or None, "vpp": chunks if chunks > 1 else None,
        "first_layers": flags[f"{owner}decoder-first-pipeline-num-layers"] or None,
        "last_layers": flags[f"{owner}decoder-last-pipeline-num-layers"] or None,
    }  # fmt: skip
    layout = ParallelLayout.for_world(
        world, tp, pp, cp=1 if owner else config.parallel.context_parallel_size, ep=ep, owner=owner,
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by, **optional,
    )  # fmt: skip
    if errors := arch.check_layout(tp, pp, ep=ep, **optional, owner=owner):
        raise ConfigError([f"{'teacher' if owner else 'student'}: {error}" for error in errors])
    return layout


def _teacher_engine(config: TrainConfig, teacher: Architecture) -> EngineLayout:
    """Return the cut of a server that scores, by --teacher-sglang-tp-size and --teacher-sglang-ep-size.

    Raises:
        ConfigError: SGLang cannot cut the model this way.
    """
    words = config.teacher_sglang_flags.get("ep-size", ("1",))
    if not words or not words[0].isdecimal():
        raise ConfigError([f"--teacher-sglang-ep-size {' '.join(words)} is not a number"])
    layout = EngineLayout(tp=config.teacher.teacher_sglang_tp_size, ep=int(words[0]))
    errors = [error.replace("--sglang-", "--teacher-sglang-") for error in layout.cut_errors(teacher)]
    if errors:
        raise ConfigError(errors)
    return layout


def _engines(config: TrainConfig, machines: Machines, student: Architecture, problems: Problems) -> Engines | None:
    engine = config.engine
    dedicated = machines.teacher_world_size if machines.teacher_placement == "dedicated" else 0
    ranks = machines.num_gpus - dedicated
    if engine.rollout_engine == "embedded":
        return Engines(number=ranks, layout=EngineLayout(), shared_ranks=ranks, fraction=0.0)
    layout = EngineLayout(tp=engine.sglang_tp_size, ep=_flag_number(config, "ep-size", 1, problems))
    nodes = -(-machines.num_gpus // machines.gpus_per_node)
    on_nodes = nodes * engine.rollout_num_engines_per_node
    number = len(engine.rollout_engine_urls) or on_nodes or engine.rollout_num_engines
    problems.errors.extend(layout.cut_errors(student))
    ids = engine.rollout_gpu_ids
    if wrong := [gpu for gpu in ids if not gpu.isdecimal()]:
        problems.errors.append(f"--rollout-gpu-ids {' '.join(wrong)}: expected numbers of GPUs, such as 4 5 6 7")
        return None
    first = min(map(int, ids), default=0)
    alone = bool(engine.rollout_engine_urls or engine.rollout_num_gpus_per_node)
    shared = not alone and first < min(ranks, machines.gpus_per_node)
    problems.require(
        not shared or first + number * layout.tp <= ranks,
        f"--rollout-num-engines {number} x --sglang-tp-size {layout.tp} = {number * layout.tp} GPUs, from GPU {first} "
        f"on, do not fit the {ranks} GPUs of the student that they share; lower them, or give "
        "--rollout-num-gpus-per-node or --rollout-engine-urls",
    )
    fraction = _flag_number(config, "mem-fraction-static", _SGLANG_FRACTION if shared else _ALONE_FRACTION, problems)
    problems.require(
        0 < fraction < 1, f"--sglang-mem-fraction-static {fraction:g} must be above 0 and below 1"
    )  # fmt: skip
    return Engines(number=number, layout=layout, shared_ranks=number * layout.tp if shared else 0, fraction=fraction)


def _flag_number(config: TrainConfig, name: str, default: Any, problems: Problems) -> Any:
    """Return the number after a flag of SGLang; the flag's default where it is not given."""
    if not (words := config.sglang_flags.get(name)):
        return default
    try:
        return type(default)(words[0])
    except ValueError:
        problems.errors.append(f"--sglang-{name} {words[0]} is not a number")
        return default


def _as_models(scenario: Scenario) -> Models:
    """Return the models as the checks of a run take them; nothing here has a directory."""

    def spec(arch: Architecture) -> ModelSpec:
        return ModelSpec(hf_dir=Path(), megatron_dir=None, arch=arch, hf_name="", source="")

    teachers = []
    if scenario.teacher:  # on servers it has no layout, and the checks ask for none
        layout = scenario.teacher_layout or ParallelLayout()
        model = spec(scenario.teacher)
        teachers.append(TeacherSpec(role="teacher", config=scenario.config, model=model, layout=layout))
    return Models(
        student=spec(scenario.student), student_layout=scenario.student_layout, teachers=tuple(teachers),
        reference=spec(scenario.reference) if scenario.reference else None, reference_layout=scenario.reference_layout,
    )  # fmt: skip
