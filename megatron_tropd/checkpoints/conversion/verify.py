"""Read written files again and compare their digests with those of the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_tropd.checkpoints.conversion.reading import check_stored, hf_digests, open_tensors
from megatron_tropd.checkpoints.conversion.workers import Workers, merge
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.parallel.fail_together import from_all_ranks, on_all_ranks
from megatron_tropd.weights.coordinates.checkpoint_boxes import StoredParam
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
from megatron_tropd.weights.files.hf_writer import HfWriter


def verify_stored(
    folder: Path, params: Sequence[StoredParam], source: HfCheckpoint, digests: Mapping[str, str], buffer_bytes: int,
    workers: Workers,
) -> None:  # fmt: skip
    """Read a written checkpoint again and compare every HF tensor with the digest of its source.  Collective.

    Raises:
        CheckpointError: on every process; names the tensors that differ.
    """
    stored = open_tensors(folder)
    try:
        on_all_ranks(lambda: check_stored(stored, params), CheckpointError)
        dtypes = {name: info.dtype for name, info in source.tensors.items()}
        found = hf_digests(stored, params, dtypes, buffer_bytes, workers)
    finally:
        stored.close()
    compare(found, digests, str(folder))


def verify_hf(writer: HfWriter, digests: Mapping[str, str], workers: Workers) -> None:
    """Read HF files again before they are published, and compare every tensor with ``digests``.  Collective.

    Raises:
        CheckpointError: on every process; names the tensors that differ.
    """

    def work() -> dict[str, str]:
        names = workers.mine([(name, info.nbytes) for name, info in sorted(writer.manifest.tensors.items())])
        return {name: writer.written_sha256(name) for name in names}

    compare(merge(from_all_ranks(work, CheckpointError)), digests, str(writer.directory))


def compare(found: Mapping[str, str], wanted: Mapping[str, str], where: str) -> None:
    """Raise CheckpointError, with the first few names, unless ``found`` digests are the ``wanted`` ones."""
    differing = sorted(name for name, digest in found.items() if wanted.get(name) != digest)
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointError(f"{where} was not written right: {', '.join(differing[:5])}{more} came back differently")
