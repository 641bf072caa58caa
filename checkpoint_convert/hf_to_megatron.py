"""Convert Hugging Face weights to a Megatron checkpoint.

    python -m checkpoint_convert.hf_to_megatron --hf-checkpoint HF_DIR --save DIR
    torchrun --nproc-per-node 8 -m checkpoint_convert.hf_to_megatron ...

Writes ``DIR/release/`` and a tracker that names it.  The checkpoint loads into any TP x PP x EP.  Any number
of processes share the work.  Each of them holds at most a few buffers, whatever the model's size.
HF_DIR may be the name of a model of the Hugging Face Hub, owner/name or owner/name@revision.
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

from megatron_tropd.checkpoints.conversion.hf_to_torch_dist import hf_to_torch_dist  # noqa: E402
from megatron_tropd.checkpoints.conversion.logits import check_logits  # noqa: E402
from megatron_tropd.checkpoints.conversion.verify import verify_stored  # noqa: E402
from megatron_tropd.checkpoints.conversion.workers import Workers  # noqa: E402
from megatron_tropd.checkpoints.conversion.writing import write_plain_files  # noqa: E402
from megatron_tropd.checkpoints.directory import RELEASE  # noqa: E402
from megatron_tropd.checkpoints.known_logprobs import KNOWN_LOGPROBS_JSON  # noqa: E402
from megatron_tropd.checkpoints.metadata import CheckpointError, FileRecord  # noqa: E402
from megatron_tropd.checkpoints.save import add_text, write_checkpoint, write_hf_folder  # noqa: E402
from megatron_tropd.hub import MODEL_FILES, resolve  # noqa: E402
from megatron_tropd.parallel.fail_together import on_all_ranks, on_rank_zero  # noqa: E402
from megatron_tropd.parallel.groups import init_distributed  # noqa: E402
from megatron_tropd.parallel.layout import ParallelLayout  # noqa: E402
from megatron_tropd.standard_streams import tell  # noqa: E402
from megatron_tropd.weights.coordinates.checkpoint_boxes import StoredParam, stored_params  # noqa: E402
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint  # noqa: E402
from megatron_tropd.weights.files.hf_manifest import HfManifest  # noqa: E402
from megatron_tropd.weights.files.other_tensors import IGNORE_FLAG  # noqa: E402


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = common.Parser(
        prog="hf_to_megatron", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hf-checkpoint", required=True, metavar="DIR", help="safetensors, config.json; or a name of the Hub"
    )
    common.add_save_flags(parser)
    common.add_layout_flags(parser)
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="padding of the vocabulary (128)"
    )
    parser.add_argument(
        IGNORE_FLAG, action="store_true",
        help="leave aside tensors of parts beside the decoder: a vision tower, multi-token prediction",
    )  # fmt: skip
    common.add_stream_flags(parser)
    common.add_logits_flag(parser)
    return parser.parse_args(argv)


def _check(args: argparse.Namespace, directory: Path, workers: Workers) -> tuple[HfCheckpoint, tuple[StoredParam, ...]]:
    """Check the flags and open the source, before anything is written; return the source and the parameters."""
    divisor = args.make_vocab_size_divisible_by
    if divisor < 1:
        raise ValueError(f"--make-vocab-size-divisible-by {divisor} must be at least 1")
    common.buffer_bytes(args)
    common.check_logits_flag(args, workers.count)
    source = HfCheckpoint.open(directory, ignore_extra=args.ignore_extra_tensors)
    common.check_layout(args, source.arch)
    common.check_output(args.save, overwrite=args.overwrite, sources=[directory])
    return source, common.target_params(args, source.arch, divisor)


def convert(argv: Sequence[str] | None = None) -> None:
    """Run the command.  Collective where torchrun started several processes."""
    args = parse(argv)
    # Before the process group: a download may take longer than a collective may.
    model = resolve(args.hf_checkpoint, repo_type="model", allow_patterns=MODEL_FILES, flag="--hf-checkpoint")
    init_distributed()
    workers = Workers.of_job()
    common.check_same_source(model)
    source, params = on_all_ranks(lambda: _check(args, model.path, workers), ValueError)
    dtype, padded = source.widest_dtype, max(p.shape[0] for p in params if not p.of)
    digests: dict[str, str] = {}

    def write(folder: Path) -> dict[str, FileRecord]:
        records, found = hf_to_torch_dist(source, folder, params, dtype, common.buffer_bytes(args), workers)
        digests.update(found)
        on_rank_zero(lambda: write_plain_files(folder), CheckpointError)
        if args.verify:
            # The check uses a new map of the parameters, not the one with which the checkpoint was written.
            uncut = stored_params(source.arch, ParallelLayout(make_vocab_size_divisible_by=padded))
            verify_stored(folder, uncut, source, digests, common.buffer_bytes(args), workers)
        return records

    def write_hf(target: Path) -> None:
        write_hf_folder(model.path, HfManifest.of(source, sha256=digests, padded_vocab_size=padded), target)

    folder = write_checkpoint(
        args.save, RELEASE, write, write_hf,
        arch=source.arch, make_vocab_size_divisible_by=args.make_vocab_size_divisible_by, source=model.source,
    )  # fmt: skip
    if args.verify_logits:
        check = check_logits(model.path, args.save, RELEASE)
        add_text(folder, KNOWN_LOGPROBS_JSON, check.known.to_json())
        tell(check.text, sys.stdout)
    if workers.rank == 0:
        tell(
            f"{folder}: {source.arch.family}, {len(source.tensors)} tensors, {common.dtype_name(dtype)}, "
            f"vocabulary {source.arch.vocab_size} padded to {padded}"
            + (f", {len(digests)} hashes verified" if args.verify else "")
            + (f", from {model.source}" if model.source else ""),
            sys.stdout,
        )
        for line in common.notes(source.arch, source.left_aside):
            tell(line, sys.stdout)


if __name__ == "__main__":
    sys.exit(common.run(convert))
