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
from collections.abc import Iterator, Sequence
from pathlib import Path

from checkpoint_convert import common
from megatron_tropd.parallel import platform

platform.install()  # before the first import of Megatron

import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_tropd.models.build import build_gpt_model  # noqa: E402
from megatron_tropd.parallel.groups import init_distributed, student_groups  # noqa: E402
from megatron_tropd.training.agree import on_all_ranks  # noqa: E402
from megatron_tropd.training.checkpoint import (  # noqa: E402
    RELEASE,
    hf_directory,
    load_checkpoint,
    load_model_state,
    read_metadata,
)
from megatron_tropd.training.checkpoint_directory import model_dtype  # noqa: E402
from megatron_tropd.training.checkpoint_metadata import CheckpointMetadata  # noqa: E402
from megatron_tropd.weights.export import HfExporter  # noqa: E402
from megatron_tropd.weights.files import copy_sidecars  # noqa: E402
from megatron_tropd.weights.load import local_parameters  # noqa: E402
from megatron_tropd.weights.manifest import MANIFEST_FILE, HfManifest  # noqa: E402
from megatron_tropd.weights.writer import remove_other_weights, write_hf_files  # noqa: E402


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


def write_stream(stream: Iterator[tuple[str, Tensor]], args: argparse.Namespace, checkpoint: CheckpointMetadata) -> int:
    """On rank 0 write the exported tensors and the files carried along; elsewhere only take part."""
    try:
        if dist.get_rank():
            return 0
        carried = hf_directory(args.load, checkpoint.iteration)
        dtype = model_dtype(args.load, checkpoint.iteration)
        manifest = HfManifest.load(carried) or HfManifest.default(checkpoint.architecture, dtype)
        unchanged = checkpoint.iteration == RELEASE  # written by hf_to_megatron: the digests must hold
        count = write_hf_files(args.save, manifest, checkpoint.architecture, stream, verify=unchanged)
    finally:
        for _ in stream:  # every rank takes part in the export, also after an error
            pass
    remove_other_weights(args.save, manifest)
    copy_sidecars(carried, args.save, skip=[MANIFEST_FILE])
    return count


def convert(argv: Sequence[str] | None = None) -> None:
    """Run the command.  Collective where torchrun started several ranks."""
    args = parse(argv)
    rank, world_size = init_distributed()

    def check() -> tuple:
        iteration = common.iteration(args.iteration)
        layout = common.conversion_layout(args, world_size)
        metadata = read_metadata(args.load, iteration)
        errors = metadata.architecture.check_layout(args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
        if errors:
            raise ValueError("; ".join(errors))
        common.check_output(args.save, overwrite=args.overwrite, sources=[args.load])
        return metadata, layout, model_dtype(args.load, iteration)

    metadata, layout, dtype = on_all_ranks(check, ValueError)
    arch, divisor = metadata.architecture, metadata.make_vocab_size_divisible_by
    groups = student_groups(layout)
    model = build_gpt_model(arch, groups, params_dtype=dtype, make_vocab_size_divisible_by=divisor)
    state, _ = load_checkpoint(args.load, metadata.iteration, {"model": model.sharded_state_dict()}, arch=arch)
    load_model_state(model, state["model"])
    exporter = HfExporter(arch, layout, rank, dtype=dtype, make_vocab_size_divisible_by=divisor)
    stream = exporter.export(local_parameters(model), groups.world)

    written = on_all_ranks(lambda: write_stream(stream, args, metadata), ValueError)
    if rank == 0:
        same = ", identical to the source" if metadata.iteration == RELEASE else ""
        print(f"{args.save}: {arch.family}, iteration {metadata.iteration}, {common.gigabytes(written)}{same}")


if __name__ == "__main__":
    sys.exit(common.run(convert))
