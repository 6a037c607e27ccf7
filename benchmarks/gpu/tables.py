"""Tables of what the benchmark on a card has measured.

python benchmarks/gpu/tables.py benchmarks/results/gpu-h100-2026-12-01.jsonl
"""

import sys
from pathlib import Path
from typing import Any

from measure import lines

Line = dict[str, Any]


def write_tables(file: Path) -> Path:
    """The tables of a file of lines, beside it; returns where."""
    out = file.with_suffix(".md")
    out.write_text(text_of(list(lines(file))))
    return out


def text_of(found: list[Line]) -> str:
    """Markdown."""
    parts = [*_environment(found), *_ceilings(found), *_speed(found), *_errors(found)]
    return "\n".join([*parts, *_waits(found), *_rest(found)]) + "\n"


def table(head: list[str], rows: list[list[object]]) -> list[str]:
    """Lines of a table; none without rows."""
    if not rows:
        return []
    cells = [["" if x is None else str(x) for x in row] for row in rows]
    return [f"| {' | '.join(x)} |" for x in (head, ["---"] * len(head), *cells)] + [""]


def number(x: object, digits: int = 3) -> str:
    """A number to so many digits; others as they are."""
    return f"{x:.{digits}g}" if isinstance(x, float) else "" if x is None else str(x)


def _environment(found: list[Line]) -> list[str]:
    for line in found[::-1]:
        if line["name"] == "environment":
            versions = ", ".join(f"{name} {x}" for name, x in line["versions"].items())
            about = ", ".join(
                f"{key} {number(line[key])}"
                for key in ("capability", "sms", "gib", "driver, clock, power", "python", "cuda")
                if line.get(key) is not None
            )
            card = f"{line['card']}, {line['date']}, commit {line['commit'][:12]}"
            return [card, "", about, "", versions, ""]
    return []


def _ceilings(found: list[Line]) -> list[str]:
    here = [x for x in found if x["stage"] == "ceilings" and x["name"] != "environment"]
    keys = ("tflops", "tb_per_s", "launch_us", "wait_us", "error")
    rows: list[list[object]] = [
        [x["name"], ", ".join(f"{key} {number(x[key])}" for key in keys if key in x)] for x in here
    ]
    return table(["what the card does", "rate"], rows)


def _speed(found: list[Line]) -> list[str]:
    rows: list[list[object]] = [
        [
            x.get("loss", x["name"]),
            x.get("dtype"),
            " x ".join(map(str, x["shape"])) if "shape" in x else x.get("rows"),
            x.get("dim"),
            x.get("way", x["name"]),
            number(x["ms"], 4),
            number(x.get("planned_ms"), 4),
            number(x.get("mib"), 4),
            number(x.get("of_bf16_rate"), 2),
        ]
        for x in found
        if "ms" in x and x["stage"] != "ceilings"
    ]
    head = ["loss", "dtype", "rows", "D", "way", "ms", "planned", "MiB", "of the bf16 rate"]
    return table(head, rows)


def _errors(found: list[Line]) -> list[str]:
    rows: list[list[object]] = []
    for x in found:
        if x["name"].startswith("gradient error"):
            ways = [(x["way"], x["error"])] if "way" in x and "error" in x else []
            ways += [(way, x[way]) for way in ("ours", "dense", "open_clip") if way in x]
            text = ", ".join(f"{way} {number(error, 2)}" for way, error in ways)
            rows.append([x["loss"], x.get("dtype", "bf16"), text])
    return table(["gradient error against fp64", "dtype", "by"], rows)


def _waits(found: list[Line]) -> list[str]:
    rows: list[list[object]] = []
    for x in found:
        if "steps" in x and "lines" in x:
            waits = "; ".join(f"{key} {n}" for key, n in x["lines"].items())
            rows.append([x["name"], None, None, None, f"{x['steps']} steps: {waits}"])
        if "busy_ms" in x:
            waits = "; ".join(f"{key} {n}" for key, n in {**x["counts"], **x["lines"]}.items())
            rows.append(
                [x["loss"], number(x["wall_ms"]), number(x["busy_ms"]), x["kernels"], waits]
            )
    return table(["profile of", "wall ms", "busy ms", "kernels", "waits and launches"], rows)


def _rest(found: list[Line]) -> list[str]:
    rows: list[list[object]] = [
        [x["stage"], x["name"], str(x.get("error", x.get("skipped", x.get("told"))))[:200]]
        for x in found
        if (isinstance(x.get("error"), str) and not _is_number(x["error"]))
        or "skipped" in x
        or "told" in x
    ]
    return table(["stage", "what", "skipped or failed"], rows)


def _is_number(text: str) -> bool:
    return text in ("inf", "nan")


if __name__ == "__main__":
    print(text_of(list(lines(Path(sys.argv[1])))))
