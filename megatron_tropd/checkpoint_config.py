"""Settings of saving, of stopping and of going on."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.config_fields import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When a run saves, which checkpoints it keeps, when it stops, and what it goes on from."""

    save: str = setting("", "checkpoint directory; default RUN_DIR/checkpoints")
    load: str = setting("", "directory to resume from; default --save")
    save_interval: int = setting(20, "steps between checkpoints; 0: only after the last step, which is always saved")
    keep_last: int = setting(
        0, "keep this many newest checkpoints and delete others; 0: delete none, or all but one with the next flag"
    )
    save_retain_interval: int = setting(
        0, "keep the checkpoints of every multiple of this many steps for good, and delete others but the newest"
    )
    emergency_save: str = setting(
        "", "where to save when --save cannot be written because its disk is full, broken or read-only; default nowhere"
    )
    async_save: bool = setting(False, "write checkpoints while training goes on")
    exit_interval: int = setting(0, "save and exit after every step that it divides; 0: never")
    exit_duration_in_mins: int = setting(
        0, "save and exit when the run has taken this many minutes since its launch; 0: never"
    )
    grace_period: float = setting(
        25.0, "seconds in which a run must have saved after a signal; torchrun kills after its --shutdown-timeout (30)"
    )
    fallback_previous: bool = setting(
        False, "where the newest checkpoint is damaged, resume from the newest earlier one that is whole"
    )
    exit_on_missing_checkpoint: bool = setting(False, "fail when --load has no checkpoint instead of starting fresh")
    allow_changed_run: bool = setting(
        False, "resume with another method, data, models or seed than the checkpoint's run had"
    )
    load_step: int | None = None
    """No flag: the checkpoint of --load to go on from, instead of its newest (``tools/replay_step.py``)."""
