"""The benchmark of `eval`, of few images: it runs, and its tables are whole."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import evaluation

ROOT = evaluation.ROOT


def fake_cache(folder: Path) -> int:
    """Packages as npm has them, of pictures that are drawn at random; one has no file."""
    random, number = np.random.default_rng(0), 0
    for vendor in evaluation.VENDORS:
        pictures = folder / vendor / "package" / "img" / vendor / "64"
        pictures.mkdir(parents=True)
        listed = []
        for code in range(60):
            listed.append(
                {"unified": f"{code:x}", "image": f"{code}.png", "category": "AB"[code % 2]}
            )
            if code:
                pixels = random.integers(0, 256, (64, 64, 4), dtype=np.uint8)
                Image.fromarray(pixels).save(pictures / f"{code}.png")
                number += 1
        (folder / vendor / "package" / "emoji.json").write_text(json.dumps(listed))
    return number


def rows_of(printed: str, head: str) -> list[list[str]]:
    """Cells of the table with this head."""
    lines = printed.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {head}"))
    table = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_emoji_are_held_out_by_their_code(tmp_path):
    number = fake_cache(tmp_path / "cache")
    counts = evaluation.sort_emoji(evaluation.fetch(tmp_path / "cache"), tmp_path / "images")
    assert sum(counts) == number
    assert 0.05 < counts[1] / number < 0.25
    names = {
        split: {
            path.name.partition("-")[2] for path in (tmp_path / "images" / split).rglob("*.png")
        }
        for split in ("train", "test")
    }
    assert not names["train"] & names["test"]  # no picture of an emoji that is held out
    assert len(names["train"] | names["test"]) == 59


@pytest.mark.slow
def test_the_tables_of_the_benchmark(tmp_path):
    number = fake_cache(tmp_path / "cache")
    script = [sys.executable, str(ROOT / "benchmarks" / "evaluation.py")]
    cache = ["--cache", str(tmp_path / "cache")]
    ran = subprocess.run([*script, "emoji", str(ROOT), *cache], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"{number} emoji")
    costs = rows_of(ran.stdout, "eval of emoji")
    assert [row[0] for row in costs] == ["with raw pixels beside", "as it is without a word"]
    for name, *values in rows_of(ran.stdout, "measure"):
        before, now, pixels, pixels_now = map(float, values)
        assert before == now, name  # of one checkout
        assert pixels == pixels_now
    ran = subprocess.run([*script, "large", "--images", "400"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    ((images, seconds, peak, above),) = rows_of(ran.stdout, "images of")
    assert images == "400"
    assert float(peak) > float(above)
    assert float(seconds) > 0
