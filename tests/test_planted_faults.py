"""The list of planted faults: each can be planted, and no main folder goes without."""

from collections import Counter

import pytest

from tests.planted_faults.__main__ import ROOT, Fault, faults

FOLDERS = [
    "collectives",
    "pairwise",
    "losses",
    "losses/force",
    "data/shards",
    "data/stream",
    "data/packing",
    "models",
    "tasks",
    "evaluation",
    "config",
    "trainer",
    "backend",
    "metrics",
    "report",
    "cli",
]


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: fault.name)
def test_can_be_planted(fault: Fault):
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new
    for test in fault.tests:
        path, _, name = test.partition("::")
        assert name.partition("[")[0] in (ROOT / path).read_text()


def test_every_folder_has_five():
    counts = Counter(f.file.removeprefix("dist_contrastive/").rpartition("/")[0] for f in faults())
    few = {folder: counts[folder] for folder in FOLDERS if counts[folder] < 5}
    assert not few
    assert sum(n for folder, n in counts.items() if folder.startswith("launch")) >= 5
