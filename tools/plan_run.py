r"""Plan a run before it is started: memory of every GPU and phase, seconds of a step, what is idle, what does not fit.

    python tools/plan_run.py --num-gpus 8 --gpu h100 --config run.yaml --hf-checkpoint qwen3-1.7b \
        --teacher-hf-checkpoint qwen3-8b --bf16 --max-response-length 8096 --mean-response-length 3000
    python tools/plan_run.py --table        # the table of docs/scaling.md

All flags of ``python -m megatron_tropd.train`` and its ``--config`` are read by the same code.  No weights are needed:
a model is a directory with a ``config.json`` or a known size.  Those of this tool alone:
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.cli import ConfigError, parse  # noqa: E402
from megatron_tropd.config import TrainConfig  # noqa: E402
from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from tools.model_sizes import NAMES  # noqa: E402
from tools.planning.hardware import GPUS, Efficiency  # noqa: E402
from tools.planning.report import RunPlan, as_value, text  # noqa: E402
from tools.planning.scenario import Machines, make_scenario  # noqa: E402
from tools.planning.table import print_table  # noqa: E402

EFFICIENCIES = ("score", "train", "decode_bandwidth", "link")
"""Fields of Efficiency that have a flag."""


class _Parser(FlagParser):
    """Raises ConfigError instead of exiting, so that all mistakes look alike."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def parser() -> argparse.ArgumentParser:
    """Return the options of this tool alone."""
    p = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"known sizes: {', '.join(NAMES)}",
    )  # fmt: skip
    p.add_argument("--num-gpus", type=int, help="ranks of torchrun, with those of a dedicated teacher; needed")
    p.add_argument("--gpus-per-node", type=int, default=8)
    p.add_argument("--gpu", choices=GPUS, default="h100", help="gives the six numbers below (default: h100)")
    p.add_argument("--gpu-memory-gb", type=float, help="memory of a GPU in 1e9 bytes")
    p.add_argument("--gpu-tflops", type=float, help="dense TFLOP/s, in the run's dtype")
    p.add_argument("--gpu-bandwidth-gbs", type=float, help="GB/s of the GPU's memory")
    p.add_argument("--nvlink-gbs", type=float, help="GB/s between the GPUs of a node, one direction")
    p.add_argument("--network-gbs", type=float, help="GB/s of a GPU to other nodes, one direction")
    p.add_argument("--host-gbs", type=float, help="GB/s of a GPU to host memory, one direction")
    p.add_argument("--memory-reserve-gb", type=float, default=6.0, help="not counted: context, NCCL, gaps (default: 6)")
    p.add_argument("--mean-prompt-length", type=float, help="tokens (default: --max-prompt-length / 8)")
    p.add_argument("--mean-response-length", type=float, help="tokens (default: --max-response-length / 2)")
    for name in EFFICIENCIES:
        value = getattr(Efficiency(), name)
        p.add_argument(
            f"--{name.replace('_', '-')}-efficiency", type=float, default=value, help=f"share of the peak ({value})"
        )
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.add_argument("--table", action="store_true", help="print the table of docs/scaling.md")
    return p


def machines_of(args: argparse.Namespace, config: TrainConfig) -> Machines:
    """Return the machines that the command line describes.

    Raises:
        ConfigError: --num-gpus is missing, or a peak is not above 0.
    """
    errors = [] if args.num_gpus is not None else ["--num-gpus is missing: give the number of ranks of the run"]
    gpu = GPUS[args.gpu]
    peaks = {
        "gpu_memory_gb": ("memory", 1e9), "gpu_bandwidth_gbs": ("bandwidth", 1e9), "nvlink_gbs": ("nvlink", 1e9),
        "network_gbs": ("network", 1e9), "host_gbs": ("host", 1e9),
        "gpu_tflops": ("flops_bf16" if config.model.bf16 else "flops_fp32", 1e12),
    }  # fmt: skip
    for name, (field, unit) in peaks.items():
        if (value := getattr(args, name)) is not None:
            if not value > 0:
                errors.append(f"--{name.replace('_', '-')} {value:g} must be above 0")
            gpu = replace(gpu, **{field: value * unit})
    if errors:
        raise ConfigError(errors)
    return Machines(
        num_gpus=args.num_gpus, gpus_per_node=args.gpus_per_node, gpu=gpu, reserve=args.memory_reserve_gb * 1e9,
        efficiency=Efficiency(**{name: getattr(args, f"{name}_efficiency") for name in EFFICIENCIES}),
        mean_prompt_length=args.mean_prompt_length, mean_response_length=args.mean_response_length,
        teacher_placement=config.teacher.teacher_placement, teacher_world_size=_teacher_gpus(config),
        rollout_lag=config.rollout.rollout_lag,
    )  # fmt: skip


def _teacher_gpus(config: TrainConfig) -> int:
    """Return the number of GPUs that only the teacher uses."""
    teacher = config.teacher
    if teacher.teacher_placement == "server":
        return (len(teacher.teacher_urls) or teacher.teacher_num_servers) * teacher.teacher_sglang_tp_size
    return teacher.teacher_world_size


def plan(argv: Sequence[str]) -> RunPlan:
    """Return the plan that a command line asks for.

    Raises:
        ConfigError: it cannot be used; one message lists what was found.
    """
    args, rest = parser().parse_known_args(argv)
    config = parse(rest)
    return RunPlan.of(make_scenario(config, machines_of(args, config)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 when everything fits, 1 when it does not, 2 for a request that cannot be."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        args, _ = parser().parse_known_args(words)
        if args.table:
            print_table(plan)
            return 0
        found = plan(words)
    except ConfigError as error:
        print(f"plan_run: {error}", file=sys.stderr)
        return 2
    print(json.dumps(as_value(found), indent=1) if args.json else text(found))
    return 0 if found.fits else 1


if __name__ == "__main__":
    sys.exit(main())
