"""Time and peak memory of HF -> Megatron -> HF on a made-up checkpoint of a known model's shapes.

    python tools/measure_conversion.py --model qwen3-8b --work-dir /big/disk [--processes 2] [--layers 9]

Writes random bf16 weights, converts them and converts them back with the commands of ``checkpoint_convert``,
each in processes of its own, and prints one JSON line per conversion: seconds, and by process the peak
resident memory before the command began (imports) and at its end.  Each directory is removed as soon as it
is not needed: at most two copies of the model are on disk.  The way back compares every tensor with the
sha256 taken on the way there, so a run that ends without an error is also a test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_tropd.flag_parser import FlagParser

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "qwen3-1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
COMMON = {
    "model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
BLOCK_BYTES = 1 << 24
COMMANDS = ("hf_to_megatron", "megatron_to_hf")


def peak_bytes() -> int:
    """Peak resident memory of this process since its program began (getrusage would include its parent's)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmHWM")


def write_checkpoint(directory: Path, config: dict[str, object]) -> int:
    """Write random finite numbers, one block of them repeated; returns the bytes of the weights."""
    import torch

    from megatron_tropd.models.hf_config import architecture_from_hf_config
    from megatron_tropd.weights.files.hf_manifest import HfManifest
    from megatron_tropd.weights.files.hf_writer import HfWriter

    arch = architecture_from_hf_config(config)
    manifest = HfManifest.default(arch, torch.bfloat16)
    writer = HfWriter(directory, manifest, arch)
    writer.create()
    (directory / "config.json").write_text(json.dumps(config), encoding="ascii")
    block = torch.randn(BLOCK_BYTES // 2, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    shift = 0
    for name, info in manifest.tensors.items():
        columns = info.nbytes // info.dtype.itemsize // info.shape[0]
        step = max(1, block.numel() // 2 // columns)
        for row in range(0, info.shape[0], step):
            rows = min(step, info.shape[0] - row)
            shift = (shift + 9973) % (block.numel() - rows * columns)  # no two tensors alike
            writer.write_rows(name, row, block[shift : shift + rows * columns].view(rows, *info.shape[1:]))
    return writer.publish()


def child(command: str, flags: list[str], report: Path) -> None:
    """Run one process of a conversion and write its peak memory into ``report``."""
    from checkpoint_convert import hf_to_megatron, megatron_to_hf
    from megatron_tropd.parallel.groups import shutdown

    convert = {"hf_to_megatron": hf_to_megatron.convert, "megatron_to_hf": megatron_to_hf.convert}[command]
    before = peak_bytes()
    try:
        convert(flags)
    finally:
        shutdown()
    line = {"rank": int(os.environ.get("RANK", "0")), "imports": before, "peak": peak_bytes()}
    (report / f"{line['rank']}.json").write_text(json.dumps(line), encoding="ascii")


def measure(command: str, flags: list[str], processes: int, work: Path) -> dict[str, object]:
    """Run one conversion; returns seconds and memory by process."""
    report = Path(tempfile.mkdtemp(dir=work))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    line = [sys.executable, "-W", "ignore", *(torchrun if processes > 1 else []), __file__, "--child", command]
    start = time.monotonic()
    subprocess.run(
        [*line, "--report", str(report), "--", *flags], check=True, stdout=sys.stderr, timeout=3600, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    seconds = time.monotonic() - start
    ranks = sorted((json.loads(p.read_text(encoding="ascii")) for p in report.iterdir()), key=lambda r: r["rank"])
    shutil.rmtree(report)
    return {
        "command": command,
        "seconds": round(seconds, 1),
        "imports_bytes": [r["imports"] for r in ranks],
        "peak_bytes": [r["peak"] for r in ranks],
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "N"), help="config.json values")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--buffer-mib", type=int, default=64)
    parser.add_argument("--verify", action="store_true", help="pass --verify to both commands")
    parser.add_argument("--child", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _numbers(pairs: list[list[str]]) -> dict[str, int]:
    """The values of --set."""
    for key, value in pairs:
        if not value.isdecimal():
            raise ValueError(f"--set {key} {value}: expected a number")
    return {key: int(value) for key, value in pairs}


def run(args: argparse.Namespace) -> list[dict[str, object]]:
    """Run both conversions; returns the measurements, with the sizes that the memory bound depends on."""
    config: dict[str, Any] = {**COMMON, **MODELS[args.model], **_numbers(args.set)}
    if args.layers:
        config["num_hidden_layers"] = args.layers
    work = Path(tempfile.mkdtemp(prefix="conversion-", dir=args.work_dir))
    common = ["--buffer-mib", str(args.buffer_mib), *(["--verify"] if args.verify else [])]
    try:
        start = time.monotonic()
        total = write_checkpoint(work / "hf", config)
        print(f"{total / 1e9:.2f} GB written in {time.monotonic() - start:.0f} s", file=sys.stderr)
        sizes = {
            "model_bytes": total,
            "largest_tensor_bytes": 2 * config["vocab_size"] * config["hidden_size"],
            "buffer_bytes": args.buffer_mib << 20,
        }
        there = ["--hf-checkpoint", str(work / "hf"), "--save", str(work / "megatron"), *common]
        first = measure("hf_to_megatron", there, args.processes, work)
        shutil.rmtree(work / "hf")
        back = ["--load", str(work / "megatron"), "--save", str(work / "again"), *common]
        second = measure("megatron_to_hf", back, args.processes, work)
        return [{**first, **sizes}, {**second, **sizes}]
    finally:
        shutil.rmtree(work)


def main() -> None:
    """Run the command line."""
    args = parse()
    sys.path.insert(0, str(ROOT))
    if args.child:
        child(args.child, args.flags, args.report)
        return
    try:
        for line in run(args):
            print(json.dumps(line))
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"measure_conversion: {error}")


if __name__ == "__main__":
    main()
