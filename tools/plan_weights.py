"""Plan and prove a weight update without starting anything: bytes, balance, locality, and the proof.

    python tools/plan_weights.py --model qwen3-32b --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 \
        --num-engines 4 --sglang-tp-size 8
    python tools/plan_weights.py --table        # the table of docs/weights.md

``--model`` is a known size or a Hugging Face directory (only its ``config.json`` is read).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from megatron_tropd.models.architecture import Architecture  # noqa: E402
from megatron_tropd.parallel.layout import ParallelLayout  # noqa: E402
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout  # noqa: E402
from megatron_tropd.weights.plan.planner import build_plan  # noqa: E402
from megatron_tropd.weights.plan.proof import PlanProof, prove  # noqa: E402
from megatron_tropd.weights.plan.statistics import PlanStats, consecutive_placements, plan_stats  # noqa: E402
from megatron_tropd.weights.plan.types import WeightPlan  # noqa: E402
from tools.model_sizes import NAMES, find_architecture  # noqa: E402

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TABLE = (
    "model=qwen3-1.7b world=8 engines=8",
    "model=qwen3-1.7b world=4 tp=2 engines=2 engine-tp=2",
    "model=qwen2.5-7b tp=4 pp=2 engines=2 engine-tp=4",
    "model=qwen3-8b world=8 tp=4 engines=4 engine-tp=2",
    "model=qwen3-8b world=8 tp=4 engines=2 engine-tp=4 colocate",
    "model=qwen3-32b tp=8 pp=2 engines=4 engine-tp=4",
    "model=qwen3-32b tp=8 pp=4 engines=4 engine-tp=8",
    "model=qwen3-30b-a3b world=8 tp=4 ep=8 etp=1 engines=2 engine-tp=4",
    "model=qwen3-30b-a3b world=8 tp=8 ep=8 etp=1 engines=1 engine-tp=8 engine-ep=8 colocate",
    "model=qwen3-235b-a22b world=64 tp=4 pp=2 ep=8 etp=1 engines=4 engine-tp=8 engine-ep=8",
)
"""Rows of docs/weights.md in the short names of :data:`SHORT`."""
SHORT = {
    "model": "model", "world": "world-size", "tp": "tensor-model-parallel-size", "pp": "pipeline-model-parallel-size",
    "ep": "expert-model-parallel-size", "etp": "expert-tensor-parallel-size", "engines": "num-engines",
    "engine-tp": "sglang-tp-size", "engine-ep": "sglang-ep-size", "colocate": "colocate",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A plan, its costs and its proof."""

    plan: WeightPlan
    stats: PlanStats
    proof: PlanProof
    plan_seconds: float
    proof_seconds: float


def parser() -> argparse.ArgumentParser:
    """The command line; Megatron's and SGLang's own names."""
    p = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help=f"{', '.join(NAMES)}, or an HF directory")
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    trainer = p.add_argument_group("trainer")
    trainer.add_argument("--world-size", type=int, help="ranks of the trainer (default: one replica)")
    for axis in ("tensor-model", "pipeline-model", "context", "expert-model", "expert-tensor"):
        trainer.add_argument(f"--{axis}-parallel-size", type=int, default=None if axis == "expert-tensor" else 1)
    trainer.add_argument("--num-virtual-stages-per-pipeline-rank", type=int)
    trainer.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    engines = p.add_argument_group("engines")
    engines.add_argument("--num-engines", type=int, default=1)
    engines.add_argument("--sglang-tp-size", type=int, default=1)
    engines.add_argument("--sglang-ep-size", type=int, default=1)
    engines.add_argument("--colocate", action="store_true", help="engines on the trainer's GPUs, in order")
    p.add_argument("--gpus-per-node", type=int, default=8)
    p.add_argument("--bucket-mib", type=int, default=512, help="staging memory of a rank")
    p.add_argument("--show-messages", type=int, default=0, metavar="N", help="print the first N messages")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.add_argument("--table", action="store_true", help="print the table of docs/weights.md")
    return p


def layouts(args: argparse.Namespace, arch: Architecture) -> tuple[ParallelLayout, list[EngineLayout]]:
    """The trainer's layout and the engines'.

    Raises:
        ValueError: a size or a layout does not fit; the message lists every layout error.
    """
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    ep, etp, vpp = args.expert_model_parallel_size, args.expert_tensor_parallel_size, None
    vpp = args.num_virtual_stages_per_pipeline_rank
    for flag in ("num_engines", "gpus_per_node", "bucket_mib"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 1")
    world = args.world_size or max(1, tp) * max(1, pp) * max(1, cp)
    layout = ParallelLayout.for_world(
        world, tp, pp, cp=cp, ep=ep, etp=etp, vpp=vpp, make_vocab_size_divisible_by=args.make_vocab_size_divisible_by
    )
    engine = EngineLayout(tp=args.sglang_tp_size, ep=args.sglang_ep_size)
    errors = arch.cut_errors(tp, pp, ep=ep, etp=etp, vpp=vpp) + engine.cut_errors(arch)
    if args.colocate and args.num_engines * engine.tp > world:
        errors.append(f"--colocate: {args.num_engines} engines of {engine.tp} GPUs do not fit the trainer's {world}")
    if errors:
        raise ValueError("\n  ".join(errors))
    return layout, [engine] * args.num_engines


def plan_and_prove(args: argparse.Namespace) -> Outcome:
    """Make the plan that the command line describes, and prove the plan.

    Raises:
        ValueError: the model, a layout or the bucket size is not possible.
    """
    if not args.model:
        raise ValueError(f"--model is missing: name one of {', '.join(NAMES)}, or an HF directory")
    arch = find_architecture(args.model)
    layout, engines = layouts(args, arch)
    first, size, per_node = 0 if args.colocate else layout.world_size, engines[0].tp, args.gpus_per_node
    start = time.process_time()
    plan = build_plan(
        arch, layout, engines, dtype=DTYPES[args.dtype], bucket_bytes=args.bucket_mib << 20,
        source_placements=consecutive_placements(layout.world_size, gpus_per_node=per_node),
        engine_placements=[
            consecutive_placements(size, first=first + number * size, gpus_per_node=per_node)
            for number in range(len(engines))
        ],
    )  # fmt: skip
    planned = time.process_time()
    proof = prove(plan, arch, layout)
    return Outcome(
        plan=plan, stats=plan_stats(plan), proof=proof, plan_seconds=planned - start,
        proof_seconds=time.process_time() - planned,
    )  # fmt: skip


def trainer_text(args: argparse.Namespace) -> str:
    """The trainer's layout in short."""
    sizes = {
        "TP": args.tensor_model_parallel_size, "PP": args.pipeline_model_parallel_size,
        "VPP": args.num_virtual_stages_per_pipeline_rank or 1, "CP": args.context_parallel_size,
        "EP": args.expert_model_parallel_size, "ETP": args.expert_tensor_parallel_size,
    }  # fmt: skip
    default = dict.fromkeys(sizes, 1) | {"ETP": None}
    text = "".join(f" {name}{size}" for name, size in sizes.items() if size != default[name] or name == "TP")
    per_replica = sizes["TP"] * sizes["PP"] * sizes["CP"]
    replicas = (args.world_size or per_replica) // per_replica
    return (text + (f" DP{replicas}" if replicas > 1 else "")).strip()


def engines_text(args: argparse.Namespace) -> str:
    """The engines in short."""
    ep = f" EP{args.sglang_ep_size}" if args.sglang_ep_size > 1 else ""
    return f"{args.num_engines} x TP{args.sglang_tp_size}{ep}" + (" colocated" if args.colocate else "")


def gb(count: float) -> str:
    """Bytes in decimal gigabytes."""
    return f"{count / 1e9:.2f}"


def report(args: argparse.Namespace, out: Outcome) -> str:
    """The outcome as text, for people."""
    stats, proof, total = out.stats, out.proof, out.stats.bytes
    same_gpu, same_node, remote = (
        part / total for part in (stats.same_gpu_bytes, stats.same_node_bytes, stats.remote_bytes)
    )
    lines = [
        f"{args.model} in {args.dtype}: {trainer_text(args)} -> {engines_text(args)}",
        f"  plan      {stats.copies} copies in {stats.messages} messages between {stats.pairs} pairs of ranks, "
        f"{stats.buckets} buckets of {args.bucket_mib} MiB; made in {out.plan_seconds:.2f} s of CPU",
        f"  bytes     {gb(total)} GB in all, {gb(total / args.num_engines)} GB an engine",
        f"  egress    at most {gb(stats.egress_max)} GB a trainer rank, {gb(stats.egress_mean)} on average",
        f"  ingress   at most {gb(stats.ingress_max)} GB an engine rank, {gb(stats.ingress_mean)} on average",
        f"  path      {same_gpu:.1%} on the same GPU, {same_node:.1%} on the same node, {remote:.1%} between nodes",
        f"  proof     every element of {proof.parameters} parameters is written once, by a rank that owns it; "
        f"{proof.padding_elements} of padding never",
        f"            sent / needed = {proof.redundancy:.3f}; at most {proof.staging_bytes / 2**20:.1f} MiB staged a "
        f"bucket; proved in {out.proof_seconds:.2f} s of CPU",
        f"  digest    {out.plan.digest}",
    ]
    for m in out.plan.messages[: args.show_messages]:
        lines.append(
            f"  bucket {m.bucket}: rank {m.source} -> engine {m.engine} rank {m.engine_rank}, {m.payload_bytes} bytes"
        )
        lines += [
            f"    {c.hf_name}: {c.source_names[0]}{list(c.source_start)} -> {c.name}{list(c.start)}, {list(c.size)}"
            for c in m.copies
        ]
    return "\n".join(lines)


def as_json(args: argparse.Namespace, out: Outcome) -> str:
    """The outcome as JSON, for programs."""
    value = {
        "model": args.model, "dtype": args.dtype, "trainer": trainer_text(args), "engines": engines_text(args),
        "digest": out.plan.digest, "plan_seconds": out.plan_seconds, "proof_seconds": out.proof_seconds,
        "stats": asdict(out.stats), "proof": {**asdict(out.proof), "redundancy": out.proof.redundancy},
        "messages": [asdict(message) for message in out.plan.messages[: args.show_messages]],
    }  # fmt: skip
    return json.dumps(value, indent=1)


COLUMNS = (
    "model", "trainer -> engines", "copies / pairs", "plan, proof (CPU s)", "GB an engine", "egress max", "ingress max",
    "same GPU / node",
)  # fmt: skip


def table_row(line: str) -> list[str]:
    """One row of :data:`TABLE`, planned and proved."""
    words = (word.partition("=") for word in line.split())
    args = parser().parse_args([f"--{SHORT[name]}{sign}{value}" for name, sign, value in words])
    out = plan_and_prove(args)
    s = out.stats
    return [
        args.model, f"{trainer_text(args)} -> {engines_text(args)}", f"{s.copies} / {s.pairs}",
        f"{out.plan_seconds:.1f}, {out.proof_seconds:.1f}", gb(s.bytes / args.num_engines), gb(s.egress_max),
        gb(s.ingress_max), f"{s.same_gpu_bytes / s.bytes:.0%} / {s.same_node_bytes / s.bytes:.0%}",
    ]  # fmt: skip


def print_table() -> None:
    """The table of docs/weights.md."""
    for cells in (COLUMNS, ["---"] * len(COLUMNS), *map(table_row, TABLE)):
        print(f"| {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0 when the plan is proved, 2 for an impossible request."""
    args = parser().parse_args(argv)
    try:
        if args.table:
            print_table()
        else:
            out = plan_and_prove(args)
            print(as_json(args, out) if args.json else report(args, out))
    except ValueError as error:
        print(f"plan_weights: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
