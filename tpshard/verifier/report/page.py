"""A verdict as one HTML page that needs no network: figures, a plot per tier, ranks, canaries, environment."""

import math
from collections.abc import Sequence
from html import escape

from tpshard.errors import TpshardError
from tpshard.verifier.report.verdict import Tier, Verdict, layer_of
from tpshard.verifier.report.wording import caught, figure, plain, reasons, rows

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 900, 270, 60, 12, 40
LEAST = 1e-18
"""Where an error of zero is drawn, on a logarithmic axis."""

_STYLE = """
:root { color-scheme: light dark; font-family: system-ui, sans-serif; --tone: 42%;
  --pass: #197a36; --fail: #c0262d; --unsure: #a15c00; }
@media (prefers-color-scheme: dark) {
  :root { --tone: 65%; --pass: #4fc873; --fail: #ff7a7a; --unsure: #e5a94a; } }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5; overflow-wrap: break-word; }
h2 { margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8884; vertical-align: top; }
th { white-space: nowrap; }
.wide { overflow-x: auto; margin: 1rem 0; } .wide svg { min-width: 36rem; } .wide table { min-width: 28rem; }
.pass, .caught { color: var(--pass); } .fail, .missed, .error { color: var(--fail); }
.inconclusive { color: var(--unsure); }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
circle { fill-opacity: .75; }
.grid { stroke: #8884; } .limit { stroke: var(--fail); stroke-width: 1.5; stroke-dasharray: 6 4; }
.key { display: inline-block; margin-right: 1rem; white-space: nowrap; }
.key svg { display: inline-block; width: .7em; height: .7em; min-width: 0; margin-right: .3em; }
"""


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(text: str) -> str:
    mark = f' class="{text}"' if text in ("pass", "fail", "inconclusive", "caught", "missed") else ""
    return f"<td{mark}>{escape(text)}</td>"


def _plot(tier: Tier, limit: float | None) -> str:
    """Error of every module of every rank, on a logarithmic axis, as inline SVG; what is infinite at the top."""
    modules = list(dict.fromkeys(f.module for f in tier.findings))
    index = {module: i for i, module in enumerate(modules)}
    finite = [max(f.error, LEAST) for f in tier.findings if math.isfinite(f.error)] or [1.0]
    values = finite if limit is None else [*finite, limit]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high + any(not math.isfinite(f.error) for f in tier.findings), low + 1)

    def x(i: int) -> float:
        return LEFT + (WIDTH - LEFT - 10) * (i + 0.5) / len(modules)

    def y(error: float) -> float:
        power = math.log10(max(error, LEAST)) if math.isfinite(error) else high
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - power) / (high - low)

    def line(kind: str, at: float) -> str:
        return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - 10}" y1="{at:.1f}" y2="{at:.1f}"/>'

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="error per module and rank">']
    for power in range(low, high + 1, max(1, math.ceil((high - low) / 8))):
        at = y(10.0**power)
        name = "0" if 10.0**power <= LEAST else f"1e{power}"
        parts.append(line("grid", at))
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{name}</text>')
    layers: dict[int, int] = {}  # each one's first module
    for i, layer in enumerate(map(layer_of, modules)):
        if layer is not None:
            layers.setdefault(layer, i)
    every = max(1, math.ceil(len(layers) / 20))
    for layer, i in layers.items():
        if layer % every == 0:
            parts.append(f'<text x="{x(i):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{layer}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">layer</text>')
    radius = 3 if len(modules) <= 150 else 2
    for f in tier.findings:
        title = escape(f"{f.module}, rank {f.rank}: {figure(f.error)}")
        where = f'cx="{x(index[f.module]):.1f}" cy="{y(f.error):.1f}" r="{radius}"'
        parts.append(f'<circle class="r{f.rank}" {where}><title>{title}</title></circle>')
    if limit is not None:
        parts.append(line("limit", y(limit)))
    return f'<div class="wide">{"".join(parts)}</svg></div>'


def _plots(verdict: Verdict) -> list[str]:
    """A plot for each tier that looked into modules."""
    dot = '<svg viewBox="0 0 10 10"><circle class="r{0}" cx="5" cy="5" r="5"/></svg>rank {0}'
    key = "".join(f'<span class="key">{dot.format(rank)}</span>' for rank in range(verdict.tp))
    parts = []
    for tier in verdict.tiers:
        if not tier.findings:
            continue
        limit = tier.thresholds.get("relative_error")
        note = "Dashed: the limit." if limit else "Of each tensor that differs, the first element that does."
        title = f"{tier.name}: " + ("relative error of each module" if limit else "how far apart elements are")
        note = f"<p>A dot per module and rank. {note}</p>"
        parts.append(f"<h2>{escape(title)}</h2>{_plot(tier, limit)}{note}<p>{key}</p>")
    return parts


def to_html(verdict: Verdict) -> str:
    """The page of a verdict."""
    what = f"{verdict.shards} ({verdict.mesh_text}) against {verdict.source} ({verdict.model_type})"
    parts = [f"<p>{escape(what)}</p>"]
    if verdict.reason:
        parts.append(f"<p><strong>{escape(verdict.reason)}</strong></p>")
    parts += [f"<p>Warning: {escape(warning)}</p>" for warning in verdict.warnings]
    parts.append(_table(("tier", "status", "figures", "worst place"), rows(verdict)))
    parts += [f"<p>{escape(reason)}</p>" for reason in reasons(verdict)]
    parts += _plots(verdict)
    if verdict.bytes_per_rank:
        sizes = [(str(rank), f"{size:,}") for rank, size in enumerate(verdict.bytes_per_rank)]
        parts.append("<h2>Bytes per rank</h2>" + _table(("rank", "bytes"), sizes))
    if verdict.canaries:
        birds = [(c.tier, c.name, c.status, figure(c.error)) for c in verdict.canaries]
        parts.append(f"<h2>Canaries</h2><p>{escape(caught(verdict))}.</p>")
        parts.append(_table(("tier", "fault", "status", "error"), birds))
    about = [(key.replace("_", " "), plain(value)) for key, value in {**verdict.settings, **verdict.volatile}.items()]
    parts.append("<h2>Settings and environment</h2>" + _table(("what", "value"), about))
    return _page(verdict.verdict, "".join(parts), verdict.tp)


def error_page(error: TpshardError, shards: str) -> str:
    """The page of a verification that ended in an error."""
    about = [(key, str(value)) for key, value in error.to_json().items() if value is not None and key != "message"]
    body = f"<p>{escape(shards)}</p><p><strong>{escape(error.message)}</strong></p>" + _table(("what", "value"), about)
    return _page("error", body, 0)


def _page(verdict: str, body: str, ranks: int) -> str:
    colours = "".join(f".r{rank} {{ fill: hsl({360 * rank // ranks} 75% var(--tone)); }} " for rank in range(ranks))
    title = f"tpshard verify: {verdict}"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    head += f"<style>{_STYLE}{colours}</style>"
    top = f'<h1>tpshard verify: <span class="{verdict}">{verdict}</span></h1>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{top}{body}</body></html>\n'
