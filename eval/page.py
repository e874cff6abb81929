"""Style sheet and script of report.html.

The script fetches nothing and never parses markup: every text of an episode enters the page as a text node.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --raised: #ffffff; --ink: #24211c; --muted: #6d675c; --rule: #e2ddd1; --faint: #f2efe7;
  --right: #2a6a8c; --wrong: #b04a2a; --error: #94690f; --failed: #857f73; --mark: #e3eef3; --unmark: #f6e6df;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Sitka Text", Cambria, Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #17181a; --raised: #1e1f22; --ink: #e4e1da; --muted: #9b968b; --rule: #35363a; --faint: #242529;
    --right: #7fb8d8; --wrong: #e28c69; --error: #d6ad55; --failed: #8f8a80; --mark: #1d3440; --unmark: #402820;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 4.5rem; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--sans); }
main { max-width: 82rem; margin: 0 auto; padding: 3.5rem 2rem 6rem; }
h1, h2 { font-family: var(--serif); font-weight: 600; line-height: 1.2; text-wrap: balance; }
h1 { font-size: 2.3rem; letter-spacing: -.01em; margin: .4rem 0 .6rem; }
h2 { font-size: 1.4rem; margin: 3.6rem 0 .2rem; padding-top: 1.1rem; border-top: 1px solid var(--ink); }
h3 { font-size: .95rem; font-weight: 600; margin: 2.2rem 0 0; }
a { color: inherit; text-decoration-color: var(--rule); text-underline-offset: .2em; }
a:hover { text-decoration-color: currentColor; }
.protocol { display: inline-block; font-size: .8rem; color: var(--right); font-weight: 600; letter-spacing: .02em; }
.protocol.oracle { color: var(--wrong); }
.lede { color: var(--muted); margin: 0; max-width: 52rem; }
.command { font: .82rem/1.6 var(--mono); background: var(--faint); border-radius: 4px; padding: .6rem .9rem;
  margin: 1.2rem 0; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; font-size: .88rem; margin-top: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0 1.6rem; font-variant-numeric: tabular-nums; }
caption { caption-side: top; text-align: left; color: var(--muted); font-size: .84rem; padding-bottom: .5rem; }
th { font-weight: 500; font-size: .8rem; color: var(--muted); text-align: right; vertical-align: bottom; }
th, td { padding: .36rem .7rem; white-space: nowrap; }
td { text-align: right; border-top: 1px solid var(--rule); }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
.name { text-align: left; white-space: normal; min-width: 12rem; }
.number { color: var(--muted); font-size: .8rem; text-align: right; width: 1.6rem; }
.plot { width: 280px; padding: 0 .4rem; }
.soft, td.soft { color: var(--muted); font-size: .84rem; }
strong { font-weight: 600; }
svg { display: block; overflow: visible; }
svg text { font: 10px var(--sans); fill: var(--muted); font-variant-numeric: tabular-nums; }
svg .rule { stroke: var(--rule); stroke-width: 1; }
svg .zero { stroke: var(--muted); }
svg .range { stroke: var(--right); stroke-width: 2; stroke-linecap: round; opacity: .55; }
svg .dot { fill: var(--right); }
svg .line { fill: none; stroke: var(--right); stroke-width: 1.5; stroke-linejoin: round; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.4rem 1.8rem; margin: 1rem 0; }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; justify-content: space-between; font-size: .84rem; margin-bottom: .3rem; }
figcaption b { font-weight: 600; }
.curve { width: 100%; height: auto; }
dl { columns: 22rem; column-gap: 3rem; margin: .5rem 0 0; font-size: .86rem; }
dl div { display: grid; grid-template-columns: 11rem 1fr; gap: 1rem; padding: .1rem 0; break-inside: avoid; }
dt { color: var(--muted); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.notes { max-width: 46rem; padding-left: 1.1rem; }
.tools { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem .9rem; align-items: center;
  padding: .8rem 0; background: var(--paper); border-bottom: 1px solid var(--rule); font-size: .84rem; }
.tools label { color: var(--muted); }
select, input { font: inherit; color: var(--ink); background: var(--raised); border: 1px solid var(--rule);
  border-radius: 4px; padding: .3rem .5rem; max-width: 13rem; }
input { width: 13rem; }
:focus-visible { outline: 2px solid var(--right); outline-offset: 1px; }
#count { margin-left: auto; color: var(--muted); font-variant-numeric: tabular-nums; }
.episode { border-bottom: 1px solid var(--rule); }
.head, .legend { display: grid; grid-template-columns: 9rem 1fr auto; gap: 1rem; align-items: baseline; width: 100%; }
.head { font: inherit; color: inherit; text-align: left; background: none; border: 0; padding: .5rem .2rem; cursor: pointer; }
.head:hover { background: var(--faint); }
.head code { font: .78rem var(--mono); color: var(--muted); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.title { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.open .title { font-weight: 600; }
.strip { display: flex; }
.strip span { width: 1.35rem; text-align: center; font-size: .9rem; }
.legend { padding: .7rem .2rem .3rem; color: var(--muted); font-size: .78rem; }
.legend .strip span { font-size: .74rem; }
.lede span { white-space: nowrap; }
.right { color: var(--right); } .wrong { color: var(--wrong); } .error { color: var(--error); } .failed { color: var(--failed); }
.detail { padding: .4rem 0 2rem; }
.question { font: 1.08rem/1.55 var(--serif); max-width: 46rem; margin: .2rem 0 .6rem; white-space: pre-wrap; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; margin: 1.2rem 0; }
.pair > div, .card { background: var(--raised); border: 1px solid var(--rule); border-radius: 6px; padding: .9rem 1rem; min-width: 0; }
.cards { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(21rem, 1fr); gap: 1rem; align-items: start;
  overflow-x: auto; padding-bottom: .6rem; }
.what { font-size: .78rem; color: var(--muted); margin: .8rem 0 .2rem; }
.what:first-child { margin-top: 0; }
.card > .label { font-weight: 600; margin: 0; }
.verdict { font-size: .86rem; margin: 0; }
pre { margin: 0; font: .8rem/1.55 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
pre i { font-style: normal; color: var(--muted); }
pre mark { background: var(--mark); color: inherit; border-radius: 2px; }
pre.before mark { background: var(--unmark); }
.empty { color: var(--muted); font-size: .84rem; }
.more { font: inherit; font-size: .86rem; color: var(--ink); background: var(--faint); border: 0; border-radius: 4px;
  padding: .5rem 1rem; margin-top: 1rem; cursor: pointer; }
@media (max-width: 46rem) {
  main { padding: 2rem 1rem 4rem; }
  .pair { grid-template-columns: 1fr; }
  .head, .legend { grid-template-columns: 1fr auto; }
  .head code, .legend > :first-child { display: none; }
}
"""

SCRIPT = r"""
"use strict";
const PAGE = 100;
const GLYPHS = { right: "\u25cf", wrong: "\u25cb", error: "\u00d7", failed: "\u2013" };
const byId = (id) => document.getElementById(id);

// children that are strings become text nodes, never markup
function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

async function unpack() {
  const bytes = Uint8Array.from(atob(byId("data").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = await new Response(stream).json();
  data.episodes = data.episodes.map(([id, question, gold, groups, records]) => ({
    id: data.texts[id], question: data.texts[question], gold: data.texts[gold], groups,
    records: records.map(([verdict, prediction, error, turns]) => ({
      verdict: data.verdicts[verdict], prediction: data.texts[prediction], error: data.texts[error],
      turns: turns.map(([guidance, cut, feedback, calls]) => ({
        guidance: data.texts[guidance], cut, feedback: data.texts[feedback],
        calls: calls.map(([reply, cut, outcome]) => ({ reply: data.texts[reply], cut, outcome: data.texts[outcome] })),
      })),
    })),
  }));
  return data;
}

function haystack(episode) {
  if (!episode.haystack) {
    const parts = [episode.id, episode.question, episode.gold];
    for (const record of episode.records) {
      parts.push(record.prediction, record.error);
      for (const turn of record.turns) {
        parts.push(turn.guidance, turn.feedback);
        for (const call of turn.calls) parts.push(call.reply, call.outcome);
      }
    }
    episode.haystack = parts.join("\n").toLowerCase();
  }
  return episode.haystack;
}

function code(text) {
  const node = make("pre", "");
  text.split("\n").forEach((line, i) => {
    if (i) node.append("\n");
    node.append(/^\s*#/.test(line) ? make("i", "", line) : line);
  });
  return node;
}

const guidanceOf = (record) => record.turns.map((turn) => turn.guidance).filter(Boolean).join("\n\n");
const wholly = (cut, what) => (cut ? what + ", cut by the token limit" : what);

// guidance, with the lines that the other side does not have marked
function guidancePanel(title, text, other, className) {
  const panel = make("div", "", make("p", "what", title));
  if (!text) {
    panel.append(make("p", "empty", "No guidance was given."));
    return panel;
  }
  const known = new Set(other.split("\n").map((line) => line.trim()));
  const node = make("pre", className);
  text.split("\n").forEach((line, i) => {
    if (i) node.append("\n");
    node.append(other && line.trim() && !known.has(line.trim()) ? make("mark", "", line) : line);
  });
  panel.append(node);
  return panel;
}

function card(number, label, record) {
  const verdict = make("p", "verdict", make("span", record.verdict, GLYPHS[record.verdict] + " " + record.verdict));
  if (record.prediction) verdict.append(", answered " + record.prediction);
  const node = make("div", "card", make("p", "label", number + ". " + label), verdict);
  const several = record.turns.length > 1;
  record.turns.forEach((turn, t) => {
    const which = several ? "turn " + (t + 1) + ", " : "";
    if (turn.guidance) node.append(make("p", "what", wholly(turn.cut, which + "guidance")), code(turn.guidance));
    turn.calls.forEach((call, c) => {
      const attempt = turn.calls.length > 1 ? "attempt " + (c + 1) + ", " : "";
      node.append(make("p", "what", wholly(call.cut, which + attempt + "code")), code(call.reply));
      if (call.outcome) node.append(make("p", "what", which + attempt + "output"), make("pre", "", call.outcome));
    });
    if (turn.feedback) node.append(make("p", "what", which + "feedback"), make("pre", "", turn.feedback));
  });
  if (record.error) node.append(make("p", "what", "error"), make("pre", "", record.error));
  return node;
}

async function main() {
  if (typeof DecompressionStream === "undefined") {
    byId("count").textContent = "This browser cannot unpack the episodes (Chrome 80, Firefox 113, Safari 16.4 or later can).";
    return;
  }
  const data = await unpack();
  const list = byId("list");
  const [show, before, after, group, query] = ["show", "before", "after", "group", "query"].map(byId);
  data.conditions.forEach(([, label], i) => {
    before.add(new Option(i + 1 + ". " + label, i));
    after.add(new Option(i + 1 + ". " + label, i));
  });
  before.value = data.before;
  after.value = data.after;
  data.groups.forEach((name, i) => group.add(new Option(name, i)));
  group.parentElement.hidden = !data.groups.length;
  const right = (episode, select) => episode.records[select.value].verdict === "right";
  const shown = {
    all: () => true,
    right: (e) => right(e, after),
    wrong: (e) => e.records[after.value].verdict === "wrong",
    unfinished: (e) => ["error", "failed"].includes(e.records[after.value].verdict),
    changed: (e) => right(e, before) !== right(e, after),
    gained: (e) => !right(e, before) && right(e, after),
    lost: (e) => right(e, before) && !right(e, after),
  };

  function fill(row, episode) {
    const [one, two] = [before.value, after.value];
    const [first, second] = [guidanceOf(episode.records[one]), guidanceOf(episode.records[two])];
    const pair = make("div", "pair",
      guidancePanel("Guidance before: " + data.conditions[one][1], first, second, "before"),
      guidancePanel("Guidance after: " + data.conditions[two][1], second, first, "after"));
    const cards = make("div", "cards", ...episode.records.map((r, i) => card(i + 1, data.conditions[i][1], r)));
    row.append(make("div", "detail", make("p", "question", episode.question),
      make("p", "soft", "Gold answer: ", make("strong", "", episode.gold)), pair, cards));
  }

  function toggle(row, episode) {
    const open = row.classList.toggle("open");
    row.firstChild.setAttribute("aria-expanded", open);
    if (open) fill(row, episode);
    else row.lastChild.remove();
    return open;
  }

  function rowOf(episode) {
    const strip = make("span", "strip", ...episode.records.map((record, i) => {
      const glyph = make("span", record.verdict, GLYPHS[record.verdict]);
      glyph.title = data.conditions[i][1] + ": " + record.verdict;
      return glyph;
    }));
    const head = make("button", "head", make("code", "", episode.id), make("span", "title", episode.question), strip);
    head.type = "button";
    head.setAttribute("aria-expanded", "false");
    const row = make("div", "episode", head);
    head.addEventListener("click", () => {
      if (toggle(row, episode)) history.replaceState(null, "", "#e=" + encodeURIComponent(episode.id));
    });
    return row;
  }

  let found = [];
  let drawn = 0;
  function draw(until) {
    list.append(...found.slice(drawn, until).map(rowOf));
    drawn = Math.min(until, found.length);
    byId("more").hidden = drawn >= found.length;
    byId("more").textContent = "Show more (" + (found.length - drawn) + " left)";
  }

  function search() {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = data.episodes.filter((e) => shown[show.value](e)
      && (group.value === "" || e.groups.includes(Number(group.value)))
      && words.every((word) => haystack(e).includes(word)));
    byId("count").textContent = found.length + " of " + data.episodes.length + " examples";
    list.replaceChildren();
    drawn = 0;
    draw(PAGE);
  }

  function openLinked() {
    if (!location.hash.startsWith("#e=")) return;
    const id = decodeURIComponent(location.hash.slice(3));
    const index = found.findIndex((e) => e.id === id);
    if (index < 0) return;
    if (index >= drawn) draw(index + 1);
    const row = list.children[index];
    if (!row.classList.contains("open")) toggle(row, found[index]);
    row.scrollIntoView();
  }

  for (const select of [show, before, after, group]) select.addEventListener("change", search);
  query.addEventListener("input", search);
  byId("more").addEventListener("click", () => draw(drawn + PAGE));
  window.addEventListener("hashchange", openLinked);
  const numbers = data.conditions.map(([, label], i) => {
    const number = make("span", "", String(i + 1));
    number.title = label;
    return number;
  });
  byId("strip").append(...numbers);
  search();
  openLinked();
}
main();
"""
