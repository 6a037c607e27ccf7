"""README and docs: what they show works, what they name is there, figures come from benchmarks."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from dist_contrastive import losses
from dist_contrastive.cli import main
from dist_contrastive.testing import run_ranks

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import document

ROOT = Path(__file__).parents[1]

README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])


def blocks(kind: str, text: str = README) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def in_own_loop(code: str) -> dict[str, torch.Tensor]:
    """Weights after the loop of the README on this rank's part of two batches of pairs."""
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(2, 2, 6, 16, generator=generator).unbind()
    ranks = dist.get_world_size()
    rows = {1: slice(0, 6), 2: [slice(0, 4), slice(4, 6)][dist.get_rank()]}[ranks]
    torch.manual_seed(1)
    names = {
        "torch": torch,
        "losses": losses,
        "DistributedDataParallel": DistributedDataParallel,
        "encoder": torch.nn.Linear(16, 8),
        "batches": [(pair[0, rows], pair[1, rows]) for pair in batches],
    }
    exec(code, names)
    return {name: x.detach() for name, x in names["encoder"].module.named_parameters()}


def test_a_loss_in_your_own_loop():
    """Ten lines that give on two ranks, with different numbers of rows, the weights of one."""
    (code,) = (block for block in blocks("python") if "DistributedDataParallel" in block)
    assert len(code.splitlines()) <= 10
    (alone,) = run_ranks(in_own_loop, 1, code)
    for weights in run_ranks(in_own_loop, 2, code):
        torch.testing.assert_close(weights, alone)


def test_your_own_images(tmp_path, monkeypatch):
    """The README's commands and config, with fewer steps on small pictures of ten classes."""
    for number in range(60):
        for split in ("train", "test"):
            path = tmp_path / "PHOTOS" / split / f"class{number % 10}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = [(37 * (number % 10) + 3 * number) % 256, 25 * (number % 10), 128]
            Image.new("RGB", (72, 64 + number % 3), tuple(colour)).save(path)
    (commands,) = (block for block in blocks("bash") if "pack images" in block)
    (text,) = blocks("yaml")
    config = yaml.safe_load(text)
    assert len(text.splitlines()) <= 12
    small = {
        "data.global_batch_size": 16,
        "data.image_size": 8,
        "train.steps": 2,
        "task.encoder.widths": "[8, 8]",
    }
    monkeypatch.chdir(tmp_path)
    Path("photos.yaml").write_text(text)
    for line in commands.splitlines():
        argv = shlex.split(line, comments=True)[1:]
        if argv[0] == "train":  # in a moment, not in minutes
            argv += [f"{key}={value}" for key, value in small.items()]
        assert main(argv) == 0
    assert Path(config["run_dir"], "eval.json").exists()
    assert Path(config["run_dir"], "export", "config.yaml").exists()


USES_THE_SETTING = """
import torch
from dist_contrastive import config, losses
from dist_contrastive.errors import ConfigError

rows = torch.randn(5, 3)
torch.testing.assert_close(losses.KoLeo(weight=2)(rows), 2 * losses.KoLeo()(rows))
encoder = "configs/digits_encoder.yaml"
load = lambda x: config.load(encoder, [f"task.loss={{name: koleo, weight: {x}}}"])
assert load(3).task.loss.weight == 3
try:
    load(0)
except ConfigError as error:
    print(error)
"""


def test_a_new_setting_in_ten_lines(tmp_path):
    """The recipe, applied to a copy of the package: YAML, limits and messages follow."""
    (recipe,) = blocks("diff", (ROOT / "docs" / "reading.md").read_text())
    assert len(recipe.splitlines()) <= 10
    shutil.copytree(ROOT / "dist_contrastive", tmp_path / "dist_contrastive")
    name, *hunks = re.split(r"^@@.*\n", recipe, flags=re.MULTILINE)
    path = tmp_path / "dist_contrastive" / name.strip()
    text = path.read_text()
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(x[1:] for x in lines if x[0] in kind) for kind in (" -", " +"))
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    argv = [sys.executable, "-c", USES_THE_SETTING]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "task.loss.weight=0" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
            assert anchor in anchors, link


def test_readme_is_short():
    assert len(README.splitlines()) <= 300


def test_the_files_to_read_are_few():
    """Twelve, counted with the README's example, in at most 1,800 lines."""
    text = (ROOT / "docs" / "reading.md").read_text()
    listed = re.findall(r"^\d+\. \[.*?\]\((.*?)\)", text, re.MULTILINE)
    files = [ROOT / "docs" / path for path in listed if path.endswith(".py")]
    assert len(listed) == 12
    assert sum(len(path.read_text().splitlines()) for path in files) <= 1800


def test_tables_of_benchmarks_are_put_into_the_document():
    page = "# A\n\n| x | y |\n| --- | --- |\n| 1 | 2 |\n\ntext\n\n| z |\n| --- |\n| 3 |\n"
    printed = "load\n\n| x |  y |\n|---|---|\n| 5 | 6 |\n| 7 | 8 |\n\n| other |\n|---|\n| 9 |\n"
    changed, missing = document.with_tables(page, printed)
    assert changed == page.replace(
        "| x | y |\n| --- | --- |\n| 1 | 2 |", "| x |  y |\n|---|---|\n| 5 | 6 |\n| 7 | 8 |"
    )
    assert missing == ["| other |"]
    with pytest.raises(SystemExit, match=r"2 tables .* has 1"):
        document.with_tables(page, printed + "\n" + printed)


@pytest.mark.parametrize("name", ["precision", "force_precision", "speed", "memory", "evaluation"])
def test_heads_of_benchmarks_are_those_of_the_document(name):
    """Benchmarks whose tables are replaced as they are printed."""
    text = (ROOT / "benchmarks" / f"{name}.py").read_text()
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    heads = re.findall(r'print\("(\| .* \|)"\)', text)
    assert all(head in page for head in heads if "---" not in head)
    assert f"benchmarks/{name}.py" in page


def test_every_fault_has_its_test():
    """Each row of docs/faults.md names a test, in test_faults.py or in the file beside it."""
    rows = [
        row for row in (ROOT / "docs" / "faults.md").read_text().splitlines() if "`test_" in row
    ]
    assert len(rows) > 20
    for row in rows:
        name = re.search(r"`(test_\w+)`", row)[1]
        file = re.search(r"`(test_\w+\.py)`", row)
        text = (ROOT / "tests" / (file[1] if file else "test_faults.py")).read_text()
        assert f"def {name}(" in text, row
