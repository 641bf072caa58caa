"""Compares the vocab-parallel head with a plain log-softmax and functions of other projects: accuracy, bytes, time.

    python tools/benchmark_head.py                    # on a CPU, minutes
    python tools/benchmark_head.py --preset gpu       # one GPU, under 8 minutes

writes head_benchmark.md, .json, .svg and .png into --out.  A shard of the vocabulary is measured as a group of one
rank with V / TP columns: computation and memory are those of one of TP ranks, collectives cost nothing.  Peers are
used where they are installed (requirements/benchmark.txt) and named as absent where not.
"""

from __future__ import annotations

import argparse
import os
import platform as machine
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from megatron_tropd.parallel import platform  # noqa: E402

platform.install()

from head_benchmark.contenders import NAIVE, OURS, Contender  # noqa: E402
from head_benchmark.inputs import Sizes  # noqa: E402
from head_benchmark.measure import Row, accuracy, memory, times, tried  # noqa: E402
from head_benchmark.peers import load_peers  # noqa: E402
from head_benchmark.table import write  # noqa: E402

from megatron_tropd.parallel.groups import shutdown, student_groups  # noqa: E402
from megatron_tropd.parallel.layout import ParallelLayout  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The sizes and repetitions of a measurement."""

    tokens: tuple[int, int]
    """Time and peak memory are measured at the larger number, the slope of memory between the two."""
    hidden: int
    vocab: int
    chunk: int
    memory_hidden: int
    """A smaller hidden size for counting bytes where only the logits matter."""
    memory_chunk: int
    tp_shards: tuple[int, ...]
    dtype: str
    repeats: int
    warmup: int


PRESETS = {
    "cpu": Preset(
        tokens=(1024, 2048), hidden=1024, vocab=18992, chunk=1024, memory_hidden=128, memory_chunk=64,
        tp_shards=(1,), dtype="fp32", repeats=3, warmup=1,
    ),
    "gpu": Preset(
        tokens=(8192, 32768), hidden=2048, vocab=151936, chunk=8192, memory_hidden=2048, memory_chunk=8192,
        tp_shards=(1, 2, 4, 8), dtype="bf16", repeats=10, warmup=3,
    ),
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """The command line; a preset's numbers can be overridden one by one."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--preset", choices=sorted(PRESETS), default=default)
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("FEWER", "MORE"))
    for name in ("hidden", "vocab", "chunk", "memory-hidden", "memory-chunk", "repeats", "warmup"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--tp-shards", type=int, nargs="+")
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    parser.add_argument("--only", nargs="+", default=[""], help="contenders whose name contains one of these")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; idle ones that spin are counted as time")
    parser.add_argument("--time-limit", type=float, default=450.0, help="seconds; no configuration starts after them")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "head_benchmark")
    arguments = parser.parse_args()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)  # not after minutes of measuring
    except OSError as error:
        parser.error(f"--out {arguments.out} cannot be made: {error}")
    return arguments


def measure(contenders: list[Contender], sizes: Sizes, preset: Preset, device: torch.device) -> list[Row]:
    """All three measurements of every contender at one shard size."""
    small = replace(sizes, tokens=96, hidden=64, vocab=1003, chunk=32)
    rows: dict[str, Row] = {}
    for contender in contenders:
        error, why = tried(lambda contender=contender: accuracy(contender, small, device))
        rows[contender.name] = Row(name=contender.name, loss=contender.loss, error=error, note=why)
    able = [contender for contender in contenders if rows[contender.name].error is not None]
    fewer, more = (
        replace(sizes, tokens=count, hidden=preset.memory_hidden, chunk=preset.memory_chunk) for count in preset.tokens
    )
    for contender in able:
        low, why = tried(lambda contender=contender: memory(contender, fewer, device))
        high, why = tried(lambda contender=contender: memory(contender, more, device)) if not why else (None, why)
        slope = None
        if low is not None and high is not None:
            slope = (high - low) / ((more.tokens - fewer.tokens) * more.vocab)
        peak = None if high is None else int(high)
        rows[contender.name] = replace(rows[contender.name], peak_bytes=peak, slope=slope, note=why)
    able = [contender for contender in able if rows[contender.name].peak_bytes is not None]
    products, medians = times(able, replace(sizes, tokens=more.tokens), device, preset.repeats, preset.warmup)
    for name, seconds in medians.items():
        if isinstance(seconds, str):
            rows[name] = replace(rows[name], note=seconds)
        else:
            rows[name] = replace(rows[name], milliseconds=seconds * 1e3, ratio=seconds / products)
    unit = Row(name="three matrix products", loss="", milliseconds=products * 1e3, ratio=1.0)
    return [unit, *rows.values()]


def hardware(device: torch.device, threads: int) -> dict[str, Any]:
    """The hardware and the versions that the numbers were measured with."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return {"GPU": name, "torch": torch.__version__, "CUDA": torch.version.cuda}
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.split(":")[1].strip() for line in names if line.startswith("model name")), machine.machine())
    return {"CPU": name, "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}


def main() -> None:
    """Run the preset and print the tables."""
    arguments = parse_arguments()
    began = time.monotonic()
    base = PRESETS[arguments.preset]
    given = {name: getattr(arguments, name) for name in base.__dataclass_fields__}
    preset = replace(base, **{name: value for name, value in given.items() if value is not None})
    device = platform.device()
    torch.set_num_threads(arguments.threads)
    dist.init_process_group(platform.backend(), store=dist.HashStore(), rank=0, world_size=1)
    student_groups(ParallelLayout())  # peers ask Megatron for its groups
    peers, absent = load_peers()
    contenders = [NAIVE, *OURS, *peers]
    contenders = [c for c in contenders if any(part in c.name for part in arguments.only)]
    tables: list[tuple[str, list[Row]]] = []
    for shards in preset.tp_shards:
        if time.monotonic() - began > arguments.time_limit:
            absent[f"TP {shards}"] = f"--time-limit {arguments.time_limit:.0f} s was over"
            continue
        sizes = Sizes(
            tokens=preset.tokens[1], hidden=preset.hidden, vocab=preset.vocab // shards, chunk=preset.chunk,
            dtype=DTYPES[preset.dtype],
        )  # fmt: skip
        title = (
            f"TP {shards}: {sizes.vocab:,} columns, {preset.dtype}, top-64; time at {sizes.tokens:,} tokens, hidden "
            f"{sizes.hidden}, chunks of {sizes.chunk}; memory at hidden {preset.memory_hidden}, chunks of "
            f"{preset.memory_chunk}"
        )
        tables.append((title, measure(contenders, sizes, preset, device)))
    print(write(arguments.out, hardware(device, arguments.threads), tables, absent))
    print(f"{time.monotonic() - began:.0f} s; wrote {arguments.out}/head_benchmark.md, .json, .svg, .png")
    shutdown()


if __name__ == "__main__":
    main()
