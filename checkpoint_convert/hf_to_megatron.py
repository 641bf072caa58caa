"""Hugging Face weights to a Megatron checkpoint.

    python -m checkpoint_convert.hf_to_megatron --hf-checkpoint HF_DIR --save DIR
    torchrun --nproc-per-node 4 -m checkpoint_convert.hf_to_megatron ... --tensor-model-parallel-size 4

Writes ``DIR/release/`` and a tracker that names it.  The checkpoint loads at any TP x PP, whatever
wrote it; under torchrun each rank reads and holds only its part of the model.
"""

import os
import sys

if __name__ == "__main__" and not __package__:  # run as a file: this folder's inspect.py must not hide Python's
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    os.environ["PYTHONSAFEPATH"] = "1"  # the same for helper processes

import argparse
from collections.abc import Sequence
from pathlib import Path

from checkpoint_convert import common
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.layout import ParallelLayout


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(
        prog="hf_to_megatron", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf-checkpoint", type=Path, required=True, metavar="DIR", help="safetensors, config.json")
    common.add_save_flags(parser)
    common.add_layout_flags(parser)
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="padding of the vocabulary (128)"
    )
    return parser.parse_args(argv)


def convert(argv: Sequence[str] | None = None) -> None:
    """Run the command.  Collective where torchrun started several ranks."""
    args = parse(argv)
    platform.install()
    from megatron_tropd.models.build import build_gpt_model
    from megatron_tropd.parallel.groups import init_distributed, student_groups
    from megatron_tropd.training.agree import on_all_ranks
    from megatron_tropd.training.checkpoint import RELEASE, save_checkpoint
    from megatron_tropd.weights.files import HfCheckpoint
    from megatron_tropd.weights.load import load_hf_into
    from megatron_tropd.weights.manifest import HfManifest, hash_tensors

    rank, world_size = init_distributed()
    divisor = args.make_vocab_size_divisible_by

    def check() -> tuple[HfCheckpoint, ParallelLayout]:
        if divisor < 1:
            raise ValueError(f"--make-vocab-size-divisible-by {divisor} must be at least 1")
        layout = common.conversion_layout(args, world_size)
        checkpoint = HfCheckpoint.open(args.hf_checkpoint)
        errors = checkpoint.arch.check_layout(args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
        if errors:
            raise ValueError("; ".join(errors))
        common.check_output(args.save, overwrite=args.overwrite, sources=[args.hf_checkpoint])
        return checkpoint, layout

    checkpoint, layout = on_all_ranks(check, ValueError)
    arch, dtype = checkpoint.arch, checkpoint.widest_dtype
    groups = student_groups(layout)
    model = build_gpt_model(arch, groups, params_dtype=dtype, make_vocab_size_divisible_by=divisor)
    on_all_ranks(
        lambda: load_hf_into(model, checkpoint, arch, layout, rank, make_vocab_size_divisible_by=divisor), ValueError
    )
    manifest = HfManifest.of(
        checkpoint,
        sha256=hash_tensors(checkpoint, rank, world_size),
        padded_vocab_size=layout.padded_vocab_size(arch.vocab_size, divisor),
    )
    folder = save_checkpoint(
        args.save, RELEASE, {"model": model.sharded_state_dict()}, {}, arch=arch, hf_sidecar=args.hf_checkpoint,
        manifest=manifest, make_vocab_size_divisible_by=divisor,
    )  # fmt: skip
    if rank == 0:
        print(
            f"{folder}: {arch.family}, {len(checkpoint.tensors)} tensors, {common.dtype_name(dtype)}, "
            f"vocabulary {arch.vocab_size} padded to {manifest.padded_vocab_size}"
        )


if __name__ == "__main__":
    sys.exit(common.run(convert))
