"""The plots of a report: inline SVG whose colours are the page's, so that they follow light and dark.

matplotlib draws with colours that stand for names; they are replaced by CSS variables afterwards. Text
becomes paths, and whatever would name another place than this page is taken out.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llmkern.report.records import PipelineReport, StageRecord
from llmkern.report.view import BY_KEY

SERIES = 8
_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"
_COLOURS = [f"#0203{index:02x}" for index in range(SERIES)]
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line"} | {
    colour: f"--series-{index}" for index, colour in enumerate(_COLOURS)
}
_MARKERS = "osD^vPX*"
_PANELS = 3  # beside each other
_WIDTHS = {False: 6.4, True: 13.0}  # inches, of a plot in half of the page and in all of it


@dataclass(frozen=True)
class Plot:
    """A drawing with what is said of it.

    Attributes:
        title, caption: beside it.
        svg: an <svg> element.
        wide: takes the whole width of the page.
    """

    title: str
    caption: str
    svg: str
    wide: bool = False


def plots(report: PipelineReport) -> list[Plot]:
    """Those for which the report has figures."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "path",
        "svg.hashsalt": "llmkern",
        # Labels are the user's: a dollar sign in them is no formula.
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.color": _INK,
        "axes.edgecolor": _MUTED,
        "axes.labelcolor": _INK,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "grid.color": _GRID,
        "legend.frameon": False,
        "legend.labelcolor": _INK,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A name in letters that the font lacks is drawn as boxes; the table has it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        others = [_size(report), _sensitivity(report), _layers(report)]
        narrow = sum(plot is not None and not plot.wide for plot in others)
        # Two narrow plots stand beside each other; an odd one would leave a hole.
        made = [*others[:2], _loss(report, wide=narrow % 2 == 0), others[2]]
    return [plot for plot in made if plot is not None]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # lays text out; no window system, no global state
    return figure


def _svg(figure: Any, name: str, label: str) -> str:
    """The figure as an element for the page, its ids its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _plain(axis: Any, *, log: bool) -> None:
    """Tick labels without formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if log:
        low, high = axis.get_view_interval()
        decades = math.log10(high / low) if low > 0 else 1
        subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _size(report: PipelineReport) -> Plot | None:
    # A model that is in memory only has no size on disk.
    key = "disk" if all(BY_KEY["disk"].value(r) for r in report.stages) else "memory"
    points = [
        (x, y, record)
        for record in report.stages
        if (x := BY_KEY[key].value(record)) is not None
        and (y := BY_KEY["perplexity"].value(record)) is not None
        and math.isfinite(y)
    ]
    if len(points) < 2:
        return None
    figure = _figure(_WIDTHS[False], 4.0)
    axes = figure.subplots()
    step = 1e9 if max(x for x, _, _ in points) >= 2e9 else 1e6
    xs, ys = [x / step for x, _, _ in points], [y for _, y, _ in points]
    if report.in_sequence:
        axes.plot(xs, ys, color=_MUTED, linewidth=1, zorder=1)
    for x, y, (_, _, record) in zip(xs, ys, points, strict=True):
        colour = _MUTED if record is report.stages[0] else _COLOURS[0]
        axes.scatter(x, y, s=42, color=colour, zorder=2)
    log = max(ys) > 3 * min(ys)
    if log:
        axes.set_yscale("log")
    axes.margins(0.14, 0.14)
    _plain(axes.yaxis, log=log)
    axes.set_xlabel(f"{BY_KEY[key].phrase} ({'GB' if step == 1e9 else 'MB'})")
    axes.set_ylabel("perplexity")
    axes.grid(linewidth=0.6)
    _place_labels(axes, xs, ys, [record.label for _, _, record in points], line=report.in_sequence)
    caption = "Lower left is better." + (
        " The line follows the stages." if report.in_sequence else ""
    )
    broken = [
        f"{record.label} ({BY_KEY['perplexity'].show(y)})"
        for record in report.stages
        if (y := BY_KEY["perplexity"].value(record)) is not None and not math.isfinite(y)
    ]
    if broken:
        caption += f" Off the scale: {', '.join(broken)}."
    return Plot("Size against perplexity", caption, _svg(figure, "size", "size against perplexity"))


def _place_labels(
    axes: Any, xs: Sequence[float], ys: Sequence[float], labels: Sequence[str], *, line: bool
) -> None:
    """Write each label beside its point, where it covers the least of what is there."""
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    centres = [axes.transData.transform(point) for point in zip(xs, ys, strict=True)]
    radius = 5.0 * figure.dpi / 72
    taken = [Bbox.from_extents(x - radius, y - radius, x + radius, y + radius) for x, y in centres]
    if line:
        for (x0, y0), (x1, y1) in pairwise(centres):
            for part in (i / 40 for i in range(41)):
                x, y = x0 + part * (x1 - x0), y0 + part * (y1 - y0)
                taken.append(Bbox.from_extents(x - 2, y - 2, x + 2, y + 2))
    frame = axes.get_window_extent(renderer)
    spots = [
        (dx, dy, "left" if dx > 0 else "right" if dx < 0 else "center")
        for dx, dy in ((8, 0), (-8, 0), (0, 10), (0, -10), (7, 8), (-7, 8), (7, -8), (-7, -8))
    ] + [(dx, dy, "left") for dx in (9, 14) for dy in (18, -18, 28, -28)]
    for x, y, label in zip(xs, ys, labels, strict=True):
        text = axes.annotate(
            label if len(label) <= 32 else label[:31] + "…",
            (x, y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
        best: tuple[float, tuple[float, float, str], Any] | None = None
        for spot in spots:
            text.set_position(spot[:2])
            text.set_horizontalalignment(spot[2])
            box = text.get_window_extent(renderer)
            covered = sum(_overlap(box, other) for other in taken)
            covered += box.width * box.height - _overlap(box, frame)
            if best is None or covered < best[0] - 1e-9:
                best = (covered, spot, box)
        assert best is not None
        text.set_position(best[1][:2])
        text.set_horizontalalignment(best[1][2])
        taken.append(best[2])


def _overlap(a: Any, b: Any) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def _block_number(name: str) -> int | None:
    """The number of its block in a dotted name: the first part that is one."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def layer_errors(record: StageRecord) -> dict[str, list[tuple[int, float]]]:
    """Relative loss of each layer by the driver's report: kind of layer -> [(block, loss)].

    Layers without a loss, and those that lost nothing, are left out: the axis is logarithmic.
    """
    errors: dict[str, list[tuple[int, float]]] = {}
    for line in [*(record.driver.get("layers") or []), *(record.driver.get("widths") or [])]:
        block, loss = _block_number(str(line.get("name", ""))), line.get("relative_loss")
        if block is not None and loss is not None and 0 < loss < math.inf:
            errors.setdefault(str(line["name"]).rpartition(".")[2], []).append((block, float(loss)))
    return errors


def _layers(report: PipelineReport) -> Plot | None:
    found = [(record.label, layer_errors(record)) for record in report.stages]
    found = [(label, errors) for label, errors in found if errors]
    if not found:
        return None
    columns = min(_PANELS, len(found))
    lines = -(-len(found) // columns)
    wide = columns > 2
    figure = _figure(_WIDTHS[wide], 2.7 * lines + 0.5 if wide else 4.0)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    kinds = list(dict.fromkeys(kind for _, errors in found for kind in errors))
    style = {kind: (_COLOURS[i % SERIES], _MARKERS[i % SERIES]) for i, kind in enumerate(kinds)}
    handles: dict[str, Any] = {}
    for axes, (label, errors) in zip(panels.flat, found, strict=False):
        for kind, series in errors.items():
            colour, marker = style[kind]
            xs, ys = zip(*sorted(series), strict=True)
            (handles[kind],) = axes.plot(
                xs, ys, color=colour, marker=marker, markersize=4, linewidth=1
            )
        axes.set_yscale("log")
        axes.set_title(label)
        _blocks_axis(axes)
        axes.grid(linewidth=0.6)
    for axes in panels.flat[len(found) :]:
        axes.set_visible(False)
    _plain(panels[0, 0].yaxis, log=True)
    for line in panels:
        line[0].set_ylabel("relative loss")
    figure.legend(
        [handles[kind] for kind in kinds],
        kinds,
        loc="outside lower center",
        ncols=min(len(kinds), 8 if wide else 4),
    )
    caption = (
        "What each layer lost, as a fraction of the energy of its output on the calibration data "
        "(of its weights, for methods without data)."
    )
    svg = _svg(figure, "layers", "relative loss of each layer")
    return Plot("Error by layer", caption, svg, wide)


def _blocks_axis(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block")


def _sensitivity(report: PipelineReport) -> Plot | None:
    found = [
        record
        for record in report.stages
        if any(math.isfinite(value) for value in record.sensitivity.values())
    ]
    if not found:
        return None
    figure = _figure(_WIDTHS[False], 4.0)
    axes = figure.subplots()
    width = 0.8 / len(found)
    for index, record in enumerate(found):
        xs = [
            number if (number := _block_number(name)) is not None else place
            for place, name in enumerate(record.sensitivity)
        ]
        shift = (index - (len(found) - 1) / 2) * width
        axes.bar(
            [x + shift for x in xs],
            [value if math.isfinite(value) else 0.0 for value in record.sensitivity.values()],
            width * 0.92,
            color=_COLOURS[index % SERIES],
            label=record.label,
        )
    _blocks_axis(axes)
    axes.set_ylabel("KL (nats per token)")
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2)
    caption = "KL to the model before the stage when one block alone is replaced by the stage's."
    if not all(math.isfinite(value) for record in found for value in record.sensitivity.values()):
        caption += " Blocks without a bar have no finite one."
    return Plot(
        "Sensitivity by block", caption, _svg(figure, "sensitivity", "sensitivity by block")
    )


def loss_curves(record: StageRecord) -> dict[str, list[tuple[int, float]]]:
    """Losses of a stage's training by its driver's report: name -> [(step, loss)]."""
    curves: dict[str, list[tuple[int, float]]] = {}
    training = record.driver.get("training") or {}
    for step in training.get("steps") or []:
        for name, value in step["metrics"].items():
            if math.isfinite(value):
                curves.setdefault(name, []).append((step["step"], value))
    recovery = record.driver.get("recovery_loss") or []
    if recovery:
        curves["recovery"] = [
            (step, loss) for step, loss in enumerate(recovery, 1) if math.isfinite(loss)
        ]
    return {name: curve for name, curve in curves.items() if curve}


def _loss(report: PipelineReport, *, wide: bool) -> Plot | None:
    found = [(record.label, loss_curves(record)) for record in report.stages]
    lines = [
        (f"{label}: {name}", curve) for label, curves in found for name, curve in curves.items()
    ]
    if not lines:
        return None
    figure = _figure(_WIDTHS[wide], 4.0)
    axes = figure.subplots()
    for index, (label, curve) in enumerate(lines):
        colour = _COLOURS[index % SERIES]
        xs, ys = zip(*curve, strict=True)
        noisy = len(ys) >= 40
        axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.3 if noisy else 1)
        if noisy:
            axes.plot(xs, _smooth(ys), color=colour, linewidth=1.6)
        axes.plot([], [], color=colour, label=label)
    _steps_axis(axes)
    axes.set_ylabel("loss")
    axes.grid(linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2)
    caption = (
        "Every step; the stronger lines are running means."
        if any(len(curve) >= 40 for _, curve in lines)
        else "Every step."
    )
    return Plot("Loss of training", caption, _svg(figure, "loss", "loss of training"), wide)


def _steps_axis(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")


def _smooth(values: Sequence[float]) -> list[float]:
    """Running means over a twentieth of the curve."""
    width = max(1, len(values) // 20)
    return [
        sum(values[max(0, i - width) : i + width + 1])
        / len(values[max(0, i - width) : i + width + 1])
        for i in range(len(values))
    ]
