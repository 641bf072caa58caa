"""Which form the files have: by --format, or by their columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_tropd.data.reading.readers import read_span
from megatron_tropd.data.reading.rows import Row
from megatron_tropd.data.reading.spans import Span
from tools.prompt_preparation.layouts.layout import Layout
from tools.prompt_preparation.layouts.nemotron_rl import NEMOTRON_RL
from tools.prompt_preparation.layouts.nemotron_sft import NEMOTRON_SFT
from tools.prompt_preparation.layouts.openthoughts3 import OPENTHOUGHTS3
from tools.prompt_preparation.layouts.rl import RL
from tools.prompt_preparation.layouts.rows import rows_layout
from tools.prompt_preparation.settings import Settings, UsageError
from tools.prompt_preparation.sources import FoundFile

LAYOUTS = {layout.name: layout for layout in (OPENTHOUGHTS3, RL, NEMOTRON_SFT, NEMOTRON_RL)}
"""Published forms by the value of --format; ``rows`` is made from the settings."""


def choose_layout(settings: Settings, files: Sequence[FoundFile]) -> Layout:
    """Return the form of the files.  Of each file, the columns of the first row that can be read are looked at.

    Raises:
        UsageError: a file lacks the columns of the form, it could be none or several, or the files differ.
    """
    layouts = {**LAYOUTS, "rows": rows_layout(settings)}
    columns = {file.name: keys for file in files if (keys := _first_keys(file)) is not None}
    if settings.format != "auto":
        layout = layouts[settings.format]
        for name, keys in columns.items():
            if not _has(keys, layout.needs):
                raise UsageError(
                    f"--format {layout.name}: {name} has the columns {_listed(keys)}; expected "
                    f"{_wanted(layout)}{'; see --prompt-key' if layout.name == 'rows' else ''}"
                )
        return layout
    guesses = {name: _guess(name, keys, layouts) for name, keys in columns.items()}
    if not guesses:
        return layouts["rows"]  # no file has a row; reading them says so
    if len(set(guesses.values())) > 1:
        forms = ", ".join(f"{name} is {form}" for name, form in guesses.items())
        raise UsageError(f"--prompt-data names files of several forms: {forms}; prepare one form at a time")
    return layouts[next(iter(guesses.values()))]


def _first_keys(file: FoundFile) -> tuple[str, ...] | None:
    """Return the columns of a file; None where no row can be read."""
    return next((item.keys for item in read_span(Span(file=file.file), ()) if isinstance(item, Row)), None)


def _has(keys: Iterable[str], alternatives: Iterable[frozenset[str]]) -> bool:
    return any(alternative <= set(keys) for alternative in alternatives)


def _guess(name: str, keys: Sequence[str], layouts: dict[str, Layout]) -> str:
    published = [layout.name for layout in LAYOUTS.values() if _has(keys, layout.marks)]
    found = published or [form for form in ("rows",) if _has(keys, layouts[form].marks)]
    if len(found) == 1:
        return found[0]
    listed = "; ".join(f"{layout.name} has {_wanted(layout)}" for layout in layouts.values())
    what = f"could be {' or '.join(found)}" if found else "are of no known form"
    raise UsageError(
        f"{name}: the columns {_listed(keys)} {what}; say which with --format ({listed}), "
        "or name the columns with --format rows --prompt-key ..."
    )


def _wanted(layout: Layout) -> str:
    return " or ".join(" and ".join(sorted(columns)) for columns in dict.fromkeys(layout.needs))


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:20]) or "(none)"
