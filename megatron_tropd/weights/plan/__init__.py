"""Weight plans: which rank sends which bytes of which parameter to which rank, decided once, equal on every rank.

    shards.py       which trainer ranks hold which part of each tensor, and which part of it a destination needs
    planner.py      chooses a sender for every piece and puts the pieces into buckets (``bucketing.py``)
    types.py        the plan: copies, messages, digest
    proof.py        checks a plan, copy by copy
    spec.py         a plan's inputs as JSON, so that an engine builds the same plan instead of receiving it
    placement.py    which machine and GPU every rank is on; the only module here that imports torch
    statistics.py   the cost of a plan: bytes, balance, locality

Nothing is moved here; ``transport`` carries out a plan.
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
