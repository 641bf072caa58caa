"""Who sends which bytes of which parameter to whom, decided once and equal on every rank.

    shards.py       which trainer ranks hold which part of each tensor, and what of it a destination needs
    planner.py      chooses a sender for every piece and lays the pieces into buckets (``bucketing.py``)
    types.py        the plan: copies, messages, digest
    proof.py        checks a plan, copy by copy
    spec.py         a plan's inputs as JSON, so that an engine makes the same plan instead of being sent it
    placement.py    which machine and GPU every rank is on; the only module here that imports torch
    statistics.py   what a plan costs

Nothing is moved here; that is ``transport``.
"""

FRONT = {
    "bucketing": ("HEADER_BYTES",),
    "placement": ("Location", "location", "number_placements", "ranks_on_one_gpu"),
    "planner": ("build_plan",),
    "proof": ("PlanProof", "prove"),
    "spec": ("PlanSpec",),
    "statistics": ("PlanStats", "consecutive_placements", "plan_stats"),
    "types": ("STAGING_HALVES", "Copy", "Message", "WeightPlan"),
}
