"""Style sheet of report.html: system fonts, light and dark as the reader prefers, verdicts told apart by shape too."""

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
.lede { color: var(--muted); margin: 0; max-width: 58rem; }
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
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1.4rem 1.8rem;
  margin: 1rem 0; }
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
  border-radius: 4px; padding: .3rem .5rem; max-width: 14rem; }
input { width: 11rem; }
:focus-visible { outline: 2px solid var(--right); outline-offset: 1px; }
#count { margin-left: auto; color: var(--muted); font-variant-numeric: tabular-nums; }
.episode { border-bottom: 1px solid var(--rule); }
.head, .legend { display: grid; grid-template-columns: 9rem 1fr auto; gap: 1rem; align-items: baseline; width: 100%; }
.head { font: inherit; color: inherit; text-align: left; background: none; border: 0; padding: .5rem .2rem;
  cursor: pointer; }
.head:hover { background: var(--faint); }
.head code { font: .78rem var(--mono); color: var(--muted); }
.head code, .title { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.open .title { font-weight: 600; }
.strip { display: flex; }
.strip span { width: 1.35rem; text-align: center; font-size: .9rem; }
.legend { padding: .7rem .2rem .3rem; color: var(--muted); font-size: .78rem; }
.legend .strip span { font-size: .74rem; }
.lede span { white-space: nowrap; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
.error { color: var(--error); }
.failed { color: var(--failed); }
.detail { padding: .4rem 0 2rem; }
.question { font: 1.08rem/1.55 var(--serif); max-width: 46rem; margin: .2rem 0 .6rem; white-space: pre-wrap; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; margin: 1.2rem 0; }
.pair > div, .card { background: var(--raised); border: 1px solid var(--rule); border-radius: 6px;
  padding: .9rem 1rem; min-width: 0; }
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
