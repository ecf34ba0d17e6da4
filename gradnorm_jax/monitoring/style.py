"""How a report looks: light, dark, on paper, and at every width."""

CSS = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d2228; --soft: #5d6670;
  --rule: #e1e4e6; --grad: #2868a8; --limit: #b8690b; --bad: #c9293a; --zero: #8d9196;
  --usual: #00876c; --warn: #945200; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e8eaec;
  --soft: #a0a8b0; --rule: #30363c; --grad: #79b0e8; --limit: #e6a04a; --bad: #f2707c;
  --zero: #80868c; --usual: #4cc2a5; --warn: #e6a04a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; font-weight: 650; }
h2 { font-size: 1.125rem; line-height: 1.3; margin: 0; font-weight: 650; }
h3 { font-size: .875rem; margin: 0 0 .5rem; font-weight: 600; }
p { margin: 0; max-width: 44rem; }
.lead { font-size: 1.125rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
  gap: 1.25rem 1.5rem; margin: 2.25rem 0 0; padding-top: 1.25rem;
  border-top: 1px solid var(--rule); }
dt, dd.note { font-size: .8125rem; line-height: 1.35; color: var(--soft); }
dd { margin: 0; }
dd.value { font-size: 1.5rem; line-height: 1.35; }
.alarming dd.value { color: var(--bad); }
figure, .findings { margin: 3.5rem 0 0; }
.findings ol { list-style: none; margin: 1rem 0 0; padding: 0; display: grid;
  gap: 1.5rem; }
.findings ol > li { border-left: 3px solid var(--soft); padding-left: 1rem; }
.findings li.error { border-color: var(--bad); }
.findings li.warning { border-color: var(--warn); }
.findings h3 { font-size: 1rem; margin: 0; }
.findings h3 b { color: var(--soft); }
.error h3 b { color: var(--bad) !important; }
.warning h3 b { color: var(--warn) !important; }
.findings h3 span { font-weight: 400; color: var(--soft); }
.findings a { color: inherit; }
.findings .where { font-weight: 600; font-size: .9375rem; }
.findings .advice { display: grid; grid-template-columns: 3.5rem 1fr; }
.findings .advice i { font-style: normal; color: var(--soft); }
.findings details { margin-top: .375rem; font-size: .875rem; }
.findings summary { font-weight: 400; color: var(--soft); }
.findings details :is(p, ul) { margin: .5rem 0 0; max-width: 44rem; }
.findings details ul { padding-left: 1.25rem; }
figcaption { margin-bottom: 1.25rem; }
figcaption p { color: var(--soft); font-size: .9375rem; margin-top: .25rem; }
.chart { display: grid; grid-template-columns: 3.25rem minmax(0, 1fr);
  column-gap: .5rem; font-size: .75rem; line-height: 1; color: var(--soft); }
.chart.trace { grid-template-columns: 3.25rem minmax(0, 1fr) clamp(2.5rem, 12%, 7rem); }
.y { grid-column: 1; }
.plot, .x { grid-column: 2; }
.plot.histogram { grid-column: 3; margin-right: 0 !important;
  border-left: 1px solid var(--rule); }
.chart.rows { grid-template-columns: clamp(6.5rem, 34%, 14rem) minmax(0, 1fr); }
.plot, .y, .x { position: relative; }
.trace .plot { height: clamp(13rem, 30vw, 19rem); }
.trace .strip { height: 1.125rem; margin-top: .375rem; }
.rows .plot { height: var(--height); }
.plot svg { overflow: visible; }
.plot svg, .plot img { position: absolute; inset: 0; width: 100%; height: 100%; }
.plot img { image-rendering: pixelated; }
.plot, .scale > div:first-child { border-bottom: 1px solid var(--rule); }
.plot.strip { border: 1px solid var(--rule); }
.y span { position: absolute; right: 0; max-width: 100%; transform: translateY(-50%);
  line-height: 1.25; white-space: pre; display: flex; }
.y i { font-style: normal; overflow: hidden; text-overflow: ellipsis; }
.y.strip span { top: 50%; }
.x { height: 1.375rem; margin-right: 1.25rem; }
.x, .rows .plot, .trace .plot { margin-right: 1.25rem; }
.x span { position: absolute; top: .4375rem; transform: translateX(-50%);
  white-space: nowrap; }
.y :is(.error, .warning, .info) { color: var(--bad); font-weight: 600; }
.y .warning { color: var(--warn); }
.y .info { color: var(--ink); }
.moments { height: 1.75rem; }
.moments span { top: auto; bottom: .125rem; text-align: center; color: var(--soft); }
.moments b { display: block; font-weight: 600; }
.moments span::after { content: "\\25BC"; font-size: .5rem; }
@media (max-width: 44rem) { .moments .wide { display: none; }
  .plot img { image-rendering: auto; } }
.moments .error { color: var(--bad); }
.moments .warning { color: var(--warn); }
.pair { display: grid; gap: 2rem 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.scale { width: min(20rem, 100%); margin: .75rem 0 0 1rem;
  font-size: .75rem; line-height: 1; color: var(--soft); }
.scale > div:first-child { height: .625rem; margin-right: 1.25rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .75rem 0 0;
  padding: 0; list-style: none; font-size: .8125rem; color: var(--soft); }
.legend i { display: inline-block; width: 1.125rem; height: .625rem;
  margin-right: .4375rem; }
svg path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round;
  stroke-linecap: round; }
path.grid { stroke: var(--rule); stroke-width: 1; }
path.middle { stroke: var(--grad); stroke-width: 1.75; }
path.top { stroke: var(--grad); stroke-width: 1; stroke-opacity: .65; }
path.limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 6 4; }
path.band { fill: var(--grad); fill-opacity: .24; }
path.dot { stroke: var(--grad); stroke-width: 8; }
path.dot.small { stroke-width: 5; }
path.dot.part { stroke-width: 4; stroke-opacity: .55; }
path.dot.part.small { stroke-width: 3; }
path.dot.part.strange { stroke-width: 6; stroke-opacity: 1; }
path.block { stroke: var(--paper); stroke-width: 1; }
path.usual { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 2 3; }
path.dot.strange { stroke: var(--bad); }
svg rect { shape-rendering: crispEdges; }
rect.bad { fill: var(--bad); fill-opacity: .45; }
rect.zero { fill: var(--zero); }
rect.clipped { fill: var(--limit); }
rect.share { fill: var(--grad); fill-opacity: .6; }
rect.mark { fill: var(--soft); }
rect.mark.error { fill: var(--bad); }
rect.mark.warning { fill: var(--warn); }
rect.usual { fill: var(--usual); fill-opacity: .15; }
rect.hover { fill: transparent; }
rect.hover:hover { fill: var(--ink); fill-opacity: .09; }
i.middle, i.top, i.limit { vertical-align: .25em; height: 0 !important;
  border-top: 2px solid var(--grad); }
i.top { border-top-width: 1px; opacity: .6; }
i.limit { border-top: 2px dashed var(--limit); }
i.band { background: var(--grad); opacity: .24; }
i.usual { vertical-align: .25em; height: 0 !important;
  border-top: 1px dashed var(--ink); }
i.share { background: var(--grad); opacity: .6; }
i.mark { background: var(--warn); width: .3125rem !important; }
i.band.usual { background: var(--usual); opacity: .2; border: 0;
  height: .625rem !important; vertical-align: baseline; }
i.dots, i.parts, i.strange { width: .5rem !important; height: .5rem !important;
  border-radius: 50%; background: var(--grad); }
i.parts { width: .3125rem !important; height: .3125rem !important; opacity: .55;
  vertical-align: .125em; }
i.strange { background: var(--bad); }
i.clipped { background: var(--limit); }
i.bad { background: var(--bad); opacity: .45; }
i.nonfinite { background: #d02f3e; }
i.zero { background: #9a9a9a; }
i.beyond { background: #fde725; }
details { margin-top: 3.5rem; }
summary { cursor: pointer; font-weight: 650; }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .8125rem; line-height: 1.4; }
th, td { padding: .3125rem .75rem; text-align: right; font-weight: 400;
  overflow-wrap: normal; border-bottom: 1px solid var(--rule); white-space: nowrap; }
thead th { color: var(--soft); vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { min-width: 10rem; white-space: normal; overflow-wrap: anywhere; }
td.strange { color: var(--bad); font-weight: 600; }
footer { margin-top: 3.5rem; font-size: .8125rem; color: var(--soft); }
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444;
    --rule: #ccc; --grad: #2868a8; --limit: #b8690b; --bad: #c9293a; --zero: #8d9196;
    --usual: #00876c; --warn: #945200; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { padding: 0; }
  figure, dl, .findings li { break-inside: avoid; }
  details::details-content { content-visibility: visible; }
}
"""
