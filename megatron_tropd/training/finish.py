"""Write the results of a finished run: the student as an HF checkpoint, and the report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.hf_config import CONFIG_FILE
from megatron_tropd.parallel.fail_together import on_all_ranks
from megatron_tropd.reporting.report.write import write_report
from megatron_tropd.reporting.run_directory import HF_EXPORT
from megatron_tropd.training.run import Run
from megatron_tropd.training.student import params_dtype
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint, copy_sidecars
from megatron_tropd.weights.files.hf_manifest import MANIFEST_FILE, HfManifest
from megatron_tropd.weights.files.hf_writer import write_hf_files


def write_results(run: Run, arch: Architecture, hf_dir: Path) -> None:
    """Export to RUN_DIR/hf_export and write RUN_DIR/report.html; collective over the world.  A report that cannot be
    written is a warning.

    ``hf_dir`` is the Hugging Face directory that the student, of ``arch``, came from.

    Raises:
        RankFailure: on every rank, if rank 0 could not write the export or it failed on any rank.
    """
    tensors = iter(run.export())

    def take_part() -> None:
        try:
            if dist.get_rank() == 0:
                _write(run, arch, hf_dir, tensors)
        finally:
            for _ in tensors:  # the export is collective: every rank runs it to its end, even if writing failed
                pass

    on_all_ranks(take_part)


def _write(run: Run, arch: Architecture, hf_dir: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    run_dir = Path(run.config.logging.run_dir)
    manifest = _file_layout(hf_dir) or HfManifest.default(arch, params_dtype(run.config))
    (run_dir / HF_EXPORT / CONFIG_FILE).unlink(missing_ok=True)  # of an earlier export: not whole until it is back
    write_hf_files(run_dir / HF_EXPORT, manifest, arch, tensors, verify=False)
    copy_sidecars(hf_dir, run_dir / HF_EXPORT, skip=[MANIFEST_FILE])
    run.progress.message(f"student: {run_dir / HF_EXPORT}")
    try:
        run.progress.message(f"report:  {write_report(run_dir)}")
    except OSError as error:  # it is made of files that are there
        run.progress.message(
            f"warning: {error}; there is no report of this run.  Write it when there is room: "
            f"python -m megatron_tropd.reporting.report {run_dir}"
        )


def _file_layout(hf_dir: Path) -> HfManifest | None:
    """Return the file split and dtypes of the HF files that the student came from; None where there are none."""
    kept = HfManifest.load(hf_dir)
    if kept is None and any(hf_dir.glob("*.safetensors")):
        kept = HfManifest.of(HfCheckpoint.open(hf_dir))
    return kept.without_digests() if kept is not None else None
