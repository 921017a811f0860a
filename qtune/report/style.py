"""The style sheet of the page: light and dark, narrow and wide, on paper.

Words never break below 500 px: tables are as wide as their words ask for and scroll inside the page, those of texts
stand there cell below cell. An edge behind which something is hidden has a shadow, which covers of the table's own
ground hide where it is scrolled to its end (Lea Verou, "Pure CSS scrolling shadows", 2012), a pixel farther out than it
ends, for widths are fractions. On paper nothing can be scrolled or opened, so everything wraps there and what is folded
stands open.
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6570; --faint: #d9dee4; --paper: #fff; --sheet: #f5f7f9;
  --one: #1f5fbf; --two: #b4460f; --mark: #ffe58a; --good: #1a7f4b; --bad: #b3261e; --unsure: #8a5a00;
  --edge: #5b6570; --shade: #1b1f2440; --none: #fff0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa5b1; --faint: #353c45; --paper: #14171b;
  --sheet: #1d2127; --one: #7fb0ff; --two: #ffab70; --mark: #5b4a00; --good: #5fd39a; --bad: #ff8a80;
  --unsure: #f0c05a; --edge: #9aa5b1; --shade: #e6e9ed40; --none: #14171b00; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 74rem; padding: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--faint); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; } p { margin: .4rem 0; max-width: 60rem; }
h1, h2, h3, p, dd, li, summary, figcaption { overflow-wrap: anywhere; }
.dim, figcaption span, dt, th { color: var(--dim); } .note { border-left: 4px solid var(--two); padding-left: .7rem; }

.verdicts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(14.5rem, 100%), 1fr)); gap: .8rem;
  margin: 1.2rem 0 .8rem; }
.verdict { background: var(--sheet); border: 1px solid var(--faint); border-top: 4px solid var(--dim);
  border-radius: 6px; padding: .6rem 1rem .7rem; }
.verdict p { margin: 0; } .verdict .answer { font-size: 1.45rem; font-weight: 650; line-height: 1.35; }
.verdict .said { margin: .15rem 0 0; font-size: .92rem; } .next { color: var(--dim); font-size: .88rem; }
.verdict .next { margin-top: .3rem; } .question { color: var(--dim); font-size: .85rem; }
.good { border-top-color: var(--good); } .good .answer { color: var(--good); }
.bad { border-top-color: var(--bad); } .bad .answer { color: var(--bad); }
.unsure { border-top-color: var(--unsure); } .unsure .answer { color: var(--unsure); }
.open .answer { color: var(--dim); } .others { margin: 0 0 1.2rem; }
.others p { margin: .25rem 0; font-size: .95rem; } .others .answer { font-weight: 600; }

.facts { display: flex; flex-wrap: wrap; gap: .3rem 1.8rem; margin: 1rem 0; border-top: 1px solid var(--faint);
  padding-top: .7rem; }
dt { font-size: .8rem; } dd { margin: 0; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .6rem 1.4rem; }
figure { margin: .6rem 0; min-width: 0; } figcaption { display: flex; flex-wrap: wrap; gap: .2rem 1rem;
  font-size: .9rem; }
.charts figure { display: grid; grid-template-rows: subgrid; grid-row: span 3; row-gap: .1rem; font-size: .9rem; }
.charts figcaption { display: contents; } .legend { display: flex; flex-wrap: wrap; gap: 0 1rem; }
figure > svg { display: block; width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--dim); }
svg .grid { stroke: var(--faint); } svg .solid, svg .dashed, svg .marked { fill: none; stroke-width: 1.8; }
svg .solid { stroke: var(--one); } svg .dashed { stroke: var(--dim); stroke-dasharray: 2 3; }
svg .marked { stroke: var(--two); stroke-dasharray: 6 4; } svg .dot { fill: var(--two); }
svg .cross { stroke: var(--bad); stroke-width: 2; }
svg.key { width: 30px; height: 12px; margin-right: .3rem; } .bar svg { width: 100%; height: 12px; display: block; }
.wide > svg { min-width: 44rem; max-width: none; }
.name { white-space: nowrap; } .bar { width: 100%; min-width: 8rem; } svg rect { fill: var(--one); }

.wide { overflow-x: auto; margin: .5rem 0 1.1rem; background:
    linear-gradient(to right, var(--paper) 50%, var(--none)) left -1px top / 2.4rem 100% no-repeat local,
    linear-gradient(to left, var(--paper) 50%, var(--none)) right -1px top / 2.4rem 100% no-repeat local,
    linear-gradient(to right, var(--edge) 2px, var(--shade) 2px, var(--none)) left / 1.1rem 100% no-repeat scroll,
    linear-gradient(to left, var(--edge) 2px, var(--shade) 2px, var(--none)) right / 1.1rem 100% no-repeat scroll; }
 table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1.1rem .25rem 0;
  border-bottom: 1px solid var(--faint); }
th { font-weight: 400; } .figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.figure { white-space: normal; } thead th { vertical-align: bottom; }
td { max-width: 34rem; min-width: 3rem; overflow-wrap: break-word; }
.answers { width: 100%; } .answers td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 9.5rem; }
.answers td:first-child { min-width: 1.2rem; width: 1.2rem; white-space: nowrap; }
.steps td:first-child { min-width: 6rem; width: 6rem; }
.values td { overflow-wrap: anywhere; min-width: 11rem; } .values td:first-child { white-space: nowrap; }
pre { background: var(--sheet); border: 1px solid var(--faint); border-radius: 6px; padding: .7rem; margin: .3rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 28rem; overflow-y: auto; font-size: .85rem; }
mark { background: var(--mark); color: inherit; font-weight: 600; border-bottom: 1.5px solid; }
code { font-size: .9em; } details { margin: .8rem 0; } summary { cursor: pointer; }
@media (max-width: 850px) { td, th { padding-right: .6rem; } }
@media (max-width: 500px) { body { padding: 1rem .8rem; } h1 { font-size: 1.35rem; } .facts { gap: .3rem 1.2rem; }
  .scores .figure { white-space: normal; } .scores td, .scores th { padding-right: .7rem; }
  .answers:not(.steps) thead, .values thead { display: none; } .answers:not(.steps) tr, .values tr { display: block;
    border-bottom: 1px solid var(--faint); padding: .35rem 0; }
  .answers:not(.steps) td, .values td, .values td:first-child { display: block; border: 0; padding: .05rem 0;
    min-width: 0; max-width: none; width: auto; white-space: pre-wrap; }
  .answers:not(.steps) td::before, .values td + td::before { content: attr(data-column); color: var(--dim);
    display: block; font-size: .8rem; } }

@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } pre { max-height: none; }
  .verdicts { grid-template-columns: repeat(3, 1fr); } .verdict .answer { font-size: 1.15rem; }
  .charts { grid-template-columns: repeat(2, 1fr); }
  h1, h2, h3, figcaption, summary { break-after: avoid; } figure, tr, .verdict, .facts { break-inside: avoid; }
  figure:has(> pre) { break-inside: auto; } thead { display: table-header-group; }
  .wide { overflow: visible; background: none; } table { max-width: 100%; } .wide > svg { min-width: 0; }
  td, .answers td, .values td { min-width: 0; max-width: none; overflow-wrap: anywhere; }
  .steps td:first-child { min-width: 6rem; width: 6rem; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
}
"""
