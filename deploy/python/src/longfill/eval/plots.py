"""The PNGs: needles by depth and length, scores by length, perplexity by position, and what methods cost."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy

from .errors import UsageError
from .report import Row
from .results import Record
from .runner import DENSE

GRID_TASKS = ("niah-end", "niah-spread")
TEXT_TASK = "perplexity"
_DEPTHS = 10  # rows of a grid whose questions are anywhere
_MARKERS = "osD^vP*<>"


def require_matplotlib() -> None:
    """Before hours of work, not after."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("plots need the Python package matplotlib, which is missing: pip install matplotlib, or --no-plots") from None
    matplotlib.use("Agg")


def draw(folder: pathlib.Path, records: Sequence[Record], rows: Sequence[Row]) -> list[pathlib.Path]:
    """Draws what there is something to draw of, and returns the files; they replace those of an earlier run."""
    files = []
    styles = _styles(_unique([record["method"] for record in records]))
    for task in GRID_TASKS:
        of_task = [record for record in records if record["task"] == task]
        if of_task:
            files.append(_save(_draw_grid(task, of_task), folder / f"grid-{task}.png"))
    scored = [row for row in rows if row["task"] != TEXT_TASK]
    if scored:
        files.append(_save(_draw_scores(scored, styles), folder / "scores.png"))
        files.append(_save(_draw_costs(scored, styles), folder / "costs.png"))
    of_text = [record for record in records if record["task"] == TEXT_TASK]
    if of_text:
        files.append(_save(_draw_perplexity(of_text, styles), folder / "perplexity.png"))
    return files


def _save(figure: Any, path: pathlib.Path) -> pathlib.Path:
    import matplotlib.pyplot

    figure.savefig(path, dpi=90)
    matplotlib.pyplot.close(figure)
    return path


def _panels(count: int, most_columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot

    columns = min(count, most_columns)
    lines = math.ceil(count / columns)
    figure, axes = matplotlib.pyplot.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False,
                                              layout="constrained")
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _styles(methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """Color and marker of each method, the same in all plots; dense is black."""
    styles = {method: {"color": f"C{i % 10}", "marker": _MARKERS[i % len(_MARKERS)]}
              for i, method in enumerate(m for m in methods if m != DENSE)}
    return {DENSE: {"color": "black", "marker": "x"}} | styles


def _line(method: str) -> str:
    return "--" if method == DENSE else "-"


def _unique(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def length_name(length: int) -> str:
    """8K, 1M, or the plain number."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if length % size == 0:
            return f"{length // size}{unit}"
    return f"{length:,}"


def grid_of(records: Sequence[Record]) -> tuple[list[int], numpy.ndarray]:
    """Lengths, and the share of right answers [depth rows, lengths] of one task and method; NaN where nothing was asked.

    As many rows as a length has depths; where samples have their questions anywhere, ten.
    """
    lengths = sorted(_unique([record["length"] for record in records]))
    places = {n: {r["sample"].rpartition("/")[0] for r in records if r["length"] == n} for n in lengths}
    most = max(len(names) for names in places.values())
    num_rows = most if most > 1 else _DEPTHS
    right, asked = numpy.zeros((num_rows, len(lengths))), numpy.zeros((num_rows, len(lengths)))
    for record in records:
        for question in record["questions"]:
            cell = min(int(question["depth"] * num_rows), num_rows - 1), lengths.index(record["length"])
            right[cell] += question["right"]
            asked[cell] += 1
    return lengths, numpy.where(asked > 0, right / numpy.maximum(asked, 1), numpy.nan)


def _draw_grid(task: str, records: Sequence[Record]) -> Any:
    methods = _unique([record["method"] for record in records])
    num_lengths = len({record["length"] for record in records})
    figure, axes = _panels(len(methods), 4, max(2.6, 0.8 + 0.55 * num_lengths), 3.2)
    for axis, method in zip(axes, methods):
        lengths, grid = grid_of([record for record in records if record["method"] == method])
        edges = numpy.linspace(0, 100, len(grid) + 1)
        image = axis.pcolormesh(numpy.arange(len(lengths) + 1), edges, grid, vmin=0, vmax=1, cmap="RdYlGn", edgecolors="white",
                                linewidth=0.5)
        axis.invert_yaxis()
        axis.set_title(method, fontsize=9)
        axis.set_xticks(numpy.arange(len(lengths)) + 0.5, [length_name(n) for n in lengths], fontsize=8)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_ylabel("depth, %", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.colorbar(image, ax=axes, label="right answers", shrink=0.8)
    figure.suptitle(task, fontsize=11)
    return figure


def _lines(axis: Any, rows: Sequence[Row], styles: dict[str, dict[str, str]]) -> None:
    """Scores over the lengths, a line for each method."""
    for method in _unique([row["method"] for row in rows]):
        of_method = sorted((row for row in rows if row["method"] == method), key=lambda row: row["length"])
        axis.plot([row["length"] for row in of_method], [row["score"] for row in of_method], label=method, markersize=5,
                  linestyle=_line(method), **styles[method])


def _draw_scores(rows: Sequence[Row], styles: dict[str, dict[str, str]]) -> Any:
    names = _unique([row["task"] for row in rows])
    figure, axes = _panels(len(names), 4, 3.0, 2.6)
    for axis, task in zip(axes, names):
        of_task = [row for row in rows if row["task"] == task]
        _lines(axis, of_task, styles)
        lengths = sorted({row["length"] for row in of_task})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [length_name(n) for n in lengths])
        axis.minorticks_off()
        axis.set_ylim(-0.05, 1.05)
        fails = [length_name(n) for n in lengths if not all(row["comparable"] for row in of_task if row["length"] == n)]
        axis.set_title(task + (f" (dense fails: {', '.join(fails)})" if fails else ""), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score")
    axes[0].legend(fontsize=7)
    return figure


def _draw_costs(rows: Sequence[Row], styles: dict[str, dict[str, str]]) -> Any:
    """For each length what a method keeps of dense's answers, over density and seconds; means over tasks that dense can do."""
    able = [row for row in rows if row["comparable"] and row["kept"] is not None] or list(rows)
    lengths = sorted({row["length"] for row in able})
    figure, axes = _panels(2 * len(lengths), 2, 4.0, 2.6)
    for i, length in enumerate(lengths):
        of_length = [row for row in able if row["length"] == length]
        for axis, name, label in ((axes[2 * i], "density", "density"), (axes[2 * i + 1], "seconds", "seconds a prompt")):
            for method in _unique([row["method"] for row in of_length]):
                of_method = [row for row in of_length if row["method"] == method]
                mean = lambda column: float(numpy.mean([row[column] or 0.0 for row in of_method]))
                axis.scatter([mean(name)], [mean("kept")], s=45, label=method, **styles[method])
            axis.set_xlim(left=0)
            axis.set_ylim(-0.05, 1.08)
            axis.set_xlabel(label, fontsize=8)
            axis.set_title(f"{length_name(length)} tokens", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
        axes[2 * i].set_ylabel("kept of dense's answers", fontsize=8)
    axes[0].legend(fontsize=7, loc="lower left")
    return figure


def perplexity_by_position(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Middles of the windows in tokens, and exp of the mean -log probability there over samples, of one length and method."""
    windows: dict[float, list[dict]] = {}
    for record in records:
        for question in record["questions"]:
            windows.setdefault(question["depth"] * record["length"], []).append(question)
    places = sorted(windows)
    return places, [math.exp(numpy.average([q["nll"] for q in windows[p]], weights=[q["tokens"] for q in windows[p]])) for p in places]


def _draw_perplexity(records: Sequence[Record], styles: dict[str, dict[str, str]]) -> Any:
    lengths = sorted({record["length"] for record in records})
    figure, axes = _panels(len(lengths), 3, 4.2, 3.0)
    for axis, length in zip(axes, lengths):
        of_length = [record for record in records if record["length"] == length]
        for method in _unique([record["method"] for record in of_length]):
            places, values = perplexity_by_position([record for record in of_length if record["method"] == method])
            axis.plot(places, values, label=method, markersize=4, linestyle=_line(method), **styles[method])
        axis.set_title(f"{length_name(length)} tokens", fontsize=9)
        axis.set_xlabel("position", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity", fontsize=8)
    axes[0].legend(fontsize=7)
    return figure
