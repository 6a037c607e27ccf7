"""Picture of what the benchmark on a card has measured: ms of each loss by each way.

python benchmarks/gpu/draw.py benchmarks/results/gpu-h100-2026-12-01.jsonl
"""

import sys
from pathlib import Path
from typing import Any

from measure import lines

WAYS = ("ours", "dense", "compiled", "open_clip", "memeff", "inf-cl", "siglip-kernel", "keops")


def draw(file: Path) -> Path | None:
    """The picture of a file of lines, beside it; None where there is nothing to draw."""
    from matplotlib.figure import Figure

    groups = grouped(list(lines(file)))
    if not groups:
        return None
    figure = Figure(figsize=(9, 1.5 + 0.28 * sum(map(len, groups.values()))), layout="constrained")
    axes = figure.subplots()
    labels, place = [], 0
    for title, times in groups.items():
        for way in sorted(times, key=WAYS.index):
            color = "tab:blue" if way == "ours" else "tab:gray"
            axes.barh(place, times[way], color=color)
            axes.text(times[way], place, f" {times[way]:.3g}", va="center", fontsize=7)
            labels.append(f"{title}, {way}")
            place += 1
        place += 1
        labels.append("")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms of forward and backward")
    out = file.with_suffix(".png")
    figure.savefig(out, dpi=120)
    return out


def grouped(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Times by way, of each loss, dtype and size that more than one way has."""
    groups: dict[str, dict[str, float]] = {}
    for line in found:
        if line.get("way") in WAYS and "ms" in line:
            size = line.get("shape") or [line.get("rows"), line.get("dim")]
            title = f"{line['loss']}, {line['dtype']}, {' x '.join(map(str, size))}"
            groups.setdefault(title, {})[line["way"]] = line["ms"]
    return {title: times for title, times in groups.items() if len(times) > 1}


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
