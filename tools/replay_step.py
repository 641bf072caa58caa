"""Compute a step of a run again from what the run has saved, and compare it with what the run logged.

    torchrun --nproc-per-node N tools/replay_step.py RUN_DIR STEP

N is the number of ranks that the run had.  The checkpoint of STEP - 1 has the state before the step (for step 1 without
one, the weights that the run started from).  The rollouts are those that the checkpoint holds, or the embedded engine
writes them again: with the same weights and random numbers it writes the same.  Prints loss, gradient norm and a digest
of the gradient's bits of every update.  Nothing is written into the run.

A rank exits with 0 if loss and gradient norm are those of metrics.jsonl, or the run logged no such step; 1 if not; 2 if
the step cannot be computed from what there is.  A run on one rank needs no torchrun.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.checkpoints.directory import iterations  # noqa: E402
from megatron_tropd.cli import ConfigError, parse  # noqa: E402
from megatron_tropd.config import TrainConfig  # noqa: E402
from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from megatron_tropd.parallel.job_end import explains_itself  # noqa: E402
from megatron_tropd.parallel.print_once import Importance, print_once  # noqa: E402
from megatron_tropd.reporting.records import of_kind, read_records  # noqa: E402

if TYPE_CHECKING:
    from megatron_tropd.setup.run_spec import RunSpec
    from megatron_tropd.training.replay import Replay

BAD_INPUT = 2


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    p = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, metavar="RUN_DIR", help="directory of the run, with its config.yaml")
    p.add_argument("step", type=int, metavar="STEP", help="number of the step in metrics.jsonl; the first is 1")
    p.add_argument("--load", type=Path, help="directory of its checkpoints (default: where config.yaml has them)")
    p.add_argument(
        "--rtol", type=float, default=0.0, help="largest relative difference that counts as equal (default: 0)"
    )
    return p


def config_of_replay(run: Path, step: int, load: Path | None) -> TrainConfig:
    """Return the run's configuration, with which nothing is written, and which goes on from the state before ``step``.

    Raises:
        ConfigError: the run has no such state, or its configuration cannot be read.
    """
    config = parse(["--config", str(run / "config.yaml")])
    saved = load or (Path(config.checkpoint.save) if config.checkpoint.save else run / "checkpoints")
    there = iterations(str(saved)) if saved.is_dir() else []
    if not 1 <= step <= config.training.train_iters:
        raise ConfigError([f"STEP {step}: the run has the steps 1 to {config.training.train_iters}"])
    if step > 1 and step - 1 not in there:
        known = (
            ", ".join(str(number + 1) for number in there if number < config.training.train_iters) or "no step but 1"
        )
        raise ConfigError(
            [f"STEP {step} needs the checkpoint of step {step - 1}, and {saved} does not have it; with what is there "
             f"can be computed: {known}"]
        )  # fmt: skip
    if any(own.teacher.teacher_placement == "dedicated" for own in config.by_teacher.values()):
        raise ConfigError([f"{run}: a step with --teacher-placement dedicated cannot be computed here"])
    begins_with = step - 1 if step - 1 in there else None
    checkpoint = replace(
        config.checkpoint, save="", load="" if begins_with is None else str(saved), load_step=begins_with,
        fallback_previous=False, exit_on_missing_checkpoint=False, allow_changed_run=False, async_save=False,
    )  # fmt: skip
    nowhere = str(Path(tempfile.gettempdir()) / "tropd-replay")  # never made: nothing is written
    return replace(
        config, checkpoint=checkpoint,
        logging=replace(config.logging, run_dir=nowhere, tensorboard_dir="", wandb_project=""),
        rollout=replace(config.rollout, keep_unfinished_rollouts=False),
        evaluation=replace(config.evaluation, eval_data=[], eval_interval=0),
        engine=replace(config.engine, rollout_engine="embedded"),  # servers do not write the same again
    )  # fmt: skip


def replay(spec: RunSpec, step: int, *, engine: str) -> Replay:
    """Compute the step.  Collective over the world.

    Args:
        spec: of :func:`config_of_replay`.
        step: from 1.
        engine: which wrote the run's rollouts.

    Raises:
        ValueError: on every rank: the step cannot be computed from what was saved.
    """
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.training.replay import replay_step

    assembled = assemble(spec, writes=False)
    run = assembled.run
    try:
        if engine != "embedded" and run.objective.needs.rollouts and run.stream.pending is None:
            raise ConfigError(
                [f"--rollout-engine {engine}: its servers do not write the same rollouts again, and the checkpoint of "
                 f"step {step - 1} holds none (a run that was stopped in a step saves them)"]
            )  # fmt: skip
        return replay_step(run, step - 1)
    finally:
        close(assembled)


def compare(run: Path, step: int, replayed: Replay, rtol: float) -> tuple[str, bool]:
    """Return the text to print, and whether nothing differs from what the run logged."""
    records = [one for one in of_kind(read_records(run / "metrics.jsonl"), "step") if one["step"] == step]
    source = "of the checkpoint" if replayed.from_checkpoint else "written again, or of the data"
    lines, same = [f"step {step} of {run}, rollouts {source}"], True
    for name in ("loss", "grad_norm"):
        value, note = getattr(replayed, name), "not logged"
        if records:
            logged = float(records[-1][name])
            equal = value == logged or (math.isnan(value) and math.isnan(logged))
            equal = equal or abs(value - logged) <= rtol * abs(logged)
            same, note = same and equal, f"{'equals' if equal else 'DIFFERS from'} the run's {logged!r}"
        lines.append(f"  {name} {value!r}: {note}")
    for number, (update, digest) in enumerate(zip(replayed.updates, replayed.digests, strict=True), 1):
        lines.append(f"  update {number}: loss {update.loss!r}, gradient norm {update.grad_norm!r}, gradient {digest}")
    return "\n".join(lines), same


def _replay(args: argparse.Namespace) -> int:
    config = config_of_replay(args.run, args.step, args.load)
    engine = parse(["--config", str(args.run / "config.yaml")]).engine.rollout_engine

    from megatron_tropd.parallel import determinism, platform

    platform.install()  # before the first import of Megatron
    if config.model.deterministic_mode:
        determinism.make_deterministic()
    from megatron_tropd.parallel.groups import init_distributed, shutdown
    from megatron_tropd.parallel.roles import job_of_environment
    from megatron_tropd.setup.run_spec import make_run_spec

    spec = make_run_spec(config, int(os.environ.get("WORLD_SIZE", "1")))
    job = job_of_environment(spec.roles)
    init_distributed(spec.config.parallel.distributed_timeout_s, job)
    text, same = compare(args.run, args.step, replay(spec, args.step, engine=engine), args.rtol)
    print_once(text, Importance.CAUSE, sys.stdout)
    shutdown()
    return 0 if same else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if the step is what the run logged, 1 if not, 2 if it cannot be computed."""
    args = parser().parse_args(argv)
    try:
        return _replay(args)
    except (ValueError, OSError, RuntimeError) as error:
        if not explains_itself(error):
            raise
        print_once(str(error), Importance.CAUSE)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
