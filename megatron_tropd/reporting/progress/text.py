"""Progress as text: the numbers of a step, how they are written, and the time that is left."""

from __future__ import annotations

from collections import deque

from megatron_tropd.reports import EvalReport, StepReport

_WINDOW = 20


class Eta:
    """Seconds left, from the wall time of the last steps with their checkpoints and evaluations.

    The window leaves out the first steps, which compile and warm up.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._marks: deque[float] = deque(maxlen=_WINDOW + 1)

    def start(self, now: float) -> None:
        """Record that the first step begins."""
        self._marks.append(now)

    def after(self, step: int, now: float) -> float | None:
        """Seconds left after ``step``; None where nothing was timed."""
        self._marks.append(now)
        steps = len(self._marks) - 1
        if not steps:
            return None
        return (self._marks[-1] - self._marks[0]) / steps * max(self._total_steps - step, 0)


def tokens_per_second(report: StepReport) -> float | None:
    """The reported throughput, or response tokens divided by measured seconds."""
    reported = report.metrics.get("throughput/tokens_per_second")
    seconds = sum(report.seconds.values())
    if reported is not None or not seconds:
        return reported
    return sum(report.tokens.values()) / seconds


def percent(value: float | None) -> str:
    """``95.3%``; empty for None."""
    return "" if value is None else f"{100 * value:.1f}%"


def count(value: float | None) -> str:
    """``123``, ``12.3k``, ``1.2M``; empty for None."""
    if value is None:
        return ""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            unit = {"G": 1e9, "M": 1e6, "k": 1e3}[suffix]
            return f"{value / unit:.1f}{suffix}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """``0.4s``, ``48s``, ``1m20s``, ``2h05m``, ``3d04h``; empty for None."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes < 1:
        return f"{whole}s"
    if hours < 1:
        return f"{minutes}m{whole % 60:02d}s"
    return f"{hours}h{minutes % 60:02d}m" if days < 1 else f"{days}d{hours % 24:02d}h"


def step_fields(report: StepReport) -> dict[str, str]:
    """Label and value of the numbers of a step that are shown; a number that was not measured is left out."""
    fields = {
        "loss": f"{report.loss:.4f}",
        "grad norm": f"{report.grad_norm:.3f}",
        "lr": f"{report.learning_rate:.2e}",
        "trusted": percent(report.metrics.get("tropd/trusted_frac")),
        "guidance": percent(report.metrics.get("guidance/frac")),
        "rollouts right": percent(report.metrics.get("rollout/accuracy")),
        "tokens/s": count(tokens_per_second(report)),
        "step time": duration(sum(report.seconds.values())) if report.seconds else "",
    }
    return {label: value for label, value in fields.items() if value}


def step_line(report: StepReport, total_steps: int, eta: float | None) -> str:
    """One line, in the manner of Megatron's log."""
    parts = [f"step {report.step:>{len(str(total_steps))}}/{total_steps}"]
    parts += [f"{label} {value}" for label, value in step_fields(report).items()]
    if eta is not None:
        parts.append(f"eta {duration(eta)}")
    if report.verdict == "skipped":
        parts.append("SKIPPED (no weight moved)")
    return " | ".join(parts)


def eval_line(report: EvalReport, before: float | None) -> str:
    """One line for an evaluation; +- is one standard error over prompts."""
    change = "" if before is None else f" ({100 * (report.accuracy - before):+.1f} points)"
    parts = [
        f"eval at step {report.step}",
        f"{report.decoding}: accuracy {percent(report.accuracy)} +- {100 * report.std_error:.1f}{change}",
        f"prompts {report.num_prompts}" + f" x {report.num_samples}" * (report.num_samples > 1),
        f"length {report.mean_response_len:.1f}",
        f"finished {percent(report.finished)}",
        *(f"{domain} {percent(measured.accuracy)}" for domain, measured in report.domains.items()),
    ]
    return " | ".join(parts)
