"""The table of docs/scaling.md: pairs of published models, each in several placements."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tools.planning.report import GB, RunPlan, layout_text

COMMON = (
    "--bf16 --use-distributed-optimizer --sequence-parallel --recompute-granularity full --objective tropd --top-k 64 "
    "--rollout-batch-size 128 --n-samples-per-prompt 4 --max-prompt-length 2048 --mean-prompt-length 256 "
    "--max-response-length 8096 --mean-response-length 3000 --max-tokens-per-microbatch 16384 --rollout-engine sglang "
    "--update-weight-transport planned --gpu h100"
)
"""Flags of every row: those of examples/h100, with a mean length that is an assumption."""
SHORT = {
    "student": "hf-checkpoint", "teacher": "teacher-hf-checkpoint", "gpus": "num-gpus",
    "tp": "tensor-model-parallel-size", "pp": "pipeline-model-parallel-size",
    "ttp": "teacher-tensor-model-parallel-size", "tpp": "teacher-pipeline-model-parallel-size",
    "tep": "teacher-expert-model-parallel-size", "tetp": "teacher-expert-tensor-parallel-size",
    "engines": "rollout-num-engines", "etp": "sglang-tp-size", "fraction": "sglang-mem-fraction-static",
    "place": "teacher-placement", "teacher-gpus": "teacher-world-size", "lag": "rollout-lag",
    "servers": "teacher-num-servers", "servers-tp": "teacher-sglang-tp-size", "servers-ep": "teacher-sglang-ep-size",
}  # fmt: skip
ROWS = (
    "student=qwen3-1.7b teacher=qwen3-4b gpus=8 tp=1 ttp=1 engines=8 fraction=0.3",
    "student=qwen3-1.7b teacher=qwen3-4b gpus=2 tp=1 ttp=1 urls=6 lag=1",
    "student=qwen3-1.7b teacher=qwen3-4b gpus=3 tp=1 ttp=1 place=dedicated teacher-gpus=1 urls=5 lag=1",
    "student=qwen3-1.7b teacher=qwen3-8b gpus=8 tp=2 ttp=4 engines=8 fraction=0.3",
    "student=qwen3-1.7b teacher=qwen3-8b gpus=2 tp=1 ttp=1 urls=6 lag=1",
    "student=qwen3-1.7b teacher=qwen3-8b gpus=3 tp=1 ttp=1 place=dedicated teacher-gpus=1 urls=5 lag=1",
    "student=qwen2.5-7b teacher=qwen2.5-32b gpus=16 tp=4 ttp=8 engines=16 fraction=0.35",
    "student=qwen2.5-7b teacher=qwen2.5-32b gpus=8 tp=4 ttp=4 urls=8 lag=1",
    "student=qwen2.5-7b teacher=qwen2.5-32b gpus=8 tp=4 ttp=2 place=dedicated teacher-gpus=4 urls=8 lag=1",
    "student=qwen3-8b teacher=qwen3-235b-a22b gpus=32 tp=4 ttp=1 tep=32 engines=32 fraction=0.25",
    "student=qwen3-8b teacher=qwen3-235b-a22b gpus=16 tp=4 ttp=2 tep=8 tetp=1 place=dedicated teacher-gpus=8 urls=16 "
    "lag=1",
    "student=qwen3-8b teacher=qwen3-235b-a22b gpus=8 tp=4 place=server servers=1 servers-tp=8 servers-ep=8 urls=16 "
    "lag=1",
)
"""Rows in the short names of :data:`SHORT`; ``urls=N`` are N servers on GPUs of their own."""
COLUMNS = (
    "student <- teacher", "GPUs: student + teacher + engines", "student", "teacher", "lag", "fullest GPU, GB",
    "generate", "score", "train", "push", "step, s", "busy: trainer, teacher, engines", "tokens/s a GPU",
)  # fmt: skip


def words_of(row: str) -> list[str]:
    """Return the command line of a row."""
    words = COMMON.split()
    for word in row.split():
        name, _, value = word.partition("=")
        if name == "urls":
            words += ["--rollout-engine-urls", *(f"http://engine{number}:30000" for number in range(int(value)))]
        else:
            words += [f"--{SHORT[name]}", value]
    return words


def cells(row: str, plan: RunPlan) -> list[str]:
    """Return the cells of a row."""
    s, step = plan.scenario, plan.step
    settings = dict(word.split("=") for word in row.split())
    fullest = max(plan.memory, key=lambda rank: rank.peak / rank.room)
    pools = {pool.name: pool for pool in step.pools}
    shares = [f"{step.busy(pools[name]):.0%}" if name in pools else "-" for name in ("trainer", "teacher", "engines")]
    own = s.machines.teacher_world_size
    layout = layout_text(s.teacher_layout) if s.teacher_layout else f"servers of {settings['servers-tp']}"
    tokens = s.sequences * s.lengths.mean / step.step_s / s.total_gpus
    return [
        f"{settings['student']} <- {settings['teacher']}",
        f"{s.student_ranks} + {own} + {s.engines.own_gpus if s.engines else 0}",
        layout_text(s.student_layout), f"{s.machines.teacher_placement}, {layout}", str(s.machines.rollout_lag),
        f"{fullest.peak / GB:.1f}" + ("" if plan.fits else " does not fit"),
        *(f"{value:.0f}" for value in (step.generate_s, step.score_s, step.train_s)), f"{step.push_s:.1f}",
        f"{step.step_s:.0f}", ", ".join(shares), f"{tokens:,.0f}",
    ]  # fmt: skip


def lines(plan: Callable[[list[str]], RunPlan]) -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "---|" * len(COLUMNS)
    for row in ROWS:
        yield f"| {' | '.join(cells(row, plan(words_of(row))))} |"


def print_table(plan: Callable[[list[str]], RunPlan]) -> None:
    """Print the table."""
    for line in lines(plan):
        print(line, flush=True)
