"""The drift task: the same on any number of ranks, its bank, its guidance, its average."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import CONFIGS
from force_formulas import specified
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_contrastive import config as configs
from dist_contrastive.config import RunConfig
from dist_contrastive.data import load_index
from dist_contrastive.data.fields import Samples
from dist_contrastive.errors import ConfigError
from dist_contrastive.tasks import Drift
from dist_contrastive.tasks.bank import SampleBank
from dist_contrastive.testing import run_ranks

ROWS, STEPS = 24, 3
MAPS = "{stages: [2], kinds: [pooled, locations], patches: []}"
ENCODER = f"{{name: encoder, encoder: {{name: residual, widths: [8, 16]}}, maps: {MAPS}}}"
MLP = "{name: mlp, noise_dim: 4, class_dim: 8, hidden: 32, layers: 3}"
SMALL = (
    *(f"task.generator={MLP}", "task.features=[{name: pixels}]", "task.ema=null"),
    "task.loss.temperatures=[0.05, 0.2]",
)
BANK = "task.bank={capacity: 12, positives: 5}"
GUIDANCE = "task.guidance={unconditional: 7, strengths: [1.5, 4]}"


def load(overrides, run_dir: Path, *more: str) -> RunConfig:
    path = CONFIGS / "digits_generator.yaml"
    return configs.load(path, overrides(run_dir, *SMALL, *more))


def samples_of(config: RunConfig, step: int = 0) -> Samples:
    """Digits, different ones in each step, called 0 or 1 so that each class has several."""
    numbers = range(ROWS * step, ROWS * (step + 1))
    samples = config.fields.read(load_index(config.data.train), numbers)
    return replace(samples, images=samples.images.double(), labels=samples.labels % 2)


def drift(config: RunConfig) -> Drift:
    return drift_of(config, samples_of(config))


def drift_of(config: RunConfig, samples: Samples) -> Drift:
    task = config.build_task(samples).double()
    assert isinstance(task, Drift)
    return task


def is_distributed_as(name: str, numbers: list[float]) -> bool:
    from scipy import stats  # which ranks need not load

    return stats.kstest(numbers, name).pvalue > 0.01


def inputs_of(task: Drift, samples: Samples) -> list[Tensor]:
    inputs = task.inputs(samples, task.begin_step(samples))
    return [x.double() if x.is_floating_point() else x for x in inputs]


def one_step(
    task: Drift, samples: Samples, lr: float = 0.0, is_logged: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A step of gradient descent; the terms of the loss and the metrics."""
    context = task.begin_step(samples, is_logged=is_logged)
    module = DistributedDataParallel(task) if dist.is_initialized() else task
    embeddings = module(*inputs_of(task, samples))
    terms = task.compare(embeddings, samples, context)
    task.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    with torch.no_grad():
        for p in task.generator.parameters():
            p -= lr * p.grad
    task.finish_step(embeddings, samples, context)
    return {name: term.detach() for name, term in terms.items()}, task.scalars(context)


# ---------------------------------------------------------------------------- ranks


class Trained(NamedTuple):
    """What a few steps leave, and how often ranks took their groups for themselves."""

    terms: list[dict[str, Tensor]]
    gradients: dict[str, Tensor]
    scalars: list[dict[str, float]]
    state: dict[str, Tensor]
    times_whole: int


def trained(config: RunConfig, sizes: Sequence[int]) -> Trained:
    task, terms, scalars, whole = drift(config), [], [], []
    if task.local_loss is not None:
        task.local_loss.register_forward_hook(lambda *_: whole.append(1))
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = torch.arange(ROWS).split(list(sizes))[rank]
    for step in range(STEPS if task.bank else 1):
        samples = samples_of(config, step).rows(mine)
        for record, values in zip(
            (terms, scalars), one_step(task, samples, 0.05, True), strict=True
        ):
            record.append(values)
    gradients = {name: p.grad for name, p in task.generator.named_parameters()}
    return Trained(terms, gradients, scalars, task.state_dict(), len(whole))


Splits = dict[int, list[int]]
OnRank = tuple[list[Trained], dict[str, Tensor]]


def on_rank(jobs: list[tuple[RunConfig, Splits]]) -> OnRank:
    """All that ranks are to show: their start takes longer."""
    found = [trained(config, splits[dist.get_world_size()]) for config, splits in jobs]
    return found, filled().state_dict()


UNEVEN = {1: [24], 2: [9, 15], 3: [4, 0, 20], 4: [7, 0, 1, 16]}
EVEN = {1: [24], 2: [12, 12], 3: [8, 8, 8], 4: [6, 6, 6, 6]}
FEATURES = f"task.features=[{{name: pixels}}, {ENCODER}]"
EVERYTHING = (BANK, GUIDANCE, "task.ema=0.5", FEATURES)
PAPER = ("task.loss.preset=paper", "task.loss.scale_scope=global")
LABEL = ("task.loss.scale_scope=label", "task.loss.norm_scope=label")
CASES: dict[str, tuple[Splits, Sequence[str]]] = {
    "everything": (UNEVEN, EVERYTHING),
    "everything in two groups": (UNEVEN, (*EVERYTHING, *PAPER, "task.groups=2")),
    "everything from a ring": (EVEN, (*EVERYTHING, *PAPER, "task.loss.keys_from=ring")),
    "a bank's data are no one's": (EVEN, (BANK, *PAPER, "task.groups=4")),
    "whole groups, global scope": (EVEN, (FEATURES, *PAPER, "task.groups=4")),
    "whole groups, scope of labels": (EVEN, (FEATURES, *LABEL, "task.groups=4")),
    "uneven groups": (UNEVEN, (FEATURES, *LABEL, "task.groups=4")),
    "groups share their scale": (EVEN, (FEATURES, "task.groups=4")),
}
WHOLE = {  # where ranks take their groups for themselves
    "whole groups, global scope": (1, 2, 4),
    "whole groups, scope of labels": (1, 2, 4),
    "uneven groups": (1,),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory, overrides) -> list[tuple[RunConfig, Splits]]:
    folder = tmp_path_factory.mktemp("drift")
    return [(load(overrides, folder, *more), splits) for splits, more in CASES.values()]


@pytest.fixture(scope="module")
def right(cases) -> list[Trained]:
    """One process, with dense losses."""
    dense = {"impl": "dense", "keys_from": "gather"}
    found = []
    for config, _ in cases:
        loss = config.task.loss.model_copy(update=dense)
        task = config.task.model_copy(update={"loss": loss})
        found.append(trained(config.model_copy(update={"task": task}), [ROWS]))
    return found


@pytest.fixture(
    scope="module", params=[2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4))]
)
def ranks(request, cases) -> list[OnRank]:
    return run_ranks(on_rank, request.param, cases)


def test_ranks_train_as_one_process(ranks, right):
    """Terms, gradients, diagnostics, bank, average: over three steps, in which the bank fills."""
    world_size = len(ranks)
    for rank, (results, _) in enumerate(ranks):
        for name, found, expected in zip(CASES, results, right, strict=True):
            where = f"{name}, rank {rank} of {world_size}"
            for step in range(len(expected.terms)):
                assert_close(found.terms[step], expected.terms[step], f"{where}, step {step}")
                assert found.scalars[step] == pytest.approx(expected.scalars[step], rel=1e-9), where
            assert_close(found.gradients, expected.gradients, where)
            assert_close(found.state, expected.state, where)
            whole = len(found.terms[0]) if world_size in WHOLE.get(name, ()) else 0
            assert found.times_whole == whole, where


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert found.keys() == expected.keys(), where
    for key, x in expected.items():
        scale = x.double().abs().max().item() or 1.0
        error = (found[key].double() - x.double()).abs().max().item() / scale
        assert error < 1e-9, f"{where}: {key} off by {error}"


def test_everything_takes_part(right):
    """What ranks are compared with: a bank that goes round, an average apart from the generator."""
    for name, found in zip(CASES, right, strict=True):
        if "bank.added" in found.state:
            added = found.state["bank.added"]
            assert int(found.state["steps_done"]) == STEPS
            assert int(added.sum()) == STEPS * ROWS
            assert added[:2].min() > 12
        averages = [key for key in found.state if key.startswith("average.module.")]
        assert bool(averages) == name.startswith("everything")
        for key in averages:
            mine = found.state[key.replace("average.module", "generator")]
            assert not torch.equal(mine, found.state[key]), f"{name}: {key}"


# ---------------------------------------------------------------------------- what is compared


def features_by_hand(task: Drift, images: Tensor) -> dict[str, Tensor]:
    """[groups, n, D] of each space: a location of a map is a group."""
    pooled, maps = task.encoder_spaces()["encoder"].with_maps(images)
    locations = [maps[2][:, :, i, j] for i in range(4) for j in range(4)]
    return {
        "force_0_pixels": images.flatten(1)[None],
        "force_1_encoder.pooled": pooled[None],
        "force_1_encoder.stage2.locations": torch.stack(locations),
    }


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("loss", [(), PAPER, LABEL, ("task.loss.preset=seed",)])
def test_terms_are_the_literal_force(loss, groups, overrides, tmp_path):
    """Rows of a class attract and repel each other, within their quarter of the batch alone."""
    config = load(overrides, tmp_path, FEATURES, *loss, f"task.groups={groups}")
    task, samples = drift(config), samples_of(config)
    noise, labels = inputs_of(task, samples)
    terms = task.compare(task(noise, labels), samples, task.begin_step(samples))
    made = features_by_hand(task, task.generator(noise, labels))
    data = features_by_hand(task, samples.images)
    cells = torch.tensor([100 * (row * groups // ROWS) for row in range(ROWS)]) + samples.labels
    scopes = {name: getattr(config.task.loss, name) for name in ("scale_scope", "norm_scope")}
    assert terms.keys() == made.keys()
    for name, term in terms.items():
        expected = specified(
            *(config.task.loss.preset, made[name], data[name], cells, cells),
            **{"temperatures": (0.05, 0.2), **scopes},
        )
        assert term.item() == pytest.approx(expected.loss.item(), rel=1e-9), name


def test_without_classes_all_points_are_compared(overrides, tmp_path):
    config = toy(overrides, tmp_path, "task.loss={preset: drift, temperatures: [0.05, 0.2]}")
    samples = points_of(config)
    task = drift_of(config, samples)
    (noise,) = inputs_of(task, samples)
    (term,) = task.compare(task(noise), samples, task.begin_step(samples)).values()
    made, data = task.generator(noise), samples.images
    expected = specified("drift", made, data, temperatures=(0.05, 0.2)).loss
    assert term.item() == pytest.approx(expected.item(), rel=1e-9)


def toy(overrides, run_dir: Path, *more: str) -> RunConfig:
    path = CONFIGS / "eight_gaussians.yaml"
    return configs.load(path, overrides(run_dir, *more, data_name="eight_gaussians"))


def points_of(config: RunConfig, numbers: Sequence[int] = range(ROWS)) -> Samples:
    samples = config.fields.read(load_index(config.data.train), numbers)
    return replace(samples, images=samples.images.double())


def test_noise_is_that_of_the_data_row(overrides, tmp_path):
    """Another sample, epoch or seed has other noise; a row has its own in any batch."""
    config = load(overrides, tmp_path)
    samples = samples_of(config)
    task = drift(config)
    context = task.begin_step(samples)
    noise, labels = task.inputs(samples, context)
    assert torch.equal(labels, samples.labels)
    later = replace(samples, epoch=samples.epoch + 1)
    other = drift(load(overrides, tmp_path, "seed=1"))
    rows = torch.cat([noise, task.inputs(later, context)[0], other.inputs(samples, context)[0]])
    assert len(rows.unique(dim=0)) == 3 * ROWS
    some = torch.tensor([17, 4])
    assert torch.equal(task.inputs(samples.rows(some), context.rows(some))[0], noise[some])
    assert is_distributed_as("norm", rows.flatten().tolist())


# ---------------------------------------------------------------------------- the bank in a step


class Given(NamedTuple):
    """What a step gives the force in pixel space."""

    made: Tensor  # [m, D]
    data: Tensor  # [n, D]
    fixed: Tensor  # [k, D]
    cells: dict[str, Tensor]  # of each of them
    weights: Tensor  # [k]
    strengths: Tensor  # [m], which the generator is told
    term: float


BYTES = 255
IN_BANK = ("task.bank={capacity: 10, positives: 4}", "task.groups=2")


def steps_of(config: RunConfig, steps: int) -> list[Given]:
    task, given, found = drift(config), [], []
    task.loss.register_forward_pre_hook(lambda _, *x: given.append(x), with_kwargs=True)
    for step in range(steps):
        samples = samples_of(config, step)
        strengths = inputs_of(task, samples)[2]
        (term,) = one_step(task, samples)[0].values()
        (made, data, cells, data_cells), more = given[-1]
        fixed = more.get("fixed", made[:, :0])
        nothing = torch.zeros(0)
        of_fixed = more.get("fixed_labels", nothing)
        cells = {"made": cells, "data": data_cells, "fixed": of_fixed}
        weights = more.get("fixed_weights", nothing)
        found.append(Given(made[0], data[0], fixed[0], cells, weights, strengths, term.item()))
    return found


def keys_of(pixels: Tensor) -> list[tuple[int, ...]]:
    """Images as bytes."""
    exact = pixels * BYTES
    torch.testing.assert_close(exact, exact.round(), rtol=0, atol=1e-4)
    return [tuple(row) for row in exact.round().int().tolist()]


@pytest.fixture(scope="module")
def in_bank(tmp_path_factory, overrides) -> tuple[RunConfig, list[Given]]:
    """Four steps with room for the samples of half of one."""
    config = load(overrides, tmp_path_factory.mktemp("bank"), *IN_BANK, GUIDANCE)
    return config, steps_of(config, steps=4)


def test_bank_adds_data_of_the_class(in_bank):
    """In each step, four different ones of the newest ten of each class, for both halves."""
    config, steps = in_bank
    newest: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    repeated = 0
    for step, given in enumerate(steps):
        samples = samples_of(config, step)
        assert keys_of(given.data[:ROWS]) == keys_of(samples.images.flatten(1))
        drawn, cells = keys_of(given.data[ROWS:]), given.cells["data"][ROWS:].tolist()
        by_cell: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for key, cell in zip(drawn, cells, strict=True):
            by_cell[cell].append(key)
        assert sorted(by_cell) == ([0, 1, 10, 11] if step else [])
        for cell, keys in by_cell.items():
            assert len(keys) == len(set(keys)) == 4
            assert set(keys) <= set(newest[cell % 10][-10:])
        repeated += len(by_cell) - len({frozenset(by_cell[cell]) for cell in by_cell})
        for key, label in zip(keys_of(samples.images.flatten(1)), samples.labels, strict=True):
            newest[int(label)].append(key)
    assert not repeated  # of some 200 choices


def test_guidance_pushes_with_all_classes(in_bank):
    """Seven of those in the bank for each class of each half."""
    config, steps = in_bank
    held: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for step, given in enumerate(steps):
        keys, cells = keys_of(given.fixed), given.cells["fixed"].tolist()
        assert sorted(cells) == [cell for cell in (0, 1, 10, 11) for _ in range(7 * (step > 0))]
        everyones = {key: label for label, x in held.items() for key in x[-10:]}
        for cell in set(cells):
            chosen = [key for key, c in zip(keys, cells, strict=True) if c == cell]
            assert len(set(chosen)) == 7
            assert {everyones[key] for key in chosen} == {0, 1}
        samples = samples_of(config, step)
        for key, label in zip(keys_of(samples.images.flatten(1)), samples.labels, strict=True):
            held[int(label)].append(key)


def test_each_step_draws_anew(overrides, tmp_path):
    """From the same bank, and the same step the same again."""
    config = load(overrides, tmp_path, *IN_BANK, GUIDANCE)
    task, given, samples = drift(config), [], samples_of(config)
    task.loss.register_forward_pre_hook(lambda _, *x: given.append(x), with_kwargs=True)
    one_step(task, samples)
    embeddings = task(*inputs_of(task, samples))
    for step in (1, 2, 1):
        task.steps_done.fill_(step)
        task.compare(embeddings, samples, task.begin_step(samples))
    _, first, second, again = [(args[1], more.get("fixed")) for args, more in given]
    for mine, other, same in zip(first, second, again, strict=True):
        assert torch.equal(mine, same)
        assert not torch.equal(mine, other)


def test_weights_and_terms_of_guidance(in_bank):
    """(strength - 1) (generated - 1) / unconditional of each, and the literal force with these."""
    for step, given in enumerate(in_bank[1]):
        made = given.cells["made"]
        strength_of = {}
        for cell in (0, 1, 10, 11):
            (strength_of[cell],) = set(given.strengths[made == cell].tolist())
        assert len(set(strength_of.values())) == 4
        for cell, weight in zip(given.cells["fixed"].tolist(), given.weights, strict=True):
            expected = (strength_of[cell] - 1) * (int((made == cell).sum()) - 1) / 7
            assert weight.item() == pytest.approx(expected, rel=1e-6)
        points = (given.made, given.data, made, given.cells["data"])
        more: dict[str, Any] = {"temperatures": (0.05, 0.2)}
        if step:
            more |= {"fixed": given.fixed, "fixed_labels": given.cells["fixed"]}
            more |= {"fixed_weights": given.weights.double()}
        assert given.term == pytest.approx(
            specified("drift", *points, **more).loss.item(), rel=1e-9
        )


def test_strength_one_pushes_with_nothing(overrides, tmp_path):
    """The weights are 0 throughout; the samples still share the softmaxes, as in the method."""
    guidance = GUIDANCE.replace("[1.5, 4]", "[1, 1]")
    for given in steps_of(load(overrides, tmp_path, *IN_BANK, guidance), steps=2):
        assert not given.weights.any()
        assert (given.strengths == 1).all()
    assert len(given.weights) == 4 * 7


@pytest.mark.parametrize("power", [0.0, 1.0, 1.0001, 3.0])
def test_strengths_have_their_density(power, overrides, tmp_path):
    """strength^-power from 1.5 to 4; every class and step has its own, known to the generator."""
    guidance = GUIDANCE.replace("4]", f"4], power: {power}")
    config = load(overrides, tmp_path, BANK, guidance)
    samples, task, found = samples_of(config), drift(config), []
    one_of_each = samples.rows(torch.tensor([(samples.labels == c).nonzero()[0] for c in (0, 1)]))
    for step in range(300):
        task.steps_done.fill_(step)
        found.append(inputs_of(task, one_of_each)[-1])
    strengths = torch.cat(found).double()
    assert len(strengths.unique()) > 595
    assert 1.5 <= strengths.min() < 1.52
    assert 3.9 < strengths.max() <= 4
    inside = [torch.linspace(1.5, top, 1001).double() for top in (*strengths.tolist(), 4.0)]
    *below, whole = (torch.trapezoid(x**-power, x).item() for x in inside)
    assert is_distributed_as("uniform", [x / whole for x in below])


def test_generator_is_told_the_strength(in_bank):
    task = drift(in_bank[0])
    noise, labels, strengths = inputs_of(task, samples_of(in_bank[0]))
    (found,) = task(noise, labels, strengths)
    torch.testing.assert_close(found[:, 0], task.generator(noise, labels, strengths).flatten(1))
    assert not torch.allclose(found, task(noise, labels, strengths + 1)[0])


# ---------------------------------------------------------------------------- the average


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9])
def test_average_follows_the_generator(decay, overrides, tmp_path):
    """min(decay, (1 + step) / (10 + step)) of itself."""
    config = load(overrides, tmp_path, f"task.ema={decay}")
    task = drift(config)
    slow = copy.deepcopy(list(task.generator.parameters()))
    for step in range(5):
        one_step(task, samples_of(config, step), lr=0.1)
        kept = min(decay, (1 + step) / (10 + step))
        for mine, new in zip(slow, task.generator.parameters(), strict=True):
            mine.data = kept * mine.data + (1 - kept) * new.data
    assert task.average is not None
    for mine, found in zip(slow, task.average.module.parameters(), strict=True):
        torch.testing.assert_close(found, mine)
    noise, labels = inputs_of(task, samples_of(config))
    assert torch.equal(task.average(noise, labels), task.generator(noise, labels)) == (decay == 0)


# ---------------------------------------------------------------------------- the bank alone


BATCHES = [3, 0, 14, 5, 9]  # samples of each step, in which a class may have more than fit


def batches() -> list[tuple[Tensor, Tensor]]:
    """Images, all different, and classes."""
    torch.manual_seed(5)
    images = torch.randint(0, 256, (sum(BATCHES), 1, 2, 3)) / BYTES
    labels = torch.randint(0, 3, (sum(BATCHES),)) * 2 % 3
    labels[3:15] = 1
    labels[-2:] = 2
    return list(zip(images.split(BATCHES), labels.split(BATCHES), strict=True))


def filled() -> SampleBank:
    """This rank adds its part of each batch: parts are uneven, and some are empty."""
    bank = SampleBank(SampleBank.Config(capacity=5, positives=1), 4, torch.zeros(1, 1, 2, 3))
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for images, labels in batches():
        ends = [0, *(len(images) * (r + 1) ** 2 // ranks**2 for r in range(ranks))]
        mine = slice(ends[rank], ends[rank + 1])
        bank.add(images[mine], labels[mine])
    return bank


def test_bank_is_the_same_on_any_ranks(ranks):
    for _, state in ranks:
        for name, x in filled().state_dict().items():
            assert torch.equal(state[name], x), name


def test_bank_keeps_the_newest_of_each_class():
    """Exactly, whatever the byte; a class that never came has none."""
    bank, rows = filled(), [pair for batch in batches() for pair in zip(*batch, strict=True)]
    of_class = [[image for image, label in rows if label == number] for number in range(4)]
    assert [min(5, len(x)) for x in of_class] == [5, 5, 5, 0]
    assert bank.added.tolist() == [len(x) for x in of_class]
    for number, images in enumerate(of_class):
        held = bank.take(bank.draw((1,), number, 99))
        assert sorted(x.flatten().tolist() for x in held) == sorted(
            x.flatten().tolist() for x in images[-5:]
        )
    everything = bank.take(bank.draw((1,), None, 99))
    assert len(everything) == len(everything.unique(dim=0)) == 15


def test_bank_holds_bytes_and_numbers_exactly():
    images = torch.arange(256).view(4, 1, 8, 8) / BYTES
    points = torch.randn(4, 2) * 1e4
    latents = torch.randn(4, 3, 2, 2)  # in the shape of images, but no images
    for samples, dtype in (
        (images, torch.uint8),
        (points, torch.float32),
        (latents, torch.float32),
    ):
        bank = SampleBank(SampleBank.Config(capacity=4, positives=1), 1, samples[:1])
        assert bank.samples.dtype == dtype
        bank.add(samples, torch.zeros(4, dtype=torch.int64))
        assert torch.equal(bank.take(torch.arange(4)), samples)


def test_draws_are_fair_and_without_repetition():
    """Every sample as often as every other; another key draws others."""
    bank = filled()
    for label, held in ((0, 5), (None, 15)):
        draws = [bank.draw((7, number), label, 3).tolist() for number in range(2000)]
        assert all(len(set(draw)) == 3 for draw in draws)
        assert draws[5] == bank.draw((7, 5), label, 3).tolist()
        counts = torch.tensor(draws).flatten().bincount()
        counts = counts[counts > 0]
        assert len(counts) == held
        expected = 2000 * 3 / held
        assert (counts - expected).square().sum() / expected < 2.5 * held  # chi-square


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("task.features=[{name: run, run_dir: nowhere}]", "features 'run' are of images"),
        (f"task.features=[{ENCODER}]", "features 'encoder' are of images"),
        ("task.generator={name: unet}", "generator 'unet' draws images"),
        ("task.generator={name: dit}", "generator 'dit' draws images"),
    ],
)
def test_points_are_no_images(option, words, overrides, tmp_path):
    config = toy(overrides, tmp_path, option)
    with pytest.raises(ConfigError) as caught:
        config.build_task(points_of(config))
    assert words in str(caught.value)
    assert "(2,)" in str(caught.value)
    assert "\n" not in str(caught.value)
