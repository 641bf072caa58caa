"""A Megatron checkpoint (converted or trained) to a Hugging Face directory.

    python -m checkpoint_convert.megatron_to_hf --load DIR --save HF_DIR [--iteration 100]
    torchrun --nproc-per-node 4 -m checkpoint_convert.megatron_to_hf ... --tensor-model-parallel-size 4

Files, order, metadata and dtypes are those of the checkpoint that the model came from; for an
unchanged model (``release``) every byte is, and each tensor is held against its recorded sha256.
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(
        prog="megatron_to_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="directory with the tracker")
    parser.add_argument("--iteration", metavar="N", help="a number or 'release'; default: what the tracker names")
    common.add_save_flags(parser)
    common.add_layout_flags(parser)
    return parser.parse_args(argv)


def convert(argv: Sequence[str] | None = None) -> None:
    """Run the command.  Collective where torchrun started several ranks."""
    args = parse(argv)
    platform.install()
    from megatron_tropd.models.build import build_gpt_model
    from megatron_tropd.parallel.groups import init_distributed, student_groups
    from megatron_tropd.training.agree import on_all_ranks
    from megatron_tropd.training.checkpoint import (
        RELEASE,
        hf_directory,
        load_checkpoint,
        load_model_state,
        read_metadata,
    )
    from megatron_tropd.training.checkpoint_directory import model_dtype
    from megatron_tropd.weights.export import HfExporter
    from megatron_tropd.weights.files import copy_sidecars
    from megatron_tropd.weights.load import local_parameters
    from megatron_tropd.weights.manifest import MANIFEST_FILE, HfManifest
    from megatron_tropd.weights.writer import remove_other_weights, write_hf_files

    rank, world_size = init_distributed()

    def check() -> tuple:
        iteration = common.iteration(args.iteration)
        layout = common.conversion_layout(args, world_size)
        metadata = read_metadata(args.load, iteration)
        errors = metadata.architecture.check_layout(
            args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        )
        if errors:
            raise ValueError("; ".join(errors))
        common.check_output(args.save, overwrite=args.overwrite, sources=[args.load])
        return metadata, layout, hf_directory(args.load, iteration), model_dtype(args.load, iteration)

    metadata, layout, carried, dtype = on_all_ranks(check, ValueError)
    arch, divisor = metadata.architecture, metadata.make_vocab_size_divisible_by
    groups = student_groups(layout)
    model = build_gpt_model(arch, groups, params_dtype=dtype, make_vocab_size_divisible_by=divisor)
    state, _ = load_checkpoint(args.load, metadata.iteration, {"model": model.sharded_state_dict()}, arch=arch)
    load_model_state(model, state["model"])
    exporter = HfExporter(arch, layout, rank, dtype=dtype, make_vocab_size_divisible_by=divisor)
    stream = exporter.export(local_parameters(model), groups.world)

    def write() -> int:
        if rank:
            for _ in stream:  # rank 0 writes; the others only send
                pass
            return 0
        manifest = HfManifest.load(carried) or HfManifest.default(arch, dtype)
        try:
            count = write_hf_files(args.save, manifest, arch, stream, verify=metadata.iteration == RELEASE)
        finally:
            for _ in stream:  # after an error: the others are still sending
                pass
        remove_other_weights(args.save, manifest)
        copy_sidecars(carried, args.save, skip=[MANIFEST_FILE])
        return count

    written = on_all_ranks(write, ValueError)
    if rank == 0:
        same = ", identical to the source" if metadata.iteration == RELEASE else ""
        print(f"{args.save}: {arch.family}, iteration {metadata.iteration}, {common.gigabytes(written)}{same}")


if __name__ == "__main__":
    sys.exit(common.run(convert))
