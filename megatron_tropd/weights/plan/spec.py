"""A plan's inputs as JSON, so that another process can build the same plan instead of receiving it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache

from megatron_tropd.json_files import as_dataclass, parse_json_object
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout
from megatron_tropd.weights.plan.planner import build_plan
from megatron_tropd.weights.plan.types import DEFAULT_BUCKET_BYTES, Placement, WeightPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """Arguments of :func:`build_plan`."""

    arch: Architecture
    layout: ParallelLayout
    engines: tuple[EngineLayout, ...]
    dtype: str
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    source_placements: tuple[Placement, ...] | None = None
    engine_placements: tuple[tuple[Placement, ...], ...] | None = None

    def build(self) -> WeightPlan:
        """Build the plan; it is equal for equal specs, in any process.

        Raises:
            PlanError, ValueError: as :func:`build_plan`.
        """
        return _build(self)

    def to_json(self) -> str:
        """Return the spec as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PlanSpec:
        """Read a spec from the text of :meth:`to_json`.

        Raises:
            ValueError: not the text of a spec of this version.
        """
        try:
            return as_dataclass(cls, parse_json_object(text, "the text"), "the plan")
        except ValueError as error:
            raise ValueError(f"not the inputs of a weight plan: {error}") from error


@lru_cache(maxsize=1)
def _build(spec: PlanSpec) -> WeightPlan:
    """Build a plan and cache the last one: a connection needs it several times, and a large plan takes seconds."""
    return build_plan(
        spec.arch, spec.layout, spec.engines, dtype=spec.dtype, bucket_bytes=spec.bucket_bytes,
        source_placements=spec.source_placements, engine_placements=spec.engine_placements,
    )  # fmt: skip
