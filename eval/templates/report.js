/* Script of report.html: unpacks the episodes, filters, searches and shows them.
   
   It fetches nothing and parses no markup: every text of an episode enters the page as a text node. */
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
    byId("count").textContent = "This browser cannot unpack the episodes; Chrome 80, Firefox 113, Safari 16.4 can.";
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
