"""Trust Region On-Policy Distillation (TrOPD, arXiv 2606.01249) as an extension of Megatron-core.

To train, run the command ``torchrun ... -m megatron_tropd.train``.  The names below are the library for a training
script of your own: the vocabulary-parallel head, the objectives and the gate.

    import megatron_tropd as tropd

    objective = tropd.make_objective("tropd", tropd.ObjectiveSettings(top_k=64))
    out = tropd.head_loss(hidden, table, tokens, shard, objective, tropd.StepContext(), sequence_parallel=False)
    (out.loss / out.denominator).backward()

``docs/library.md`` describes each name and says what is stable; ``examples/own_training_script.py`` can be run.

Names are imported at their first use, so that ``import megatron_tropd`` needs neither torch nor Megatron: SGLang's
servers import ``megatron_tropd.weights.engine_loader``, and weight plans can be made without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_tropd.data.streams import blank_streams
    from megatron_tropd.objectives.base import Objective
    from megatron_tropd.objectives.gates import Gate, expected_acceptance
    from megatron_tropd.objectives.methods import make_objective
    from megatron_tropd.objectives.settings import ObjectiveSettings
    from megatron_tropd.ops.vocab_parallel import HeadOutput, HeadSettings, VocabShard, head_loss, teacher_scores
    from megatron_tropd.rng import Stream, key, uniform
    from megatron_tropd.types import LossOutput, Needs, Region, StepContext, TokenStats, TokenStreams

__all__ = [
    "Gate", "HeadOutput", "HeadSettings", "LossOutput", "Needs", "Objective", "ObjectiveSettings", "Region",
    "StepContext", "Stream", "TokenStats", "TokenStreams", "VocabShard", "blank_streams", "expected_acceptance",
    "head_loss", "key", "make_objective", "teacher_scores", "uniform",
]  # fmt: skip

_HOMES = {
    "data.streams": ("blank_streams",),
    "objectives.base": ("Objective",),
    "objectives.gates": ("Gate", "expected_acceptance"),
    "objectives.methods": ("make_objective",),
    "objectives.settings": ("ObjectiveSettings",),
    "ops.vocab_parallel": ("HeadOutput", "HeadSettings", "VocabShard", "head_loss", "teacher_scores"),
    "rng": ("Stream", "key", "uniform"),
    "types": ("LossOutput", "Needs", "Region", "StepContext", "TokenStats", "TokenStreams"),
}


def __getattr__(name: str) -> Any:
    """Import a name of the library, or the version, at its first use."""
    if name == "__version__":
        from importlib.metadata import version

        return version("megatron-tropd")
    for home, names in _HOMES.items():
        if name in names:
            if home.startswith("ops."):  # the head imports Megatron, which calls torch.cuda when it is imported
                importlib.import_module("megatron_tropd.parallel.platform").install()
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the library's names and those already in the module."""
    return sorted([*globals(), *__all__])
