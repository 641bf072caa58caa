"""The curves of a run: one function for each figure, each from parsed records (``records.py``).

A function returns None where the records hold nothing to draw.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_tropd.reporting.metric_names import PHASES
from megatron_tropd.reporting.records import Record, of_kind, step_scalars
from megatron_tropd.reporting.report import figure_style as style
from megatron_tropd.reporting.report.figure_style import Series

Records = Sequence[Record]

# Without sky: blue and sky would touch in the stack of a step, and look alike on a dark page.
_PHASE_COLOURS = (style.BLUE, style.RED, style.GREEN, style.PINK, style.ORANGE, style.YELLOW)


def series(records: Records, name: str) -> Series:
    """Steps and values of one metric; a value that is not finite leaves a gap."""
    steps, values = [], []
    for record in of_kind(records, "step"):
        value = step_scalars(record).get(name)
        if value is not None:
            steps.append(record["step"])
            values.append(value if math.isfinite(value) else math.nan)
    return steps, values


def accuracy(records: Records) -> Figure | None:
    """Held-out accuracy for each way of decoding, with its standard error over prompts."""
    evaluations = of_kind(records, "eval")
    if not evaluations:
        return None
    figure, axes = style.new_figure()
    for index, decoding in enumerate(dict.fromkeys(record["decoding"] for record in evaluations)):
        points = [record for record in evaluations if record["decoding"] == decoding]
        steps = [record["step"] for record in points]
        values = [record["accuracy"] for record in points]
        style.draw(axes, (steps, values), decoding, index)
        errors = [standard_error(record) for record in points]
        low = [value - error for value, error in zip(values, errors, strict=True)]
        high = [value + error for value, error in zip(values, errors, strict=True)]
        axes.fill_between(steps, low, high, color=style.PALETTE[index % len(style.PALETTE)], alpha=0.15, linewidth=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    style.finish(axes, "Accuracy on held-out prompts (band: one standard error)", "accuracy")
    return figure


def standard_error(record: Record) -> float:
    """Standard error of an accuracy over prompts; of a record of version 0.2, that of a share of independent trials."""
    if "std_error" in record:
        return float(record["std_error"])
    share, count = record["accuracy"], record["num_prompts"]
    return math.sqrt(max(share * (1 - share), 0.0) / count) if count else math.nan


def loss(records: Records) -> Figure | None:
    """Training loss.  It is not a measure of quality: its terms change with what the gate trusts."""
    return _lines(records, {"train/loss": "loss"}, "Training loss", "nats per token")


def trust(records: Records) -> Figure | None:
    """Share of on-policy tokens in the trust region, and of guidance in the responses."""
    names = {"tropd/trusted_frac": "trusted, of on-policy tokens", "guidance/frac": "guidance, of response tokens"}
    return _lines(records, names, "Trust region and guidance", "share of tokens", percent=True)


def grad_norm(records: Records) -> Figure | None:
    """Gradient norm before clipping; a cross below marks a step that moved no weight."""
    found = series(records, "train/grad_norm")
    if not found[0]:
        return None
    figure, axes = style.new_figure()
    style.draw(axes, found, "gradient norm")
    finite = [value for value in found[1] if value > 0]
    if finite and max(finite) > 100 * min(finite):
        axes.set_yscale("log")
    skipped = [record["step"] for record in of_kind(records, "step") if record["verdict"] == "skipped"]
    if skipped:
        # At the foot of the axes: the norm of a skipped step is often not a number.
        foot = [0.03] * len(skipped)
        place = axes.get_xaxis_transform()
        axes.plot(skipped, foot, "x", transform=place, color=style.RED, markersize=7, label="skipped step")
    style.finish(axes, "Gradient norm before clipping", "L2 norm")
    return figure


def entropy(records: Records) -> Figure | None:
    """Entropy of both models; the student's falls to nothing, or rises without end, when training goes wrong."""
    names = {"student/entropy": "student", "teacher/entropy": "teacher, at the student's tokens"}
    return _lines(records, names, "Entropy", "nats per token")


def response_length(records: Records) -> Figure | None:
    """Length of the responses, guidance included; it shows rambling and collapse before the accuracy does."""
    return _lines(records, {"rollout/len_mean": "length"}, "Response length", "tokens")


def parity(records: Records) -> Figure | None:
    """Log-probability of the sampled token, rollout engine against trainer."""
    names = {"parity/logprob_abs_diff_mean": "mean", "parity/logprob_abs_diff_max": "largest"}
    return _lines(records, names, "Difference of log p, rollout engine and trainer", "nats", log=True)


def step_time(records: Records) -> Figure | None:
    """Wall seconds of a step, stacked by phase; long runs are averaged over groups of steps."""
    steps = [record for record in of_kind(records, "step") if record["seconds"]]
    if not steps:
        return None
    phases = ordered_phases(steps)
    groups = _groups(steps, 60)
    figure, axes = style.new_figure()
    foot = [0.0] * len(groups)
    places = [(group[0]["step"] + group[-1]["step"]) / 2 for group in groups]
    width = 0.9 * len(groups[0])
    for index, phase in enumerate(phases):
        heights = [sum(record["seconds"].get(phase, 0.0) for record in group) / len(group) for group in groups]
        colour = _PHASE_COLOURS[index % len(_PHASE_COLOURS)]
        axes.bar(places, heights, width, bottom=foot, label=phase, color=colour, linewidth=0)
        foot = [low + height for low, height in zip(foot, heights, strict=True)]
    style.finish(axes, "Wall time of a step by phase", "seconds", legend=False)
    style.add_legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
    return figure


def overlap(records: Records) -> Figure | None:
    """How much of the time a dedicated teacher scores and the engines have nothing to write."""
    names = {"teacher/busy_frac": "teacher busy", "engine/idle_frac": "engines idle"}
    return _lines(records, names, "Teacher and engines", "share of the time", percent=True)


def teacher_wait(records: Records) -> Figure | None:
    """Seconds of a step that the trainer waited for the scores of a teacher elsewhere."""
    return _lines(records, {"teacher/wait_s": "wait"}, "Wait for the teacher's scores", "seconds")


def rewards_by_teacher(records: Records) -> Figure | None:
    """Mean reward that each of several teachers gave to what the student wrote."""
    metrics = {name for record in of_kind(records, "step") for name in record["metrics"]}
    found = sorted(name for name in metrics if re.fullmatch(r"teacher/[^/]+/reward_mean", name))
    return _lines(records, {name: name.split("/")[1] for name in found}, "Mean reward by teacher", "nats per token")


def ordered_phases(steps: Iterable[Record]) -> list[str]:
    """The phases that occur, in the order of a step, unknown ones last."""
    seen = dict.fromkeys(phase for record in steps for phase in record["seconds"])
    return [phase for phase in PHASES if phase in seen] + [phase for phase in seen if phase not in PHASES]


FIGURES: dict[str, Callable[[Records], Figure | None]] = {
    "accuracy": accuracy,
    "loss": loss,
    "trust": trust,
    "grad_norm": grad_norm,
    "entropy": entropy,
    "response_length": response_length,
    "parity": parity,
    "step_time": step_time,
    "overlap": overlap,
    "teacher_wait": teacher_wait,
    "rewards_by_teacher": rewards_by_teacher,
}


def make_plots(records: Records, directory: Path) -> list[Path]:
    """Write every figure that has data, as SVG and PNG; returns the paths that were written."""
    paths: list[Path] = []
    for name, make in FIGURES.items():
        figure = make(records)
        if figure is not None:
            paths += style.save(figure, directory, name)
    return paths


def _lines(
    records: Records, names: dict[str, str], title: str, ylabel: str, *, percent: bool = False, log: bool = False
) -> Figure | None:
    found = {label: series(records, name) for name, label in names.items()}
    found = {label: values for label, values in found.items() if values[0]}
    if not found:
        return None
    figure, axes = style.new_figure()
    for index, (label, values) in enumerate(found.items()):
        style.draw(axes, values, label, index)
    if percent:
        _percent_axis(axes)
    if log and any(value > 0 for values in found.values() for value in values[1]):
        axes.set_yscale("log")
    style.finish(axes, title, ylabel, legend=len(found) > 1)
    return figure


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _groups(steps: list[Record], most: int) -> list[list[Record]]:
    size = math.ceil(len(steps) / most)
    return [steps[start : start + size] for start in range(0, len(steps), size)]
