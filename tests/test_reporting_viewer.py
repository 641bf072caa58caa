"""The viewer of sampled rollouts: what the page holds, and what a browser makes of it.

The tests in a browser need Chromium (CONTRIBUTING.md, tests); no driver: links open the viewer where it is to be looked at,
and events come from a script that the test adds to its copy of the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from megatron_tropd.reporting.report import viewer
from megatron_tropd.reporting.report.write import write_report
from megatron_tropd.reporting.rollout_samples import RolloutSample, SampleTokens, read_samples
from megatron_tropd.reporting.run_directory import RunDirectory

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><!--<script>\u202e"
NAMES = {"7": " the", "8": HOSTILE, "9": "<|end|>", "10": "\u20ac", "11": "\n"}


def _tokens(**changes):
    """A response: two tokens of guidance, one accepted, two rejected (one that the teacher excludes), and a stop token."""
    given = (None, None)
    columns = SampleTokens(
        ids=(7, 10, 11, 8, 7, 9),
        texts=(" the", "\u20ac", "\n", HOSTILE, " the", ""),
        region=("guidance",) * 2 + ("on_policy",) * 4,
        student_logprob=(-1.0, -2.0, -0.5, -0.25, -3.0, -0.125),
        teacher_logprob=(-1.5, -2.5, -0.25, -2.25, "-inf", -0.375),
        reward=(*given, 0.25, -2.0, "-inf", -0.25),
        trust=(*given, 1.0, 0.0, 0.0, 1.0),
        coin=(*given, 0.75, 0.5, 0.125, 0.0625),
        teacher_entropy=(*given, 0.5, 1.5, 2.5, 3.5),
        teacher_top=((), (), (), ((8, -0.5), (10, -1.0), (7, -2.0), (9, -3.0), (11, -4.0)), ((10, -0.0625),), ()),
        names=NAMES,
    )
    return replace(columns, **changes)


def _sample(tokens, **changes):
    plain = {"uid": 3, "sample_index": 1, "prompt": f"Q {HOSTILE}", "guidance": "", "finish": "stop", "num_tokens": 6}
    text = "".join(tokens.texts) if tokens else HOSTILE
    return RolloutSample(**{**plain, "response": text, "tokens": tokens, "correct": True, "name": "q<3>", **changes})


def _samples(step):
    """Of step 8: a gate with coins; weights; a rule; guidance that is in no loss and no gate; text alone."""
    if step == 1:
        return [_sample(_tokens())]
    no_coin = {"coin": (None,) * 6, "teacher_top": ((),) * 6}
    copied = {
        "region": ("guidance_copy",) * 2 + ("on_policy",) * 4,
        "trust": (None,) * 6,
        "student_logprob": (None,) * 6,
    }
    return [
        _sample(_tokens()),
        _sample(_tokens(trust=(None, None, 1.0, 0.375, 0.0, 0.75), **no_coin), correct=None),
        _sample(_tokens(**no_coin), correct=False),
        _sample(_tokens(**no_coin, **copied), num_tokens=9, response="".join(_tokens().texts) + "tail"),
        _sample(None),
    ]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    with RunDirectory.create(path, config={}, resume=False) as run:
        for step in (1, 8):
            run.rollouts(step, _samples(step))
    write_report(path)
    return path


class Page(HTMLParser):
    """Elements by id with their texts, and what is in scripts."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.policy, self.text, self.classes, self.tags, self._open = [], "", {}, {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append((tag, named))
        if tag in ("meta", "img", "br", "input"):
            self.policy = named["content"] if named.get("http-equiv") else self.policy
            return
        self._open.append((tag, named))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open and self._open[-1][0] == "script":
            self.scripts[-1] += data
        for _, named in self._open:
            if "id" in named:
                self.text[named["id"]] = self.text.get(named["id"], "") + data
            if "class" in named:
                self.classes.setdefault(named["class"], []).append(data)


@pytest.fixture(scope="module")
def page(run_dir):
    return Page((run_dir / "report.html").read_text())


def _cleaned(value):
    return json.loads(json.dumps(value).replace("\\u202e", "\\ufffd"))


def test_the_page_holds_the_numbers_of_the_files(run_dir, page):
    data = json.loads(page.scripts[0])
    assert [step["step"] for step in data["steps"]] == [1, 8]
    for step in data["steps"]:
        written = read_samples(run_dir / f"rollouts/step_{step['step']:07d}.jsonl")
        assert [shown["tokens"] for shown in step["samples"]] == [
            _cleaned(asdict(sample)["tokens"]) for sample in written
        ]
    of_last = data["steps"][1]["samples"]
    assert [shown["rest"] for shown in of_last] == ["", "", "", "tail", _cleaned(HOSTILE)]
    assert [shown["trusted_share"] for shown in of_last] == [0.5, 2.125 / 4, 0.5, None, None]


def test_no_text_of_a_model_can_leave_its_place(run_dir, page):
    text = (run_dir / "report.html").read_text()
    data = text[text.index('id="rollout-data"') :]
    data = data[data.index(">") + 1 : data.index("</script>")]
    assert not set("<>&") & set(data) and data.isascii() and "u202e" not in data
    assert json.loads(data) == json.loads(page.scripts[0]), "the element ends where the data ends"
    assert not [tag for tag, named in page.tags if tag == "img" or any(name.startswith("on") for name in named)]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert page.policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|fetch|http", page.scripts[1]
    )


def test_a_page_of_long_responses_is_bounded_and_begins_with_the_last_step(tmp_path, monkeypatch):
    sample = _sample(_tokens())
    with RunDirectory.create(tmp_path, config={}, resume=False) as run:
        for step in range(1, 31):
            run.rollouts(step, [sample] * 8)

    def kept():
        data = json.loads(Page(viewer.viewer(tmp_path / "rollouts").html).scripts[0])
        return {step["step"]: len(step["samples"]) for step in data["steps"]}

    found = kept()
    assert len(found) == 12 and {1, 30} <= found.keys() and set(found.values()) == {8}
    one = len(viewer._encode(viewer._shown(sample)))
    monkeypatch.setattr(viewer, "PAGE_BYTES", 2 * one + one // 2)
    assert kept() == {1: 1, 30: 1}
    monkeypatch.setattr(viewer, "PAGE_BYTES", 13 * one)
    assert kept() == dict.fromkeys(found, 1) | {30: 2}


def test_a_run_without_samples_has_no_script(tmp_path):
    RunDirectory.create(tmp_path, config={}, resume=False).close()
    bare = Page(write_report(tmp_path).read_text())
    assert not bare.scripts and "script-src" not in bare.policy


def _browser():
    given = os.environ.get("TROPD_TEST_BROWSER")
    found = given or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH: CONTRIBUTING.md says how to get one")
    return found


@pytest.fixture(scope="module")
def opened(run_dir, tmp_path_factory):
    """A function that opens the report, or ``script`` in a copy of it, and returns the document afterwards."""
    browser, home = _browser(), tmp_path_factory.mktemp("browser")

    def dump(link, script=""):
        source = (run_dir / "report.html").read_text()
        if script:  # a page that forbids foreign scripts, which another test holds, would not run this one
            source = source.replace(Page(source).policy, "").replace("</body>", f"<script>{script}</script></body>")
        (home / "page.html").write_text(source)
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
            f"--user-data-dir={home / 'profile'}", "--dump-dom", f"file://{home}/page.html{link}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return Page(done.stdout)

    return dump


SAMPLES = [f"#step=8&sample={sample}" for sample in range(5)]
TOKENS = ["#step=1&sample=0&token=4", "#step=8&sample=3&token=1", "#step=8&sample=1&token=3"]
NOWHERE = ["#step=99&sample=-1&token=99", "#step=8&sample=x&token=1e3", "#%3Cimg%3E"]
VISIT = """
const seen = {};
for (const link of LINKS) {
  history.replaceState(null, "", link);
  window.dispatchEvent(new HashChangeEvent("hashchange"));
  seen[link] = document.getElementById("viewer").outerHTML;
}
document.body.append(Object.assign(document.createElement("p"), { id: "log", textContent: JSON.stringify(seen) }));
"""


@pytest.fixture(scope="module")
def visited(opened):
    """The viewer by the link that leads to it: one browser that goes from link to link."""
    links = [*SAMPLES, *TOKENS, *NOWHERE]
    seen = json.loads(opened("", VISIT.replace("LINKS", json.dumps(links))).text["log"])
    return {link: Page(seen[link]) for link in links}


def _looks(shown):
    """Class of every token of the response, in order."""
    return [
        named["class"].replace(" nameless", "").removesuffix(" current").removeprefix("token ")
        for tag, named in shown.tags
        if tag == "span" and "data-index" in named
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sample", "looks", "legend"),
    [
        (0, ["guidance"] * 2 + ["trusted", "rejected", "rejected", "trusted"],
         "prompt guidance by the teacher accepted by the gate's coin rejected by the gate's coin"),
        (1, ["guidance"] * 2 + ["trusted", "rejected", "rejected", "trusted"],
         "prompt guidance by the teacher accepted with 50% or more accepted with less than 50%"),
        (2, ["guidance"] * 2 + ["trusted", "rejected", "rejected", "trusted"],
         "prompt guidance by the teacher accepted by the gate rejected by the gate"),
        (3, ["guidance copy"] * 2 + ["written"] * 4,
         "prompt guidance, repeated in this sample: in no loss written by the student"),
        (4, [], ""),
    ],
)  # fmt: skip
def test_a_browser_colours_the_tokens_and_the_legend_is_true(visited, sample, looks, legend):
    shown = visited[SAMPLES[sample]]
    assert _looks(shown) == looks and shown.text.get("legend", "") == legend
    hostile = HOSTILE.replace("\u202e", "\ufffd")
    assert shown.text["response"].startswith(f"Q {hostile}")
    assert not [tag for tag, _ in shown.tags if tag == "img"]
    if looks:
        assert shown.text["response"].removeprefix(f"Q {hostile}") == (
            f" the\u20ac\u21b5\n{hostile} the<|end|>" + "tail" * (sample == 3)
        )
    verdict = ("right", None, "wrong", "right", "right")[sample]
    facts = ["prompt 3 (q<3>)", "sample 1", f"{9 if sample == 3 else 6} tokens", "finish: stop"]
    facts += [verdict] * (verdict is not None) + (
        [f"trusted: {('50.0', '53.1', '50.0')[sample]}%"] if sample < 3 else []
    )
    facts += ["numbers of the first 6 tokens only"] * (sample == 3)
    assert shown.text["summary"].split(" / ") == facts


@pytest.mark.slow
def test_a_link_opens_the_numbers_of_a_token(opened, visited):
    page = opened("#step=1&sample=0&token=3")
    assert ("viewer", False) in [(named.get("id"), "hidden" in named) for _, named in page.tags]
    assert not [tag for tag, _ in page.tags if tag == "img"]
    found = page.text["panel"]
    shown = json.dumps(HOSTILE.replace("\u202e", "\ufffd"), ensure_ascii=False)
    expected = [
        f"token{shown}, id 8", "place4 of 6", "regionwritten by the student",
        f"student log p-0.2500 ({100 * math.exp(-0.25):.1f}%)", f"teacher log q-2.2500 ({100 * math.exp(-2.25):.1f}%)",
        "R = log q - log p-2.0000", f"acceptance probability{100 * math.exp(-2):.1f}%",
        "coinu = 0.5, log u = -0.6931: rejected", "teacher's entropy1.5000 nats", "most probable tokens",
        f"{shown}id 8{100 * math.exp(-0.5):.1f}%-0.5000", f'"\u20ac"id 10{100 * math.exp(-1):.1f}%-1.0000',
        f'"<|end|>"id 9{100 * math.exp(-3):.2f}%-3.0000', f'"\\n"id 11{100 * math.exp(-4):.2f}%-4.0000',
    ]  # fmt: skip
    places = [found.index(part) for part in expected]
    assert places[:10] == sorted(places[:10])
    excluded, given, weighed = (visited[link].text["panel"] for link in TOKENS)
    for part in ("teacher log q-inf (0.00%)", "R = log q - log p-inf", "acceptance probability0.00%", ": rejected"):
        assert part in excluded
    assert "regionguidance, repeated" in given and not re.search("R =|coin|gate|student log p|entropy|most prob", given)
    assert "acceptance probability37.5%" in weighed and "coin" not in weighed


@pytest.mark.slow
@pytest.mark.parametrize("link", NOWHERE)
def test_a_link_that_leads_nowhere_opens_the_viewer_all_the_same(visited, link):
    shown = visited[link]
    assert "Point at a token" in shown.text["panel"] and _looks(shown)


KEYS = """
const press = (key) =>
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const tokens = () => [...document.querySelectorAll("[data-index]")];
const place = () => document.querySelector("#panel").textContent.match(/place(\\d+)/)[1];
const log = [];
log.push(tokens().filter((token) => token.tabIndex === 0).length);
tokens()[0].focus();
log.push(place());
for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home", "x"]) {
  press(key);
  log.push(place());
}
log.push(tokens().filter((token) => token.tabIndex === 0).length, document.activeElement.dataset.index, location.hash);
tokens()[2].dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
log.push(place());
document.getElementById("response").dispatchEvent(new MouseEvent("mouseleave"));
log.push(place());
tokens()[4].click();
log.push(place(), location.hash);
const pick = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("change"));
};
pick("pick-step", 1);
log.push(document.getElementById("pick-sample").options.length, location.hash);
pick("pick-sample", 3);
log.push(location.hash, document.getElementById("legend").textContent.includes("repeated"));
document.body.append(Object.assign(document.createElement("p"), { id: "log", textContent: JSON.stringify(log) }));
"""


@pytest.mark.slow
def test_tokens_are_reached_by_keyboard_and_mouse_and_the_address_follows(opened):
    log = json.loads(opened("#step=1&sample=0", KEYS).text["log"])
    at = "#step=1&sample=0&token="
    assert log == [
        1, "1", "2", "3", "2", "6", "6", "1", "1", 1, "0", f"{at}0", "3", "1", "5", f"{at}4", 5, "#step=8&sample=0",
        "#step=8&sample=3", True,
    ]  # fmt: skip
