"""The report's style: light and dark by the reader's setting, readable from 390 pixels of width up."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #57606a; --rule: #d0d7de; --link: #0b57d0;
  --policy: #0b62c4; --expert: #b3500b; --warn-page: #fff4d6; --warn-edge: #9a6700;
  --for1: #e3effc; --for2: #c3dffb; --for3: #9ccbf8; --for4: #74b3f3;
  --against1: #fdeadb; --against2: #fbd3b1; --against3: #f7b581; --against4: #f19a55;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --card: #1d232a; --ink: #e6e9ed; --soft: #a5afba; --rule: #3a434d; --link: #8ab4f8;
    --policy: #6cb0ff; --expert: #f2a25c; --warn-page: #332a10; --warn-edge: #d8a526;
    --for1: #14273d; --for2: #173556; --for3: #1a4573; --for4: #1d5590;
    --against1: #35220f; --against2: #4d2f11; --against3: #663c13; --against4: #804a15;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 1240px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; }
.card h3 { margin: 0 0 .25rem; }
p { margin: .25rem 0; max-width: 48rem; }
.soft, .note { color: var(--soft); }
.soft { font-size: .9rem; }
.tiles, .charts { display: grid; gap: .75rem; margin: .75rem 0; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .6rem .75rem; margin: 0; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.chart { display: block; width: 100%; height: auto; }
.chart text { font: 11px system-ui, "DejaVu Sans", sans-serif; fill: var(--soft); }
.grid { stroke: var(--rule); stroke-width: 1; }
.level { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 2 3; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.policy { stroke: var(--policy); }
.line.expert { stroke: var(--expert); stroke-dasharray: 6 4; }
.mark.policy { fill: var(--policy); }
.mark.expert { fill: var(--card); stroke: var(--expert); stroke-width: 1.5; }
.bar.policy { fill: var(--policy); fill-opacity: .55; }
.bar.expert { fill: url(#hatch); stroke: var(--expert); stroke-width: 1.2; }
.hatch { stroke: var(--expert); stroke-width: 1.6; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .9rem; padding: 0; margin: .5rem 0; }
.legend li { display: flex; align-items: center; gap: .4rem; list-style: none; }
.legend svg { width: 34px; height: 14px; flex: none; }
.alerts { list-style: none; padding: 0; margin: .5rem 0; display: grid; gap: .5rem; }
.alerts li {
  background: var(--warn-page); border-left: 5px solid var(--warn-edge); border-radius: 4px; padding: .5rem .75rem;
}
.alerts p { max-width: none; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: none; line-height: 1.75; margin: .35rem 0; }
.prompt { color: var(--soft); font-style: italic; }
.for, .against { border-radius: 2px; text-decoration-line: underline; text-underline-offset: 4px; }
.for { text-decoration-style: solid; text-decoration-color: var(--policy); }
.against { text-decoration-style: dotted; text-decoration-color: var(--expert); text-decoration-thickness: 2px; }
.for.s1 { background: var(--for1); } .for.s2 { background: var(--for2); }
.for.s3 { background: var(--for3); } .for.s4 { background: var(--for4); }
.against.s1 { background: var(--against1); } .against.s2 { background: var(--against2); }
.against.s3 { background: var(--against3); } .against.s4 { background: var(--against4); }
.samples { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.samples h4 { margin: 0; font-size: .95rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--link); }
.numbers { columns: 9rem; font-size: .85rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .75rem .2rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td { overflow-wrap: anywhere; }
.figures td { white-space: nowrap; }
code { font-size: .9em; }
a { color: var(--link); }
@media print { details:not([open]) > *:not(summary) { display: none; } }
"""
