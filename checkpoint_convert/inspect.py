"""Print what a Hugging Face or Megatron checkpoint directory holds:  python -m checkpoint_convert.inspect DIR"""

import os
import sys

if __name__ == "__main__" and not __package__:  # run as a file: this folder's inspect.py must not hide Python's
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from checkpoint_convert import common
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.standard_streams import print_result

SHOWN = 12


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = common.Parser(prog="inspect", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--iteration", metavar="N", help="a number or 'release'; default: what the tracker names")
    parser.add_argument("--all", action="store_true", help=f"list every tensor, not only the first {SHOWN}")
    return parser.parse_args(argv)


def _model_lines(arch: Architecture) -> list[str]:
    tied = "tied" if arch.tie_word_embeddings else "separate"
    return [
        f"architecture   {arch.family}, {arch.num_layers} layers of {arch.hidden_size}, ffn {arch.ffn_hidden_size}",
        f"attention      {arch.num_attention_heads} heads of {arch.head_dim}, {arch.num_query_groups} key/value heads",
        f"vocabulary     {arch.vocab_size}, {tied} output table",
    ]


def _tensors(rows: Sequence[tuple[str, str, Sequence[int], int]], *, everything: bool) -> list[str]:
    """Return the report's lines for (name, dtype, shape, bytes) rows."""
    dtypes = Counter(dtype for _, dtype, _, _ in rows)
    total = sum(nbytes for _, _, _, nbytes in rows)
    spread = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    lines = [f"tensors        {len(rows)} ({spread}), {common.gigabytes(total)}"]
    shown = rows if everything else rows[:SHOWN]
    lines += [f"  {name:<66} {dtype:<9} {list(shape)}" for name, dtype, shape, _ in shown]
    return lines + ([f"  ... {len(rows) - len(shown)} more (--all)"] if len(shown) < len(rows) else [])


def _hugging_face(directory: Path, *, everything: bool) -> list[str]:
    from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint

    checkpoint = HfCheckpoint.open(directory, ignore_extra=True)
    rows = [
        (name, common.dtype_name(info.dtype), info.shape, info.nbytes)
        for name, info in sorted(checkpoint.tensors.items())
    ]
    return [
        f"{directory}: Hugging Face, {len(checkpoint.headers)} safetensors file(s)",
        *_model_lines(checkpoint.arch),
        *common.notes(checkpoint.arch, checkpoint.left_aside),
        *_tensors(rows, everything=everything),
    ]


def _megatron(directory: Path, wanted: str | None, *, everything: bool) -> list[str]:
    common.prepare()
    from megatron_tropd.checkpoints.directory import find_checkpoint, read_metadata, stored_tensors

    iteration = common.iteration(wanted)
    metadata = read_metadata(directory, iteration)
    folder = find_checkpoint(directory, iteration)
    rows = [
        (name, common.dtype_name(dtype), tuple(shape), shape.numel() * dtype.itemsize)
        for name, (shape, dtype) in sorted(stored_tensors(directory, iteration).items())
    ]
    size = sum(record.bytes for record in metadata.files.values())
    return [
        f"{folder}: Megatron torch_dist, iteration {metadata.iteration}, {len(metadata.files)} files, "
        f"{common.gigabytes(size)}",
        *_model_lines(metadata.architecture),
        *common.notes(metadata.architecture, ()),
        *([f"source         {metadata.source}"] if metadata.source else []),
        f"padding        vocabulary to a multiple of {metadata.make_vocab_size_divisible_by}",
        *_tensors(rows, everything=everything),
    ]


def inspect(argv: Sequence[str] | None = None) -> None:
    """Print the report of a checkpoint directory."""
    args = parse(argv)
    directory: Path = args.directory
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    if (directory / "config.json").is_file():
        lines = _hugging_face(directory, everything=args.all)
    elif (directory / "latest_checkpointed_iteration.txt").is_file() or args.iteration:
        lines = _megatron(directory, args.iteration, everything=args.all)
    else:
        raise ValueError(
            f"{directory} has neither config.json (Hugging Face) nor latest_checkpointed_iteration.txt (Megatron)"
        )
    print_result("\n".join(lines))


if __name__ == "__main__":
    sys.exit(common.run(inspect))
