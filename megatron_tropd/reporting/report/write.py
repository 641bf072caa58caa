"""``report.html``: one file that shows a run, made from the files of its directory alone.

Usage:
    python -m megatron_tropd.reporting.report RUN_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_tropd.atomic_files import write_text
from megatron_tropd.flag_parser import FlagParser
from megatron_tropd.reporting.records import read_records
from megatron_tropd.reporting.report import sections
from megatron_tropd.reporting.report.page import image, page, section
from megatron_tropd.reporting.report.plots import FIGURES, make_plots
from megatron_tropd.reporting.report.viewer import viewer
from megatron_tropd.standard_streams import OutputError, open_closed, print_result


def write_report(run_dir: Path) -> Path:
    """Draw the curves again and write ``report.html``; returns its path."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"run directory {run_dir} does not exist")
    records = read_records(run_dir / "metrics.jsonl")
    plots = make_plots(records, run_dir / "plots")
    config_text = _read(run_dir / "config.yaml")
    environment = json.loads(_read(run_dir / "env.json") or "{}")
    name = run_dir.resolve().name
    rollouts = viewer(run_dir / "rollouts")
    body = (
        sections.headline(name, records, environment),
        sections.result(records),
        _curves(plots),
        rollouts.html,
        sections.configuration(_mapping(config_text), config_text, environment),
        sections.timing(records),
        sections.metrics(records),
        sections.environment_section(environment),
    )
    path = run_dir / "report.html"
    write_text(path, page(f"{name} - megatron_tropd", body, rollouts.script))
    return path


def _curves(plots: list[Path]) -> str:
    figures = []
    for path in plots:
        if path.suffix == ".svg":
            description = (FIGURES[path.stem].__doc__ or path.stem).split("\n")[0]
            figures.append(image(path, description))
    return section("Curves", f'<div class="figures">{"".join(figures)}</div>' if figures else "")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _mapping(config_text: str) -> dict[str, Any]:
    loaded = yaml.safe_load(config_text) if config_text else None
    return loaded if isinstance(loaded, dict) else {}


def main() -> None:
    """Run the command line."""
    open_closed()
    parser = FlagParser(description="Write report.html of a run directory again.")
    parser.add_argument("run_dir", type=Path)
    run_dir = parser.parse_args().run_dir
    try:
        print_result(str(write_report(run_dir)))
    except OutputError as error:  # the report is written
        sys.exit(error.exit_code)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
