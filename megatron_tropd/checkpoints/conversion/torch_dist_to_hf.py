"""Convert a torch_dist checkpoint to HF files."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tropd.checkpoints.conversion.reading import hf_tensors, sha256_of
from megatron_tropd.checkpoints.conversion.workers import Workers, merge
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.parallel.fail_together import from_all_ranks
from megatron_tropd.weights.coordinates.checkpoint_boxes import StoredParam
from megatron_tropd.weights.files.hf_writer import HfWriter
from megatron_tropd.weights.files.torch_dist import TorchDistReader


def torch_dist_to_hf(
    stored: TorchDistReader, params: Sequence[StoredParam], writer: HfWriter, buffer_bytes: int, workers: Workers,
    *, verify: bool,
) -> dict[str, str]:  # fmt: skip
    """Fill the files of ``writer`` (made by :meth:`HfWriter.create`) from a checkpoint.  Collective.

    Args:
        stored: Reader of the checkpoint.
        params: All parameters of its model.
        writer: Every process has its own, for the same directory.
        buffer_bytes: Size limit of a band.
        workers: The processes that share the work.
        verify: Compare every tensor with its sha256 in the writer's manifest, where there is one.

    Returns:
        sha256 of the bytes written, by HF tensor.

    Raises:
        CheckpointError: on every process, if any process failed.
    """

    def work() -> dict[str, str]:
        found: dict[str, str] = {}
        for name, bands in hf_tensors(stored, params, buffer_bytes, workers):
            digest = sha256_of(writer.write_rows(name, row, band) for row, band in bands)
            if verify:
                writer.check_digest(name, digest)
            found.update(dict.fromkeys(writer.names(name), digest))
        return found

    return merge(from_all_ranks(work, CheckpointError))
