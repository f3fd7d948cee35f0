"""Runs side by side on one HTML page that needs nothing else: curves, final figures, what their settings differ in."""

import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from pretrain.errors import UserError
from pretrain.files import atomic_file, check_suffix, only_writer
from pretrain.train.changes import is_fine_tuning
from pretrain.train.logging import METRICS_FILE, read_metrics
from pretrain.train.run import CONFIG, Run

COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#7f7f7f")
_MOST_POINTS = 500
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 560, 300, 62, 42, 12, 14

Points = list[tuple[float, float]]


class _Run(NamedTuple):
    name: str
    colour: str
    step: int
    config: dict[str, Any]
    result: dict[str, Any]
    curves: dict[str, Points]
    fine_tuning: bool


def write_report(paths: list[Path], out: Path) -> None:
    """Write the page.

    Args:
        paths: Run directories.
        out: The HTML file, whole or not at all; it is replaced.

    Raises:
        UserError: If a path is no run, or ``out`` does not end in ``.html``.
    """
    check_suffix(out, ".html")
    runs = [_read(path, COLOURS[i % len(COLOURS)], paths) for i, path in enumerate(paths)]
    with only_writer(out), atomic_file(out, replace=True) as file:
        file.write(page(runs))


def _read(path: Path, colour: str, paths: list[Path]) -> _Run:
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: no run ({CONFIG} is missing); --html takes run directories")
    run = Run(path)
    curves: dict[str, Points] = {}
    for step, name, value in read_metrics(path / METRICS_FILE):
        if math.isfinite(value):
            curves.setdefault(name, []).append((step, value))
    unique = len({other.name for other in paths}) == len(paths)
    name = path.resolve().name if unique else str(path)
    config = run.config or {}
    return _Run(name, colour, run.step, dict(_flat(config)), run.result or {}, curves, is_fine_tuning(config))


def page(runs: list[_Run]) -> str:
    """The whole page as HTML."""
    title = ", ".join(run.name for run in runs)
    legend = "".join(f'<li><i style="background:{run.colour}"></i>{html.escape(run.name)}</li>' for run in runs)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style></head><body>
<h1>{"Runs side by side" if len(runs) > 1 else html.escape(title)}</h1>
<ul class="legend">{legend}</ul>
<section class="charts">{"".join(_charts(runs))}</section>
<h2>Figures</h2>
<div class="wide">{_figures(runs)}</div>
<h2>{"Settings that differ" if len(runs) > 1 else "Settings"}</h2>
<div class="wide">{_settings(runs)}</div>
</body></html>
"""


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1180px;margin:1.5rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:1.6rem 0 .4rem}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.4rem 0 1rem}
.legend i{display:inline-block;width:1.1em;height:.35em;margin-right:.45em;vertical-align:middle;border-radius:2px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:1rem 1.4rem}
figure{margin:0;break-inside:avoid}figcaption{font-weight:600}figcaption small{font-weight:400;color:#666}
svg{width:100%;height:auto;display:block;overflow:visible}svg text{font:12px system-ui,sans-serif;fill:#555}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.22rem .8rem;border-bottom:1px solid #e4e4e4;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal}
@media (max-width:500px){svg text{font-size:17px}}
@media print{body{max-width:none;margin:0;font-size:11px}.charts{grid-template-columns:1fr 1fr}.wide{overflow:visible}
th,td{white-space:normal}}
"""


def _charts(runs: list[_Run]) -> Iterator[str]:
    rates = sorted({name for run in runs for name in run.curves if "/" not in name or name.startswith("lr-")})
    if any(run.fine_tuning for run in runs):  # whose losses and accuracies are those of labels
        loss, validation_loss, accuracy = "running mean", "", "on the validation split"
    else:
        loss, validation_loss = "nats per masked token, running mean", "nats per masked token, all of them &lt;mask&gt;"
        accuracy = "on the masked validation tokens"
    drawn = [
        ("Training loss", loss, ["train/loss"], True),
        ("Validation loss", validation_loss, ["val/loss"], False),
        ("Learning rate", ", ".join(map(html.escape, rates)), rates, False),
        ("Gradient norm", "before clipping, running mean", ["train/grad_norm"], True),
        ("Speed", "real tokens per second, running mean", ["throughput/tokens_per_second"], True),
        ("Accuracy", accuracy, ["val/accuracy"], False),
    ]
    for title, subtitle, names, smooth in drawn:
        lines = [
            (run.colour, _reduced(run.curves[name], smooth), len(run.curves[name]) < 40)
            for run in runs
            for name in names
            if name in run.curves
        ]
        if lines:
            head = f"<figcaption>{title} <small>{subtitle}</small></figcaption>"
            yield f"<figure>{head}{_chart(lines, cut=smooth)}</figure>"


def _reduced(points: Points, smooth: bool) -> Points:
    """At most so many points: means of equal stretches, each at its last step; all of a short curve."""
    size = -(-len(points) // (_MOST_POINTS // 5 if smooth else _MOST_POINTS))
    if size <= 1:
        return points
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [(part[-1][0], float(np.mean([value for _, value in part]))) for part in parts]


def _chart(lines: list[tuple[str, Points, bool]], cut: bool) -> str:
    """Lines of a colour, with dots or without; with ``cut``, without the heights that only the first steps reach."""
    xs = [x for _, points, _ in lines for x, _ in points]
    ys = [y for _, points, _ in lines for _, y in points]
    low, high = min(ys), float(np.quantile(ys, 0.98 if cut else 1.0))
    x_ticks, y_ticks = _ticks(0, max(xs)), _ticks(low, high)
    x_end, (y_low, y_high) = max(max(xs), 1), (min(low, y_ticks[0]), max(high, y_ticks[-1]))
    span = (y_high - y_low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / x_end * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - (min(y, y_high) - y_low) / span * (_HEIGHT - _BOTTOM - _TOP)

    parts = []
    for tick in y_ticks:
        _, y = place(0, tick)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#e8e8e8"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{tick:,.0f}</text>')
    middle = (_LEFT + _WIDTH) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">optimizer step</text>')
    parts.append(f'<path d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" stroke="#888"/>')
    for colour, points, dots in lines:
        placed = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if dots:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that cover a range."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(span / step - 5))
    first = math.floor(low / step + 1e-9)
    return [step * i for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-4):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _figures(runs: list[_Run]) -> str:
    rows: list[tuple[str, list[str]]] = [("optimizer steps", [f"{run.step:,}" for run in runs])]
    wanted = [
        ("parameters", "parameters", "{:,}"),
        ("tokens seen", "tokens_seen", "{:,}"),
        ("epochs", "epochs", "{:.2f}"),
        ("validation loss", "val/loss", "{:.4f}"),
        ("validation perplexity", "val/perplexity", "{:.3f}"),
        ("&emsp;with one token masked at a time", "val/pseudo_perplexity", "{:.3f}"),
        ("&emsp;unigram", "unigram_perplexity", "{:.3f}"),
        ("&emsp;bigram", "bigram_perplexity", "{:.3f}"),
        ("&emsp;BLOSUM62", "blosum62_perplexity", "{:.3f}"),
        ("validation accuracy", "val/accuracy", "{:.2%}"),
    ]
    for label, key, form in wanted:
        if any(key in run.result for run in runs):
            rows.append((label, [form.format(run.result[key]) if key in run.result else "–" for run in runs]))
    # Of a fine-tuning run, "validation" holds its metrics.
    sets = [{} if run.fine_tuning else run.result.get("validation", {}) for run in runs]
    for name in sorted({name for held in sets for name in held if name}):
        found = [held.get(name) for held in sets]
        cells = [f"{one['perplexity']:.3f}" if one else "–" for one in found]
        rows.append((f"validation perplexity, {html.escape(name)}", cells))
    latest = [
        ("training loss, last 50 steps", "train/loss", 50),
        ("tokens per second", "throughput/tokens_per_second", 0),
    ]
    for label, key, last in latest:
        if any(key in run.curves for run in runs):
            cells = [_number(_typical(run.curves[key], last)) if key in run.curves else "–" for run in runs]
            rows.append((label, cells))
    return _table([""] + [run.name for run in runs], rows)


def _typical(points: Points, last: int) -> float:
    values = [value for _, value in points]
    return float(np.mean(values[-last:]) if last else np.median(values))


def _settings(runs: list[_Run]) -> str:
    names = sorted({name for run in runs for name in run.config})
    if len(runs) > 1:
        names = [name for name in names if len({str(run.config.get(name)) for run in runs}) > 1]
    if not names:
        return "<p>None.</p>"
    rows = [(html.escape(name), [html.escape(_yaml(run.config.get(name))) for run in runs]) for name in names]
    return _table([""] + [run.name for run in runs], rows)


def _yaml(value: Any) -> str:
    return "–" if value is None else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _table(head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """Labels and cells are HTML already; the head is escaped here."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr><td>{label}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for label, cells in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
