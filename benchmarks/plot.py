"""Plots of the scaling laws in results, and a Markdown table of goals met and missed.

    python benchmarks/plot.py benchmarks/results/suite_cpu.json [more.json ...] [--out docs/images]

Writes one plot for each area that has laws, docs/images/scaling_<area>_<device>.png, and prints the table that
docs/performance.md holds. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MET = {True: "met", False: "**missed**", None: "not known"}


def laws(rows: list[dict]) -> dict[str, dict[str, list[tuple[float, dict]]]]:
    """law -> series -> [(x, row)], in order of x."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["law"] and row["ours"].get("seconds"):
            found[row["law"]["name"]][row["law"]["series"]].append((row["law"]["x"], row))
    return {
        law: {s: sorted(points, key=lambda p: p[0]) for s, points in series.items()} for law, series in found.items()
    }


def plot_area(area: str, found: dict, path: Path, title: str) -> None:
    """One panel of time for each law of an area, ours and its peers, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)
    figure, panels = pyplot.subplots(lines, columns, figsize=(4.2 * columns, 3.2 * lines), squeeze=False)
    for panel in panels.flat[len(found) :]:
        panel.set_visible(False)
    for panel, (law, series) in zip(panels.flat, found.items(), strict=False):
        for name, points in series.items():
            label = "ours" if name == "ours" else f"ours, {name}"
            (line,) = panel.plot([x for x, _ in points], [r["ours"]["seconds"] for _, r in points], "o-", label=label)
            peers = dict.fromkeys(p["name"] for _, r in points for p in r["peers"] if p.get("seconds"))
            for style, peer in zip(("s--", "^:", "D-."), peers, strict=False):
                at = [
                    (x, p["seconds"]) for x, r in points for p in r["peers"] if p["name"] == peer and p.get("seconds")
                ]
                panel.plot(*zip(*at, strict=True), style, color=line.get_color(), label=f"{peer}, {name}")
        panel.set(xscale="log", yscale="log", title=law.split(": ", 1)[-1], ylabel="seconds")
        ticks = sorted({x for points in series.values() for x, _ in points})
        panel.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=8, rotation=30 if len(ticks) > 5 else 0)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
        if len(panel.get_lines()) > 1:  # below the panel: inside, six names hide lines
            panel.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=len(series))
    figure.suptitle("\n".join(textwrap.wrap(title, 60 * columns)), fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def markdown(rows: list[dict]) -> list[str]:
    """A Markdown table of the rows that have a goal."""
    lines = ["| area | case | against | ratio | memory | goal |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["goal"] is None:
            continue
        peers = [p for p in row["peers"] if p.get("ratio")] or [{"name": "", "ratio": None}]
        for i, peer in enumerate(peers):
            ratio = "" if peer["ratio"] is None else f"{peer['ratio']:.2f}x"
            memory = f"1/{peer['memory_ratio']:.1f}" if peer.get("memory_ratio") else ""
            goal = f"{MET[row['met']]}: {row['goal']}" if i == 0 else ""
            case = (row["area"], row["case"]) if i == 0 else ("", "")
            lines.append(f"| {case[0]} | {case[1]} | {peer['name']} | {ratio} | {memory} | {goal} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args(argv)
    for file in args.results:
        content = json.loads(file.read_text())
        about, rows = content["about"], content["rows"]
        device = "cpu" if about["device"].startswith("CPU") else "gpu"
        by_area = defaultdict(dict)
        for law, series in laws(rows).items():
            by_area[law.split(": ", 1)[0]][law] = series
        for area, found in by_area.items():
            path = args.out / f"scaling_{area}_{device}.png"
            plot_area(
                area, found, path, f"{area}: {about['device']}, torch {about['packages']['torch']}, {about['commit']}"
            )
            print(path)
        print("\n".join(markdown(rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
