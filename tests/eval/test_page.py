"""report.html carries every episode and needs no other file; only its own script can run in it."""

import base64
import hashlib
import json
import random
import re
import shutil
import subprocess
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from matryoshka.core.records import Call, EpisodeInfo, Example, Message, Sample, Trajectory, Turn
from matryoshka.eval.report import Condition, curve, fitted_scale, place, write_report

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&lt;b&gt; `|`"


class Elements(HTMLParser):
    """Collects the tags, their attributes and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.found)


def unpacked(page: str) -> Any:
    """Return the JSON that the page's data block carries."""
    match = re.search(r'<script type="text/plain" id="data">([A-Za-z0-9+/=]*)</script>', page)
    assert match is not None
    return json.loads(zlib.decompress(base64.b64decode(match[1])))


def hostile(make_input: Any) -> Any:
    """Return an input with HOSTILE in every text that a model or a user can write."""
    info = EpisodeInfo("wrong", "label_free", HOSTILE, HOSTILE, prediction=HOSTILE, error=HOSTILE)
    call = Call((Message("user", HOSTILE),), Sample(HOSTILE), HOSTILE)
    turn = Turn((Message("user", HOSTILE),), None, Sample(HOSTILE), (call,), HOSTILE)
    return make_input(
        **{name: HOSTILE for name in ("title", "command")},
        **{name: {HOSTILE: HOSTILE} for name in ("config", "hardware", "versions", "counts")},
        conditions=[Condition(HOSTILE, HOSTILE, [Trajectory("pal", HOSTILE, (turn,), 0.0, info)], 1.0, 1, 1)],
        examples=[Example(HOSTILE, {"question": HOSTILE, "answer": HOSTILE})],
        groups={HOSTILE: [HOSTILE]},
        comparisons=[(HOSTILE, HOSTILE)],
        training={HOSTILE: [{"step": 1, HOSTILE: 0.5}]},
        notes=[HOSTILE],
    )


def chromium() -> str:
    """Return a headless browser, or skip."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no chromium or google-chrome on PATH")


def dom(path: Path, fragment: str = "") -> str:
    """Return the page as a browser leaves it once its script has run."""
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom"
    command = [chromium(), *flags.split(), "--virtual-time-budget=4000", f"file://{path}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_the_page_carries_every_episode_whole(make_input: Any, tmp_path: Path) -> None:
    """Oracle: the records themselves, read back through base64, inflate and JSON: no text cut, lost or exchanged."""
    data = make_input()
    lone = replace(data.examples[1], fields={"question": "half a pair: \ud800", "answer": 1})
    long = replace(data.conditions[1].trajectories[0].turns[0], action=Sample("y" * 9000, "length"))
    episodes = [replace(data.conditions[1].trajectories[0], turns=(long,)), *data.conditions[1].trajectories[1:]]
    conditions = [data.conditions[0], replace(data.conditions[1], trajectories=episodes), data.conditions[2]]
    data = replace(data, conditions=conditions, examples=[data.examples[0], lone, *data.examples[2:]])
    write_report(data, tmp_path)
    packed = unpacked((tmp_path / "report.html").read_text())
    texts, episodes_of = packed["texts"], [{t.example_id: t for t in c.trajectories} for c in data.conditions]
    assert packed["conditions"] == [[c.name, c.label] for c in data.conditions]
    assert len(packed["episodes"]) == 4
    for example, (ident, question, gold, groups, records) in zip(data.examples, packed["episodes"], strict=True):
        fields = example.fields
        assert [texts[i] for i in (ident, question, gold)] == [example.id, fields["question"], str(fields["answer"])]
        assert groups == ([0] if example.id in ("e2", "e3") else [])
        for known, (verdict, prediction, error, turns) in zip(episodes_of, records, strict=True):
            episode = known[example.id]
            assert packed["verdicts"][verdict] == episode.info.verdict
            assert texts[prediction] == ("" if episode.info.prediction is None else str(episode.info.prediction))
            assert texts[error] == (episode.info.error or "")
            for turn, (guidance, cut, feedback, calls) in zip(episode.turns, turns, strict=True):
                assert (texts[guidance], cut) == (turn.action.text, int(turn.action.finish_reason == "length"))
                assert texts[feedback] == turn.feedback
                assert [(texts[r], texts[o]) for r, _, o in calls] == [(c.sample.text, c.outcome) for c in turn.calls]


# Oracle: by hand: "none" gives no guidance, so the first comparison between guided conditions is the second one.
@pytest.mark.parametrize(
    ("comparisons", "expected"),
    [([("none", "trained"), ("trained", "untrained")], (2, 1)), ([("none", "trained")], (1, 2)), ([], (1, 2))],
)
def test_before_and_after(make_input: Any, tmp_path: Path, comparisons: Any, expected: tuple[int, int]) -> None:
    """Oracle: the pair of conditions, chosen by hand for each list of comparisons."""
    write_report(make_input(comparisons=comparisons), tmp_path)
    packed = unpacked((tmp_path / "report.html").read_text())
    assert (packed["before"], packed["after"]) == expected


def test_the_page_needs_nothing_and_runs_only_its_own_script(make_input: Any, tmp_path: Path) -> None:
    """Oracle: HTML and CSP rules: no attribute that loads or runs, and a policy that allows two blocks by hash."""
    write_report(hostile(make_input), tmp_path)
    page = (tmp_path / "report.html").read_text()
    elements = Elements(page)
    assert [elements.count(tag) for tag in ("script", "style", "img", "b")] == [2, 1, 0, 1]  # b: the name of the curve
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "style")]
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(attributes["content"] or "" for _, attributes in elements.found if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag in ("style", "script"):
        (block,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|url\(|@import", page)
    text = (tmp_path / "report.md").read_text()
    assert "<script" not in text.replace("```\n" + HOSTILE, "") and "<img" not in text.replace("```\n" + HOSTILE, "")


def test_hostile_text_stays_text_in_a_browser(make_input: Any, tmp_path: Path) -> None:
    """Oracle: a real browser: the opened episode shows the text, and neither its script nor its handler has run."""
    write_report(hostile(make_input), tmp_path)
    elements = Elements(dom(tmp_path / "report.html", "#e=" + quote(HOSTILE, safe="")))
    assert (elements.count("script"), elements.count("img")) == (2, 0)
    assert ("div", {"class": "episode open"}) in elements.found
    # the opened card alone shows the label, the prediction, guidance, reply, outcome, feedback and error
    detail = elements.text.partition("Gold answer: ")[2]
    assert detail.count(HOSTILE) >= 10
    assert elements.text.lstrip().startswith(HOSTILE)  # the title, which the hostile script would have replaced


def test_filters_and_search_in_a_browser(make_input: Any, tmp_path: Path) -> None:
    """Oracle: counted by hand from conftest's verdicts: untrained R R F W, trained W R R R."""
    write_report(make_input(), tmp_path)
    driver = """
    setTimeout(() => {
      const seen = [];
      const set = (id, value) => { const n = document.getElementById(id); n.value = value;
        n.dispatchEvent(new Event(id === "query" ? "input" : "change")); };
      const ids = () => [...document.querySelectorAll(".head code")].map((n) => n.textContent);
      const note = (what) => seen.push(what + "=" + ids());
      for (const key of ["all", "right", "wrong", "unfinished", "changed", "gained", "lost"]) {
        set("show", key); note(key);
      }
      set("show", "all"); set("after", 1); set("show", "unfinished"); note("untrained unfinished"); set("show", "all");
      set("query", "PLAN   question 3?"); note("search"); set("query", "nowhere"); note("nowhere"); set("query", "");
      set("group", "0"); note("group");
      document.querySelector(".head").click();
      seen.push("cards=" + document.querySelectorAll(".card").length);
      document.body.replaceChildren(seen.join("|"));
    }, 1000);
    """
    page = re.sub(r"<meta http-equiv[^>]*>", "", (tmp_path / "report.html").read_text())
    (path := tmp_path / "driven.html").write_text(page.replace("</body>", f"<script>{driver}</script></body>"))
    seen = dict(item.split("=") for item in dom(path).partition("<body>")[2].partition("</body>")[0].split("|"))
    assert seen == {
        "all": "e0,e1,e2,e3",
        "right": "e1,e2,e3",
        "wrong": "e0",
        "unfinished": "",
        "changed": "e0,e2,e3",
        "gained": "e2,e3",
        "lost": "e0",
        "untrained unfinished": "e2",
        "search": "e3",
        "nowhere": "",
        "group": "e2,e3",
        "cards": "3",
    }


def test_a_thousand_examples_under_eight_conditions_stay_small(make_input: Any, tmp_path: Path) -> None:
    """Oracle: the promise, under 5 MB; the texts are random words, which deflate far worse than real programs."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 9))) for _ in range(2000)]

    def speak(n: int) -> str:
        return " ".join(rng.choices(words, k=n))

    examples = [Example(f"e{i}", {"question": speak(40), "answer": i}) for i in range(1000)]
    info = EpisodeInfo("right", "label_free", "c", "g", prediction=1)

    def episode(example: Example) -> Trajectory:
        call = Call((), Sample(speak(70)), "value 1.0")
        return Trajectory("pal", example.id, (Turn((), None, Sample(speak(30)), (call,)),), 1.0, info)

    conditions = [Condition(f"c{k}", f"Condition {k}", [episode(e) for e in examples], 1.0, 1, 1) for k in range(8)]
    write_report(make_input(conditions=conditions, examples=examples, groups={}, comparisons=[]), tmp_path)
    assert sum(len(t.turns[0].action.text) for c in conditions for t in c.trajectories) > 1_000_000
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


def test_plots_place_values_on_their_scale() -> None:
    """Oracle: linear placement by hand: the interval cell runs from x = 14 to x = 266."""
    assert [place(value, (0.0, 1.0)) for value in (0.5, 0.25, 1.0)] == [140.0, 77.0, 266.0]
    assert fitted_scale(-0.03, 0.18)[1] == pytest.approx((-0.05, 0.0, 0.05, 0.1, 0.15, 0.2))
    assert fitted_scale(0.0, 0.0)[0] == (0.0, 0.01)
    for low, high in ((-1.0, 1.0), (-0.4, -0.1), (0.2, 0.3), (-0.0001, 0.9)):
        (left, right), ticks = fitted_scale(low, high)
        assert left <= min(low, 0) + 1e-12 and right >= max(high, 0) - 1e-12 and len(ticks) <= 7 and 0.0 in ticks


def test_long_curves_are_averaged_in_equal_runs() -> None:
    """Oracle: by hand: 601 points make runs of 3, whose means of a straight line are the middle points; one is left."""
    drawn = curve(range(601), range(601))
    assert len(drawn.points) == len(drawn.path.split()) == 201
    assert [text for _, _, text in drawn.x_ticks] == ["1", "600"]
    with pytest.raises(ValueError, match="2 steps and 1 values"):
        curve([1, 2], [1])
