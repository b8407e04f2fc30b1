#!/usr/bin/python3
"""Plots what `forkd bench branch --json` measured.

    bench/plot.py RESULT.json [DIRECTORY]

writes branch.svg and branch.png to the directory, by default that of this script. Needs python3-matplotlib.
"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
# The same figures give the same file.
matplotlib.rcParams["svg.hashsalt"] = "forkd"
import matplotlib.pyplot as plt  # noqa: E402 (the backend has to be chosen first)
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator  # noqa: E402

# Readable by the colour-blind (Okabe and Ito), and by shape where colours are gone.
STYLES = {
    "fork": ("#0072B2", "o"),
    "diff": ("#009E73", "s"),
    "live": ("#D55E00", "^"),
    "full": ("#CC79A7", "D"),
}


def number(value, _position=None):
    return f"{value:g}"


def panel(axes, cells, title):
    """The pauses of one rate over the sizes of RAM."""
    for mode, (colour, marker) in STYLES.items():
        rows = sorted((c for c in cells if c["mode"] == mode), key=lambda c: c["mem_mib"])
        if not rows:
            continue
        sizes = [c["mem_mib"] for c in rows]
        axes.plot(sizes, [c["pause_ms"]["p50"] for c in rows], color=colour, marker=marker, lw=1.8, ms=5)
        axes.plot(sizes, [c["pause_ms"]["p99"] for c in rows], color=colour, marker=marker, lw=0.9, ms=4, mfc="white")
        floors = [(c["mem_mib"], c["floor_ms"]["p50"]) for c in rows if c["floor_ms"]]
        if floors:
            axes.plot(*zip(*floors), color=colour, ls="--", lw=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({c["mem_mib"] for c in cells})
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(FuncFormatter(number))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(number))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#cccccc", lw=0.6)
    axes.grid(True, which="minor", axis="y", color="#eeeeee", lw=0.4)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("RAM of the guest (MiB)")


def legend(modes):
    """What the lines mean: modes by colour, measures by style."""
    lines = [
        Line2D([], [], color=colour, marker=marker, ms=5, label=f"mode {mode}")
        for mode, (colour, marker) in STYLES.items()
        if mode in modes
    ]
    return lines + [
        Line2D([], [], color="black", marker="o", lw=1.8, ms=5, label="pause, p50"),
        Line2D([], [], color="black", marker="o", mfc="white", lw=0.9, ms=4, label="pause, p99"),
        Line2D([], [], color="black", ls="--", lw=1.2, label="floor (fork or arm), p50"),
    ]


def plot(result):
    cells = result["cells"]
    if not cells:
        raise SystemExit("plot: the result has no rows of modes")
    # In the order in which they were measured, but the sets of diffs last.
    rates = list(dict.fromkeys(c["rate"] for c in cells))
    rates.sort(key=lambda rate: rate.endswith("each"))
    figure, panels = plt.subplots(1, len(rates), figsize=(3.6 * len(rates) + 0.8, 4.6), sharey=True, squeeze=False)
    for axes, rate in zip(panels[0], rates):
        words = {"idle": "writers idle", "max": "writing as fast as possible"}
        title = words.get(rate, f"writing {rate}")
        panel(axes, [c for c in cells if c["rate"] == rate], title)
    panels[0][0].set_ylabel("pause of the source (ms)")
    figure.suptitle("What a branch or snapshot holds up the VM for", fontsize=12)
    where = (
        f"{result['cpu']}, {result['cpus']} CPUs, {result['kvm']}, Linux {result['kernel']}; "
        f"forkd {result['version']}, {result['date']}; guests: {result['vcpus']} vCPU, {result['writers']} writers; "
        f"up to {result['rounds']} rounds"
    )
    lines = legend({c["mode"] for c in cells})
    figure.legend(handles=lines, loc="lower center", ncol=len(lines), fontsize=8, frameon=False, bbox_to_anchor=(0.5, 0.045))
    figure.text(0.5, 0.015, where, ha="center", fontsize=7, color="#444444")
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    return figure


def main(arguments):
    if not 1 <= len(arguments) <= 2:
        raise SystemExit(__doc__.strip())
    source = Path(arguments[0])
    to = Path(arguments[1]) if len(arguments) > 1 else Path(__file__).resolve().parent
    try:
        result = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"plot: cannot read {source}: {error}") from error
    figure = plot(result)
    figure.savefig(to / "branch.svg", metadata={"Date": None})
    figure.savefig(to / "branch.png", dpi=150)
    print(f"{to / 'branch.svg'} and {to / 'branch.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
