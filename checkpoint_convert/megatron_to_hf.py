"""Convert a Megatron checkpoint (converted or trained) to a Hugging Face directory.

    python -m checkpoint_convert.megatron_to_hf --load DIR --save HF_DIR [--iteration 100]
    torchrun --nproc-per-node 8 -m checkpoint_convert.megatron_to_hf ...

Files, tensor order, metadata and dtypes are those of the Hugging Face checkpoint that the model came from.
For converted weights that were not trained (``release``) every byte is the same, and each tensor is
compared with its recorded sha256.  Any number of processes share the work.  Each of them holds at most a few
buffers, whatever the model's size.
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

common.prepare()

from megatron_tropd.checkpoints.conversion.logits import check_logits  # noqa: E402
from megatron_tropd.checkpoints.conversion.reading import check_stored, open_tensors  # noqa: E402
from megatron_tropd.checkpoints.conversion.torch_dist_to_hf import torch_dist_to_hf  # noqa: E402
from megatron_tropd.checkpoints.conversion.verify import verify_hf  # noqa: E402
from megatron_tropd.checkpoints.conversion.workers import Workers  # noqa: E402
from megatron_tropd.checkpoints.directory import RELEASE, hf_directory, model_dtype, read_metadata  # noqa: E402
from megatron_tropd.checkpoints.load import open_checkpoint  # noqa: E402
from megatron_tropd.checkpoints.metadata import CheckpointError, CheckpointMetadata  # noqa: E402
from megatron_tropd.parallel.fail_together import on_all_ranks, on_rank_zero  # noqa: E402
from megatron_tropd.parallel.groups import init_distributed  # noqa: E402
from megatron_tropd.parallel.layout import ParallelLayout  # noqa: E402
from megatron_tropd.standard_streams import tell  # noqa: E402
from megatron_tropd.weights.coordinates.checkpoint_boxes import stored_params  # noqa: E402
from megatron_tropd.weights.files.hf_checkpoint import copy_sidecars  # noqa: E402
from megatron_tropd.weights.files.hf_manifest import MANIFEST_FILE, HfManifest  # noqa: E402
from megatron_tropd.weights.files.hf_writer import HfWriter, remove_other_weights  # noqa: E402


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = common.Parser(
        prog="megatron_to_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="directory with the tracker")
    parser.add_argument("--iteration", metavar="N", help="a number or 'release'; default: what the tracker names")
    common.add_save_flags(parser)
    common.add_layout_flags(parser)
    common.add_stream_flags(parser)
    common.add_logits_flag(parser)
    return parser.parse_args(argv)


def _check(args: argparse.Namespace, workers: Workers) -> tuple[CheckpointMetadata, HfManifest]:
    """Check the flags and the checkpoint's metadata, before anything is written; return metadata and manifest."""
    metadata = read_metadata(args.load, common.iteration(args.iteration))
    common.buffer_bytes(args)
    common.check_logits_flag(args, workers.count)
    common.check_layout(args, metadata.architecture)
    common.check_output(args.save, overwrite=args.overwrite, sources=[args.load])
    kept = HfManifest.load(hf_directory(args.load, metadata.iteration))
    return metadata, kept or HfManifest.default(metadata.architecture, model_dtype(args.load, metadata.iteration))


def _write(
    args: argparse.Namespace, folder: Path, metadata: CheckpointMetadata, manifest: HfManifest, workers: Workers
) -> int:
    """Write the HF files and return their size in bytes.  Weight files get their final names only when all of them are
    complete.  Collective."""
    arch, iteration = metadata.architecture, metadata.iteration
    params = stored_params(arch, ParallelLayout(make_vocab_size_divisible_by=metadata.make_vocab_size_divisible_by))
    stored = open_tensors(folder)
    on_all_ranks(lambda: check_stored(stored, params), CheckpointError)
    writer = on_all_ranks(lambda: HfWriter(args.save, manifest, arch), ValueError)
    try:
        on_rank_zero(writer.create, ValueError)
        digests = torch_dist_to_hf(
            stored, params, writer, common.buffer_bytes(args), workers, verify=iteration == RELEASE
        )
        if args.verify:
            verify_hf(writer, digests, workers)
        written = on_rank_zero(writer.publish, ValueError)
    except BaseException:
        if workers.rank == 0:
            writer.discard()
        raise
    finally:
        stored.close()

    def write_hf() -> None:
        remove_other_weights(args.save, manifest)
        copy_sidecars(hf_directory(args.load, iteration), args.save, skip=[MANIFEST_FILE])

    on_rank_zero(write_hf, ValueError)
    return written


def convert(argv: Sequence[str] | None = None) -> None:
    """Run the command.  Collective where torchrun started several processes."""
    args = parse(argv)
    init_distributed()
    workers = Workers.of_job()
    metadata, manifest = on_all_ranks(lambda: _check(args, workers), ValueError)
    digested = metadata.iteration == RELEASE and manifest.sha256.keys() == manifest.tensors.keys()
    folder, _ = open_checkpoint(args.load, metadata.iteration, tensors_checked_later=digested)
    written = _write(args, folder, metadata, manifest, workers)
    if args.verify_logits:
        tell(check_logits(args.save, args.load, metadata.iteration).text, sys.stdout)
    if workers.rank == 0:
        same = ", identical to the source" if metadata.iteration == RELEASE else ""
        if manifest.left_aside:
            same = f"{same or ', laid out as the source'} without the {len(manifest.left_aside)} tensors left aside"
        verified = ", hashes verified" if args.verify else ""
        tell(
            f"{args.save}: {metadata.architecture.family}, iteration {metadata.iteration}, "
            f"{common.gigabytes(written)}{same}{verified}",
            sys.stdout,
        )


if __name__ == "__main__":
    sys.exit(common.run(convert))
