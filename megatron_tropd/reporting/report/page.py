"""HTML building blocks of the report.  Model output is untrusted: every text passes :func:`text`, or :func:`clean` and
JSON."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_MEDIA_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}

STYLE = """
:root{color-scheme:light dark;--ink:#1d1f23;--soft:#646a73;--line:#dfe2e6;--page:#fff;--card:#f6f7f9;
--accent:#0072b2;--good:#00785a;--bad:#b84a00;--guidance:#cfe6f6;--trusted:#e3f4ee;--refused:#fbe3d3;
--rejected:#d55e00}
@media(prefers-color-scheme:dark){:root{--ink:#e4e6ea;--soft:#9aa1ab;--line:#363b43;--page:#15171a;--card:#1e2125;
--accent:#56b4e9;--good:#3ecf9f;--bad:#ff9a4d;--guidance:#1d3f57;--trusted:#15352b;--refused:#4a2812;
--rejected:#ff8a3c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
main{max-width:66rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.5rem 0 .8rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.4rem 0 .5rem}
p{margin:.4rem 0}
.soft{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
small,.small{font-size:.85rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.7rem;margin:1.2rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}
.tile b{display:block;font-size:1.45rem;line-height:1.3;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.93rem}
th,td{text-align:left;padding:.4rem .7rem .4rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;white-space:nowrap}
td.number,th.number{text-align:right;white-space:nowrap}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.85rem}
.pairs td code{overflow-wrap:anywhere}
.pairs tr>:first-child{width:1%;white-space:nowrap;padding-right:2rem}
pre,.rollout{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem;margin:.6rem 0}
pre{overflow-x:auto}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:1rem}
figure{margin:0}
figure img{width:100%;height:auto;display:block}
.reader{display:grid;grid-template-columns:minmax(0,3fr) minmax(15rem,2fr);gap:1rem;align-items:start}
@media(max-width:50rem){.reader{grid-template-columns:1fr}}
.reader .rollout{max-height:32rem;overflow-y:auto}
#panel{overflow-wrap:anywhere}#panel caption{text-align:left;color:var(--soft);padding-top:.8rem}
#panel .chosen{font-weight:700}#panel td,#panel th{font-size:.85rem;padding-top:.2rem;padding-bottom:.2rem}
select{font:inherit;max-width:100%}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;font-size:.92rem}
.token{border-radius:.2rem;text-underline-offset:3px;cursor:default}
.token.nameless{opacity:.6;font-size:.8em}
.token.guidance{background:var(--guidance);text-decoration:underline dotted}
.token.copy{text-decoration-style:dashed}
.token.trusted{background:var(--trusted)}
.token.rejected{background:var(--refused);text-decoration:underline wavy var(--rejected) 1.5px}
.token.current{outline:2px solid var(--ink);outline-offset:1px}
.bar{display:block;height:.6rem;margin:.4rem 0 0 .8rem;min-width:2px;background:var(--accent);border-radius:.2rem}
summary{cursor:pointer;color:var(--accent);margin:.6rem 0}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; {policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main>{script}</body>
</html>
"""


def page(title: str, body: Iterable[str], script: str = "") -> str:
    """The whole document.  Its content policy forbids requests and every script but ``script``, which it names by its
    digest, in case an escape is ever missing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return _PAGE.format(
        title=text(title), style=STYLE, body="\n".join(part for part in body if part),
        policy="style-src 'unsafe-inline'" + (f"; script-src 'sha256-{digest}'" if script else ""),
        script=f"<script>{script}</script>" if script else "",
    )  # fmt: skip


def clean(value: str) -> str:
    """The same text without control and direction characters that could disturb the page."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", value)


def text(value: object) -> str:
    """Text as HTML: escaped and clean."""
    return html.escape(clean(str(value)), quote=True)


def section(title: str, *parts: str) -> str:
    """A heading and the content below it; an empty string without content."""
    content = "\n".join(part for part in parts if part)
    return f"<section><h2>{text(title)}</h2>\n{content}</section>" if content else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()) -> str:
    """A table from cells that are HTML already; ``numbers`` are the right-aligned columns."""
    right = set(numbers)
    lines = [_row("th", [text(cell) for cell in head], right), *(_row("td", row, right) for row in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>' if len(lines) > 1 else ""


def _row(tag: str, cells: Sequence[str], right: set[int]) -> str:
    made = (
        f'<{tag} class="number">{cell}</{tag}>' if index in right else f"<{tag}>{cell}</{tag}>"
        for index, cell in enumerate(cells)
    )
    return f"<tr>{''.join(made)}</tr>"


def pairs(values: dict[str, object]) -> str:
    """A table of names and values."""
    rows = [(code(name), code(value)) for name, value in values.items()]
    return f'<div class="pairs">{table(("name", "value"), rows)}</div>' if rows else ""


def code(value: object) -> str:
    """Text in the fixed-width font."""
    return f"<code>{text(value)}</code>"


def folded(title: str, content: str) -> str:
    """Content that opens on a click, without a script."""
    return f"<details><summary>{text(title)}</summary>{content}</details>" if content else ""


def image(path: Path, description: str) -> str:
    """A figure with its file inside the page; as an image, an SVG can neither run nor fetch anything."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    source = f"data:{_MEDIA_TYPES[path.suffix]};base64,{data}"
    return f'<figure><img src="{source}" alt="{text(description)}"></figure>'
