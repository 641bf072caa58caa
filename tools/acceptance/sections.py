"""The sections, in the order in which they run.  Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the acceptance."""

    letter: str
    title: str
    module: str
    """Import name; its ``run(report, setting)`` is called."""
    cuda_s: float
    """Deadline in seconds on a GPU."""
    cpu_s: float
    """Deadline on a CPU, where shapes are tiny."""
    product: bool = True
    """Whether the module imports the product, which the process prepares torch for."""

    def deadline(self, device: str) -> float:
        """Return the deadline on a device."""
        return self.cuda_s if device == "cuda" else self.cpu_s


def _section(letter: str, module: str, title: str, cuda_s: float, cpu_s: float = 240.0) -> Section:
    return Section(
        letter=letter, title=title, module=f"tools.acceptance.{module}", cuda_s=cuda_s, cpu_s=cpu_s
    )  # fmt: skip


SECTIONS = (
    _section("a", "head_numbers", "head and kernels against float64", 80),
    _section("b", "head_speed", "head: time, memory, profile of a chunk", 110),
    _section("c", "attention", "packed attention", 45),
    _section("d", "training_step", "one whole step, twice, and resumed", 170),
    _section("e", "generation", "embedded generation", 50),
    _section("f", "weight_push", "planned push between two processes", 75),
    _section("g", "two_ranks", "two ranks on one device", 90),
    _section("h", "offload", "teacher in host memory", 75),
    _section("i", "sglang_server", "SGLang", 150),
)
