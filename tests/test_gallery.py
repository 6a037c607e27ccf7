"""benchmarks/gallery.py and benchmarks/group_size.py: the force that is drawn, and a sweep in which
nothing but the groups differs and nothing is done twice."""

import json
import sys
from pathlib import Path

import pytest
import torch

from dist_contrastive import config as configs
from dist_contrastive.evaluation.generators import FIELD_SIDE, force_field
from dist_contrastive.losses import ContrastiveForce
from dist_contrastive.losses.force import PRESETS, spec

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gallery
import group_size
from group_size import Sweep


@pytest.mark.parametrize("preset", ["drift", "paper"])
def test_the_force_field_is_the_force_on_one_more_point(preset):
    generated, data = torch.randn(5, 2).double(), torch.randn(7, 2).double() + 1
    loss = ContrastiveForce((0.1, 0.3), preset)
    at, found = force_field(loss, generated, data)
    assert at.shape == (FIELD_SIDE**2, 2)
    points = torch.cat([generated, data])
    assert torch.equal(at.amin(0), points.amin(0).float())
    assert torch.equal(at.amax(0), points.amax(0).float())
    scale = torch.cdist(points, points).mean()
    groups = [torch.cat([place[None], points]) / scale for place in at.double()]
    kind, rules = torch.tensor([0] * 6 + [1] * 7), PRESETS[preset]
    forces = spec.force(
        torch.stack(groups),
        kind == 0,
        kind == 1,
        torch.zeros(13),
        temperatures=loss.temperatures,
        square=rules.square,
        mask_self=rules.mask_self,
        divide_by=rules.divide_by,
        norm_scope=rules.norm_scope,  # paper: one unit for all places
    )
    expected = forces.force[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_gallery(tmp_path, data_set, monkeypatch):
    monkeypatch.setattr(gallery, "TOYS", ["swiss_roll"])
    folder, picture = tmp_path / "tiny", tmp_path / "toys.png"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "swiss_roll").symlink_to(data_set("swiss_roll"))
    arguments = ["gallery.py", "--tiny", "--folder", str(tmp_path), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", arguments)
    gallery.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    in_sight, (untrained, trained, data, first, last) = gallery.row_of("swiss_roll", folder, True)
    assert torch.equal(in_sight, data.clouds["data"])
    few = len(first.clouds["generated"])
    for panel, force in ((untrained, first), (trained, last)):
        assert torch.equal(force.clouds["generated"], panel.clouds["generated"][:few])
    assert not torch.equal(untrained.clouds["generated"], trained.clouds["generated"])
    assert not torch.equal(first.arrows[1], last.arrows[1])


@pytest.fixture
def setup(tmp_path, data_set, monkeypatch):
    """A short sweep of digits, alone in SETUPS, whose data are in tmp_path/tiny."""
    short = group_size.SETUPS["digits"]._replace(batch=64, groups=(1, 8))
    monkeypatch.setattr(group_size, "SETUPS", {"digits": short})
    (tmp_path / "tiny" / "data").mkdir(parents=True)
    (tmp_path / "tiny" / "data" / "digits").symlink_to(data_set("digits"))
    return short


def test_only_the_groups_differ(setup, tmp_path):
    one, eight = (group_size.config_of(setup, groups, 3, tmp_path / "tiny", 2) for groups in (1, 8))
    assert configs.differences(one, eight) == ["task.groups: 1 -> 8"]
    assert group_size.SETUPS["digits"].interacting(8) == 1  # 64 points of 10 classes in 8 groups


@pytest.mark.slow
def test_a_sweep_is_drawn_and_not_done_twice(setup, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "sweep.png"
    arguments = ["--tiny", "--seeds", "1", "--folder", str(tmp_path), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["group_size.py", *arguments])
    group_size.main()
    table = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| 1 | 6 | " in table
    assert "| 8 | 1 | " in table
    for path in (tmp_path / "tiny" / "digits").rglob("distances.json"):
        path.write_text(json.dumps(dict.fromkeys(group_size.MEASURES, 0.5)))
    group_size.main()
    assert "| 8 | 1 | 0.5000 ± 0.0000 | 0.5000 ± 0.0000 |" in capsys.readouterr().out


def test_cells_of_the_table():
    seeds = [{"energy distance": x, "datum to nearest sample": 2 * x} for x in (0.1, 0.2, 0.3)]
    setup = group_size.SETUPS["eight_gaussians"]
    swept = Sweep(setup, {4: seeds}, {"energy distance": -0.01, "datum to nearest sample": 0.02})
    assert group_size.as_markdown(swept)[2:] == [
        f"| 4 | {setup.batch // 4} | 0.2000 ± 0.1000 | 0.4000 ± 0.2000 |",
        "| training data | | -0.0100 | 0.0200 |",
    ]
