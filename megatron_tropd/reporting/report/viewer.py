"""The viewer of sampled rollouts: their texts by region and gate, and what the loss read at each token.

The page holds the samples as JSON; ``viewer.js`` shows one of them at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_tropd.reporting.report.page import clean, section, text
from megatron_tropd.reporting.rollout_samples import RolloutSample, read_samples
from megatron_tropd.reporting.run_directory import step_of

PAGE_BYTES = 4_000_000
"""Most bytes of samples in a page; a response of 8192 tokens has at most about 1.3 million."""
STEPS_SHOWN = 12
LONGEST_TEXT = 20_000
"""Characters of a prompt, and of a text without numbers."""

_BODY = """<p class="small soft">{note}</p>
<noscript><p>The viewer needs JavaScript; the same samples are in rollouts/*.jsonl of the run directory.</p></noscript>
<div id="viewer" hidden>
<p><label>Step <select id="pick-step"></select></label> <label>Rollout <select id="pick-sample"></select></label></p>
<p id="summary" class="small"></p><p id="legend" class="small"></p>
<div class="reader"><div id="response" class="rollout text" role="group" aria-label="prompt and response"></div>
<div id="panel" class="rollout small" role="status"></div></div></div>
<script type="application/json" id="rollout-data">{data}</script>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewer:
    """The section of the page and the script that brings it to life; both empty without samples."""

    html: str
    script: str


def viewer(directory: Path) -> Viewer:
    """The viewer of the samples in a run's ``rollouts/``: of at most ``STEPS_SHOWN`` steps, as many as ``PAGE_BYTES``
    hold."""
    paths = sorted(directory.glob("step_*.jsonl"))
    chosen = _spread(paths)
    encoded = {step_of(path): [_encode(_shown(sample)) for sample in read_samples(path)] for path in chosen}
    kept = _that_fit(encoded)
    if not kept:
        return Viewer(html="", script="")
    steps = ",".join(f'{{"step":{step},"samples":[{",".join(kept[step])}]}}' for step in sorted(kept))
    note = (
        f"{sum(map(len, kept.values()))} rollouts of {len(kept)} of the {len(paths)} steps that have samples; all are "
        f"in rollouts/ of the run directory. The link to a token is like #step={min(kept)}&sample=0&token=5."
    )
    body = _BODY.format(note=text(note), data=f'{{"steps":[{steps}]}}')
    return Viewer(html=section("Rollouts", body), script=_script())


def _spread(paths: Sequence[Path]) -> Sequence[Path]:
    """At most ``STEPS_SHOWN`` of them, evenly, with the first and the last."""
    if len(paths) <= STEPS_SHOWN:
        return paths
    return [paths[round(place * (len(paths) - 1) / (STEPS_SHOWN - 1))] for place in range(STEPS_SHOWN)]


def _that_fit(encoded: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """By step the samples that ``PAGE_BYTES`` hold: the first of the last step, of the first and of all others, then
    the second of each, and so on."""
    order = list(dict.fromkeys([*list(encoded)[-1:], *encoded]))
    kept, room = dict[int, list[str]](), PAGE_BYTES
    for index in range(max(map(len, encoded.values()), default=0)):
        for step in order:
            if index >= len(encoded[step]):
                continue
            room -= len(encoded[step][index])
            if room < 0:
                return kept
            kept.setdefault(step, []).append(encoded[step][index])
    return kept


def _script() -> str:
    return files(__package__).joinpath("viewer.js").read_text(encoding="ascii")


def _shown(sample: RolloutSample) -> dict[str, Any]:
    """What the page needs of a sample: ``rest`` is the text that has no numbers."""
    fields = asdict(sample)
    whole = fields.pop("guidance") + fields.pop("response")
    covered = len("".join(sample.tokens.texts)) if sample.tokens else 0
    return fields | {
        "prompt": _short(sample.prompt),
        "rest": _short(whole[covered:]),
        "trusted_share": sample.trusted_share,
    }


def _short(long: str) -> str:
    if len(long) <= LONGEST_TEXT:
        return long
    return f"{long[:LONGEST_TEXT]} [... {len(long) - LONGEST_TEXT} characters more]"


def _encode(value: dict[str, Any]) -> str:
    """JSON that can stand inside a script element: no text of a model can end the element or begin a comment."""
    encoded = json.dumps(_clean(value), allow_nan=False, separators=(",", ":"))
    return encoded.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list | tuple) else value
