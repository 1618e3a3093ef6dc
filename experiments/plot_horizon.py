"""Draws normalised accuracy against horizon from the table.json of `retain horizon`.

Usage: plot_horizon.py table.json horizon.png
One line an arm: the mean over the seeds, each seed as a dot, and a band from the lowest to the
highest end of the seeds' 95 % intervals. Chance is 0, the best policy 1.
"""

import json
import sys

# Okabe and Ito (2008): told apart by colour-blind readers; the markers tell the arms apart in print.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


def arms_of(results):
    """{arm: {horizon: [result of each seed]}} in the order of the table."""
    arms = {}
    for result in results:
        arms.setdefault(result["arm"], {}).setdefault(result["horizon"], []).append(result)
    return arms


def draw_arm(axes, name, cells, color, marker, shift):
    horizons = sorted(cells)
    x = [h * shift for h in horizons]
    mean = [sum(r["normalized_accuracy"] for r in cells[h]) / len(cells[h]) for h in horizons]
    low = [min(r["low"] for r in cells[h]) for h in horizons]
    high = [max(r["high"] for r in cells[h]) for h in horizons]
    axes.plot(x, mean, color=color, marker=marker, linewidth=2, label=name, zorder=3)
    if len(x) > 1:
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    else:  # a band of no width would not show
        axes.vlines(x, low, high, color=color, alpha=0.3, linewidth=8)
    for place, h in zip(x, horizons):
        seeds = [r["normalized_accuracy"] for r in cells[h]]
        axes.plot([place] * len(seeds), seeds, linestyle="", marker=marker, color=color, markersize=4,
                  markerfacecolor="white", zorder=4)


def draw(table, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    arms = arms_of(table["results"])
    horizons = sorted({result["horizon"] for result in table["results"]})
    for index, (name, cells) in enumerate(arms.items()):
        # Side by side, so that equal results do not hide each other.
        shift = 1.03 ** (index - (len(arms) - 1) / 2)
        draw_arm(axes, name, cells, COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)], shift)
    axes.axhline(0, color="gray", linestyle="--", linewidth=1, label="chance")
    axes.set_xscale("log")
    axes.set_xlim(horizons[0] / 1.3, horizons[-1] * 1.3)
    axes.set_xticks(horizons, minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(min(-0.08, min(r["low"] for r in table["results"]) - 0.02), 1.05)
    axes.grid(True, axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("horizon (steps to remember)")
    axes.set_ylabel("normalised accuracy")
    seeds = len({result["seed"] for result in table["results"]})
    axes.set_title(f"{table['world']}: {table['updates']} updates of {table['num_envs']} environments, "
                   f"{seeds} seed{'s' if seeds != 1 else ''}", fontsize=10, loc="left")
    axes.legend(frameon=False, loc="best")
    figure.savefig(path, dpi=150)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1], encoding="utf-8") as file:
        table = json.load(file)
    for result in table["results"]:
        for end in ("low", "high"):  # of one episode there is no interval
            if result[end] is None:
                result[end] = result["normalized_accuracy"]
    try:
        draw(table, sys.argv[2])
    except ImportError as error:
        sys.exit(f"plot_horizon: no picture: {error}; install it with: {sys.executable} -m pip install matplotlib")


if __name__ == "__main__":
    main()
