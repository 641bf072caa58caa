"""Copy a Megatron checkpoint with chunks cut for a layout, or with another padding of the vocabulary.

    python -m checkpoint_convert.megatron_to_megatron --load DIR --save DIR_2 [--iteration 100]
        [--tensor-model-parallel-size 8] [--make-vocab-size-divisible-by 1024] [--no-load-optim]
    torchrun --nproc-per-node 8 -m checkpoint_convert.megatron_to_megatron ...

A torch_dist checkpoint has no layout: every TP x PP x EP reads every checkpoint, so this is never needed to
change a layout.  Use it to take one iteration out of a run, with or without its optimizer; to change the
padding of the vocabulary; or to cut the chunks for a layout, so that each of its ranks reads only its own
bytes.  Any number of processes share the work.  Each of them holds at most a few buffers.
"""

import os
import sys

if __name__ == "__main__" and not __package__:  # run as a file: this folder's inspect.py must not hide Python's
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    os.environ["PYTHONSAFEPATH"] = "1"  # the same for helper processes

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from checkpoint_convert import common

common.prepare()

from megatron_tropd.atomic_files import writing  # noqa: E402
from megatron_tropd.checkpoints.conversion.reading import open_tensors  # noqa: E402
from megatron_tropd.checkpoints.conversion.reshard import plan_copy, verify_copy, write_copy  # noqa: E402
from megatron_tropd.checkpoints.conversion.workers import Workers  # noqa: E402
from megatron_tropd.checkpoints.conversion.writing import write_plain_files  # noqa: E402
from megatron_tropd.checkpoints.directory import HF_FOLDER, read_metadata  # noqa: E402
from megatron_tropd.checkpoints.known_logprobs import KNOWN_LOGPROBS_JSON  # noqa: E402
from megatron_tropd.checkpoints.load import open_checkpoint  # noqa: E402
from megatron_tropd.checkpoints.metadata import CheckpointError, CheckpointMetadata, FileRecord  # noqa: E402
from megatron_tropd.checkpoints.run_record import RUN_JSON  # noqa: E402
from megatron_tropd.checkpoints.safety import COMMON_FILE  # noqa: E402
from megatron_tropd.checkpoints.save import write_checkpoint  # noqa: E402
from megatron_tropd.parallel.fail_together import on_all_ranks, on_rank_zero  # noqa: E402
from megatron_tropd.parallel.groups import init_distributed  # noqa: E402
from megatron_tropd.standard_streams import tell  # noqa: E402
from megatron_tropd.weights.coordinates.checkpoint_boxes import StoredParam  # noqa: E402
from megatron_tropd.weights.files.hf_checkpoint import copy_sidecars  # noqa: E402
from megatron_tropd.weights.files.hf_manifest import MANIFEST_FILE, HfManifest  # noqa: E402
from megatron_tropd.weights.files.hf_writer import replace_text  # noqa: E402

CONFIG_FILE = "metadata.json"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = common.Parser(
        prog="megatron_to_megatron", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="directory with the tracker")
    parser.add_argument("--iteration", metavar="N", help="a number or 'release'; default: what the tracker names")
    common.add_save_flags(parser)
    common.add_layout_flags(parser)
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=int, metavar="N", help="padding of the vocabulary (default: as it is)"
    )
    parser.add_argument(
        "--no-load-optim", action="store_true", help="weights only: no optimizer, no schedule, no counters"
    )
    common.add_stream_flags(parser)
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> tuple[CheckpointMetadata, tuple[StoredParam, ...]]:
    """Check the flags, before any tensor is read; return the metadata and the parameters of the new checkpoint."""
    metadata = read_metadata(args.load, common.iteration(args.iteration))
    if args.make_vocab_size_divisible_by is None:
        args.make_vocab_size_divisible_by = metadata.make_vocab_size_divisible_by
    common.buffer_bytes(args)
    common.check_layout(args, metadata.architecture)
    common.check_output(args.save, overwrite=args.overwrite, sources=[args.load])
    return metadata, common.target_params(args, metadata.architecture, args.make_vocab_size_divisible_by)


def _write_plain(source: Path, target: Path, *, weights_only: bool) -> None:
    """Write the files besides the tensors: copies, or Megatron's own of a checkpoint that holds only weights."""
    if weights_only:
        write_plain_files(target)
    for name in (KNOWN_LOGPROBS_JSON,) if weights_only else (COMMON_FILE, CONFIG_FILE, RUN_JSON, KNOWN_LOGPROBS_JSON):
        if name in (COMMON_FILE, CONFIG_FILE) or (source / name).is_file():
            with writing(target / name):
                shutil.copyfile(source / name, target / name)


def _write_hf(source: Path, target: Path, padded: int) -> None:
    """Copy the HF config, tokenizer and manifest, if there are any; the manifest gets the new vocabulary size."""
    if not source.is_dir():
        return
    copy_sidecars(source, target, skip=[MANIFEST_FILE])
    if (manifest := HfManifest.load(source)) is not None:
        replace_text(target / MANIFEST_FILE, replace(manifest, padded_vocab_size=padded).to_json())


def convert(argv: Sequence[str] | None = None) -> None:
    """Run the command.  Collective where torchrun started several processes."""
    args = parse(argv)
    init_distributed()
    workers = Workers.of_job()
    metadata, params = on_all_ranks(lambda: _check(args), ValueError)
    source, _ = open_checkpoint(args.load, metadata.iteration)
    stored = open_tensors(source)
    copy = on_all_ranks(lambda: plan_copy(stored, params, weights_only=args.no_load_optim), CheckpointError)
    padded, size = max(p.shape[0] for p in params if not p.of), common.buffer_bytes(args)

    def write(folder: Path) -> dict[str, FileRecord]:
        records = write_copy(stored, folder, copy, size, workers)
        on_rank_zero(lambda: _write_plain(source, folder, weights_only=args.no_load_optim), CheckpointError)
        if args.verify:
            verify_copy(stored, folder, copy, size, workers)
        return records

    folder = write_checkpoint(
        args.save, metadata.iteration, write, lambda target: _write_hf(source / HF_FOLDER, target, padded),
        arch=metadata.architecture, make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
        source=metadata.source,
    )  # fmt: skip
    stored.close()
    if workers.rank == 0:
        tell(
            f"{folder}: {metadata.architecture.family}, {len({job.key for job in copy.jobs})} tensors, vocabulary "
            f"{metadata.architecture.vocab_size} padded to {padded}{', hashes verified' if args.verify else ''}",
            sys.stdout,
        )


if __name__ == "__main__":
    sys.exit(common.run(convert))
