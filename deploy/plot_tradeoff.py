#!/usr/bin/env python3
"""Draws the trade-off curves of `longfill search`. Needs matplotlib, which the environment of deploy/setup.sh has.

    .venv/bin/python deploy/plot_tradeoff.py OUT.png patterns.json.curve.csv [MORE.curve.csv ...]

x: predicted time of attention and index of all heads, as a share of the reference's; y: mean value (recall). One line a
file, named by the file. OUT may also end in .svg or .pdf.
"""

import csv
import pathlib
import sys

COLUMNS = ["seconds", "share_of_reference", "mean_value"]
FORMATS = (".png", ".svg", ".pdf")


def read(path):
    """Shares and values of a curve file."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != COLUMNS:
            sys.exit(f"plot_tradeoff: {path} has the columns {rows.fieldnames}, expected {COLUMNS}")
        points = [(float(row["share_of_reference"]), float(row["mean_value"])) for row in rows]
    if not points:
        sys.exit(f"plot_tradeoff: {path} has no points")
    return zip(*points)


def draw(paths):
    try:
        import matplotlib.figure
    except ImportError:
        sys.exit("plot_tradeoff: the Python package matplotlib is missing: use .venv/bin/python, or pip install matplotlib")
    figure = matplotlib.figure.Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for path in paths:
        shares, values = read(path)
        axes.plot(shares, values, marker=".", markersize=3, label=path)
    axes.set_xlim(left=0)
    axes.set_xlabel("time of attention and index, share of the reference's")
    axes.set_ylabel("mean value")
    axes.grid(color="#dddddd")
    axes.legend(loc="lower right")
    return figure


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, *paths = sys.argv[1:]
    if pathlib.Path(out).suffix not in FORMATS:
        sys.exit(f"plot_tradeoff: {out} ends in none of {', '.join(FORMATS)}")
    draw(paths).savefig(out, dpi=120)


if __name__ == "__main__":
    main()
