"""All settings of a run.  A field is a flag: ``train_iters`` is ``--train-iters`` on the command line and
``train-iters`` in YAML.  Where Megatron has the setting, the name is Megatron's.

``cli.py`` turns these dataclasses into flags; ``setup/run_spec.py`` checks their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_tropd.checkpoint_config import CheckpointConfig
from megatron_tropd.config_fields import BY_ROLE, setting
from megatron_tropd.data.advantages import Baseline
from megatron_tropd.data.guidance import GuidanceConfig
from megatron_tropd.objectives.methods import is_guided
from megatron_tropd.objectives.settings import ObjectiveSettings
from megatron_tropd.teacher_config import NamedTeacher, TeacherConfig
from megatron_tropd.types import GraderKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The student."""

    hf_checkpoint: str = setting("", "HF directory of the student, or its name on the Hub")
    pretrained_checkpoint: str = setting("", "Megatron checkpoint to start from instead of the HF weights")
    make_vocab_size_divisible_by: int = setting(128, "pad the vocabulary to a multiple of lcm(this, TP)")
    bf16: bool = setting(False, "train in bfloat16 with fp32 master weights")
    recompute_granularity: Literal["none", "selective", "full"] = setting("none", "activation recomputation")
    deterministic_mode: bool = setting(
        False, "on a GPU, choose kernels that give the same bits in every run, where there are any; some are slower"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the student is split over ranks; the ranks that are left are data parallel.  Other fields of Megatron's
    TransformerConfig, DistributedDataParallelConfig and OptimizerConfig are flags of the same name."""

    student_world_size: int = setting(
        0, "ranks of the student, to be compared with torchrun's; 0: all that no dedicated teacher has", group=BY_ROLE
    )
    tensor_model_parallel_size: int = setting(1, "tensor-parallel ranks of the student")
    pipeline_model_parallel_size: int = setting(1, "pipeline stages of the student")
    num_virtual_stages_per_pipeline_rank: int = setting(
        1, "model chunks of each of the student's pipeline stages; above 1, Megatron's interleaved schedule"
    )
    decoder_first_pipeline_num_layers: int = setting(0, "layers of the student's first stage; 0 for an even split")
    decoder_last_pipeline_num_layers: int = setting(0, "layers of the student's last stage; 0 for an even split")
    expert_model_parallel_size: int = setting(1, "ranks over which the student's experts are spread")
    expert_tensor_parallel_size: int = setting(
        0, "ranks that share one expert of the student; 0 for --tensor-model-parallel-size"
    )
    context_parallel_size: int = setting(1, "ranks over which the tokens of every sequence of the student are split")
    sequence_parallel: bool = setting(False, "split norms and dropout over the tensor-parallel ranks")
    use_distributed_optimizer: bool = setting(False, "split the optimizer state over the data-parallel ranks")
    rl_offload_optimizer_during_inference: bool = setting(
        False, "while rollouts are written and scored, keep optimizer state in host memory and free gradient buffers"
    )
    distributed_timeout_minutes: float = setting(10.0, "a collective that takes longer ends the job")
    rank_heartbeat_timeout: float = setting(
        180.0, "seconds without a sign of life of a rank after which the job ends, with all stacks; 0: never"
    )
    hang_timeout_minutes: float = setting(
        60.0, "minutes in which no rank gets on, though all live, after which the job ends, with all stacks; 0: never"
    )

    @property
    def distributed_timeout_s(self) -> float:
        """Timeout of a collective in seconds."""
        return self.distributed_timeout_minutes * 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceConfig:
    """A second frozen model, for the objectives that need one; by default the student's starting weights."""

    reference_hf_checkpoint: str = setting(
        "", "HF directory of the reference, or its name on the Hub; it is cut as the teacher is"
    )
    reference_load: str = setting("", "Megatron checkpoint of the reference instead of the HF weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """Rewards, for the objectives that learn from them."""

    reward_function: str = setting("", "package.module:function, such as megatron_tropd.grading.rewards:exact_match")
    advantage_baseline: Baseline = setting(
        "group-mean", "what is taken off a reward: the mean of its group, or of the others"
    )
    advantage_std: bool = setting(True, "divide advantages by the standard deviation of their group")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Prompts to train on."""

    prompt_data: list[str] = setting(
        [], "JSONL, JSON or Parquet files, directories of them, or data sets; docs/data.md"
    )
    prompt_key: str = setting("prompt", "column of the prompt; this and the other keys may be nested, as in a.b")
    response_key: str = setting(
        "response", "column of the teacher's response; read by --guidance and by supervised finetuning only"
    )
    answer_key: str = setting("answer", "column of the reference answer; optional")
    grader_key: str = setting("grader", "column that names the grader of the row, one of --grader; optional")
    domain_key: str = setting("domain", "column of the domain; optional")
    uid_key: str = setting("uid", "column of an integer or a text that names the row; optional")
    tools_key: str = setting("tools", "column of tool descriptions for the chat template; optional")
    apply_chat_template: bool = setting(False, "render prompts with the tokenizer's chat template")
    on_bad_row: Literal["error", "skip"] = setting("error", "what to do with a row that cannot be used")
    max_prompt_length: int = setting(2048, "longest prompt, in tokens")
    max_response_length: int = setting(8096, "longest response, teacher prefix included, in tokens")
    on_long_response: Literal["cut", "skip", "error"] = setting(
        "cut", "of a teacher's response that is longer, use the first tokens, leave the row out, or end the run"
    )
    min_response_share: float = setting(
        0.5, "with --guidance, share of the prompts that must have a response of the teacher; fewer end the run"
    )
    data_cache_path: str = setting(
        "", "where tokenized data is kept, for all ranks; default $XDG_CACHE_HOME/megatron_tropd/tokens"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How many rollouts the student writes in a step."""

    rollout_batch_size: int = setting(128, "prompts per step")
    n_samples_per_prompt: int = setting(4, "responses per prompt")
    rollout_lag: int = setting(
        0, "1: the engines write the next batch while this one trains, so it is from weights one step older"
    )
    keep_unfinished_rollouts: bool = setting(
        True,
        "write rollouts to RUN_DIR/unfinished as they finish, and their scores; a launch with the same weights goes on "
        "from them",
    )
    rollout_max_batch_size: int = setting(
        256, "sequences the embedded engine writes at one time; lower it when a GPU runs out of memory"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The engines that write the rollouts.  Any other --sglang-X is passed to the SGLang servers as --X."""

    rollout_engine: Literal["embedded", "sglang"] = setting(
        "embedded", "embedded: transformers inside every rank; sglang: SGLang servers"
    )
    rollout_num_engines: int = setting(1, "SGLang servers to start on the machine of rank 0", group=BY_ROLE)
    rollout_num_engines_per_node: int = setting(
        0, "SGLang servers to start on every machine of the job instead", group=BY_ROLE
    )
    rollout_num_gpus_per_node: int = setting(
        0,
        "GPUs of every machine that only these servers use, its last ones; 0: they share the ranks'",
        group=BY_ROLE,
    )
    rollout_release_memory: bool = setting(
        False, "SGLang servers free their GPU memory while the trainer scores and trains"
    )
    rollout_gpu_ids: list[str] = setting(
        [],
        "GPUs of these servers, in order; default: the last ones with --rollout-num-gpus-per-node, else from 0 on",
        group=BY_ROLE,
    )
    rollout_engine_urls: list[str] = setting([], "SGLang servers that run already, instead of starting some")
    rollout_router_url: str = setting("", "sglang-router before the servers of --rollout-engine-urls, for prompts")
    update_weight_transport: Literal["auto", "shared", "bytes", "planned", "planned-shared"] = setting(
        "auto",
        "how weights reach SGLang: whole tensors in shared memory of one host or as bytes over HTTP (auto: shared with "
        "own servers), or planned: every rank's own rows straight to the engine ranks that hold them, by messages or "
        "(planned-shared) in memory they share where they can",
    )
    update_weight_buffer_size: int = setting(512 << 20, "bytes of weights in one message")
    sglang_python: str = setting("", "interpreter of SGLang's environment; default: this one")
    sglang_host: str = setting("127.0.0.1", "address of the servers; any but a loopback one needs keys")
    sglang_key_file: str = setting("", "YAML with api-key and admin-api-key, instead of the environment")
    sglang_tp_size: int = setting(1, "tensor-parallel ranks of each server")
    sglang_start_timeout: float = setting(240.0, "seconds until a started server must answer")
    sglang_request_timeout: float = setting(
        300.0,
        "seconds of silence (no progress of a server that writes or scores) after which it counts as down; also the "
        "deadline of one control call and of one message of weights",
    )
    parity_limit: float = setting(
        0.0,
        "mean |log p| difference that is an alarm, in nats: of engine and trainer, and of a teacher and what is known "
        "of it; 0: 1e-3 in fp32, 0.1 in bf16",
    )
    on_parity: Literal["stop", "warn"] = setting("stop", "what an alarm does")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """The loss, and the teacher prefixes that the student continues."""

    objective: str = setting("tropd", "a method of docs/objectives.md; it sets what `auto` means below")
    guidance: Literal["auto", "none", "ratio", "cap", "uniform"] = setting(
        "auto", "how long a teacher prefix is; auto: ratio for the methods the paper guides, none for the others"
    )
    guidance_schedule: Literal["half-cosine", "quarter-cosine", "linear"] = setting(
        "half-cosine", "how the prefix is shortened to nothing"
    )
    guidance_steps: int = setting(0, "steps until the prefix is gone; 0 for --train-iters")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Optimizer and length of the run; defaults are the paper's."""

    train_iters: int = setting(200, "steps: rollout batches to train on")
    num_minibatches: int = setting(1, "optimizer updates per rollout batch; its prompts are split evenly")
    max_tokens_per_microbatch: int = setting(16384, "packed tokens per forward pass, of all context-parallel ranks")
    logits_chunk_tokens: int = setting(0, "tokens whose logits exist at one time; 0 for 8192 on a GPU, 1024 on a CPU")
    head_mode: Literal["one-pass", "recompute", "single-chunk"] = setting(
        "one-pass", "how the loss over the vocabulary is computed; the result is the same"
    )
    logits_dtype: Literal["model", "fp32"] = setting("model", "dtype of the student's logits")
    lr: float = setting(5e-6, "learning rate")
    min_lr: float = setting(0.0, "learning rate at the end of a decay")
    lr_decay_style: Literal["constant", "linear", "cosine"] = setting("constant", "learning-rate schedule")
    lr_warmup_iters: int = setting(0, "updates of linear warm-up; as in Megatron the first one has rate 0")
    weight_decay: float = setting(0.1, "decoupled weight decay")
    adam_beta1: float = setting(0.9, "first moment")
    adam_beta2: float = setting(0.999, "second moment")
    adam_eps: float = setting(1e-8, "denominator")
    clip_grad: float = setting(1.0, "global gradient norm; 0 for none")
    seed: int = setting(1234, "of every random number of the run")
    on_nonfinite: Literal["stop", "skip"] = setting("stop", "a NaN or Inf ends the run (exit 17) or skips the step")
    on_spike: Literal["stop", "warn", "skip"] = setting(
        "stop", "a number above a --spike limit ends the run (exit 18), is a warning, or skips the update"
    )
    rerun_on_nonfinite: bool = setting(
        True, "compute an update again before --on-nonfinite or --on-spike stops or skips it: if its numbers are good "
        "then, the error was transient, and the run goes on",
    )  # fmt: skip
    spike_limit: float = setting(
        200.0, "nats per token: limit of the loss and of the models' mean log-probabilities, as absolute values"
    )
    spike_grad_norm: float = setting(1e6, "limit of the gradient norm before clipping")
    spike_reward: float = setting(1e6, "limit of the absolute value of a reward")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Accuracy on held-out prompts, and how any response is graded."""

    eval_data: list[str] = setting([], "data with answers, in the forms of --prompt-data")
    eval_interval: int = setting(0, "steps between evaluations during the run; 0 for only before and after")
    eval_prompts: int = setting(0, "prompts of an evaluation during the run; 0 for all")
    eval_num_samples: int = setting(1, "responses per prompt where tokens are drawn; their accuracy is averaged")
    answer_pattern: str = setting(
        "", "regular expression; group 1 of its last match in a response is the answer; default: the last \\boxed{...}"
    )
    grader: GraderKind = setting(
        "math",
        "how rows are graded that name no grader: as text, as mathematics too (1/2 = 0.5), by the chosen letter, by "
        "constraints, or by tests of a program",
    )
    lenient_grading: bool = setting(
        False,
        "a choice may be the last capital letter that stands alone; constraints are followed loosely, as IFEval says",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """What a run writes besides checkpoints."""

    run_dir: str = setting("", "where everything is written")
    log_interval: int = setting(1, "steps between log lines")
    heartbeat_interval: float = setting(
        60.0,
        "seconds between two writings of RUN_DIR/heartbeat.json, and log lines of a phase that lasts longer; 0: none",
    )
    log_topk_share: float = setting(
        0.1, "share of the samples whose top-k is sent whole, for metrics of it, where others' tokens need not have one"
    )
    log_topk_overlap: bool = setting(False, "log the share of the teacher's top-k in the student's (one more gather)")
    gradient_diagnostics_interval: int = setting(
        0, "steps between measurements of every region's gradient (five more passes each); 0 for none"
    )
    rollout_log_interval: int = setting(20, "steps between saved samples of rollouts; 0 for none")
    tensorboard_dir: str = setting("", "also log to tensorboard")
    wandb_project: str = setting("", "also log to Weights & Biases")
    wandb_exp_name: str = setting("", "name of the W&B run")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All settings of one run, by section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    method: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    reward: RewardConfig = field(default_factory=RewardConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    sglang_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Flags for ``sglang.launch_server``: name without its dashes -> the words after it."""
    megatron_flags: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """The student's settings of Megatron's own (parallel/megatron_flags.py): name without its dashes -> value."""
    teacher_sglang_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The same for the teacher's servers."""
    teachers: tuple[NamedTeacher, ...] = ()
    """What the files of --teacher-config say; () without them."""

    @property
    def by_teacher(self) -> dict[str, TrainConfig]:
        """By the teacher's role (``teacher``, or ``teacher-NAME`` for one of several): this configuration with its
        settings in the place of the run's own --teacher flags."""
        if not self.teachers:
            return {"teacher": self}
        return {
            one.role: replace(self, teacher=one.settings, teacher_sglang_flags=one.sglang_flags, teachers=())
            for one in self.teachers
        }

    def file_of(self, role: str) -> str:
        """How messages name the file that describes the teacher of ``role``; "" for the run's own flags."""
        return next((f"--teacher-config {one.file}" for one in self.teachers if role == one.role), "")

    @property
    def parity_limit(self) -> float:
        """Value of --parity-limit in nats, with its default resolved."""
        return self.engine.parity_limit or (0.1 if self.model.bf16 else 1e-3)

    @property
    def guidance(self) -> GuidanceConfig:
        """Settings of the teacher prefix."""
        mode = self.objective.guidance
        if mode == "auto":
            mode = "ratio" if is_guided(self.objective.objective) else "none"
        return GuidanceConfig(
            mode=mode,
            schedule=self.objective.guidance_schedule,
            steps=self.objective.guidance_steps or self.training.train_iters,
            beta=self.method.guidance_beta,
        )

    @property
    def objective_settings(self) -> ObjectiveSettings:
        """Settings of the objective, including those that other sections determine."""
        margin = self.teacher.teacher_topk_margin
        return replace(
            self.method,
            guidance_beta=self.method.guidance_beta if self.guidance.mode != "none" else 0.0,
            num_minibatches=self.training.num_minibatches,
            rollout_lag=self.rollout.rollout_lag,
            topk_margin=5 * self.parity_limit if margin < 0 else margin,
            topk_share=self.logging.log_topk_share,
        )

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.training.train_iters * self.training.num_minibatches

    @property
    def save_dir(self) -> str:
        """Where checkpoints go."""
        return self.checkpoint.save or f"{self.logging.run_dir}/checkpoints"

    @property
    def load_dir(self) -> str:
        """Where a run resumes from."""
        return self.checkpoint.load or self.save_dir
