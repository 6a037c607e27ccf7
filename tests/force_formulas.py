"""The contrastive force as its sources have it, and written out with every option in loops; and the
specification with the arguments of the loss."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_contrastive.losses.force import PRESETS, spec

FIVE = (0.01, 0.02, 0.05, 0.1, 0.2)
TEMPERATURES = {"seed": FIVE, "drift": FIVE, "paper": (0.02, 0.05, 0.2)}
SCOPES = {"seed": "group", "drift": "group", "paper": "global"}


def seed_force(positive: Tensor, negative: Tensor, temp: float) -> Tensor:
    """Seed 001, with its triple loop."""
    num_positive, num_negative = positive.shape[0], negative.shape[0]
    concat = torch.cat([negative, positive], dim=0)
    dist = torch.cdist(concat, concat, p=2)
    affinity = torch.softmax(-dist / temp, dim=1).pow(0.5)
    affinity = affinity * torch.softmax(-dist / temp, dim=0).pow(0.5)
    force = torch.zeros_like(negative)
    for j in range(num_negative):
        for i in range(num_positive):
            for k in range(num_negative):
                if k != j:
                    weight = affinity[j, i + num_negative] * affinity[j, k]
                    force[j] += weight * (positive[i] - negative[k])
    return force / ((dist * affinity) ** 2).mean().sqrt()


def seed_loss(positive: Tensor, negative: Tensor) -> Tensor:
    concat = torch.cat([positive, negative], dim=0)
    scale = torch.cdist(concat, concat, p=2).mean()
    positive, negative = positive / scale, negative / scale
    forces = [seed_force(positive.detach(), negative.detach(), t) for t in FIVE]
    return ((negative - (negative + sum(forces)).detach()) ** 2).mean()


def official_loss(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    temps: Sequence[float],
    floor: float,
) -> Tensor:
    """The loss that the authors of the paper published, with a floor of 1e-3: points [B, n, D],
    their weights [B, n]. Without floor and negatives it is Algorithm 2 of arXiv 2602.04770."""
    m, num_negative, dim = gen.shape[1], gen.shape[1] + neg.shape[1], gen.shape[2]
    y = torch.cat([gen, neg, pos], dim=1)
    w = torch.cat([weights[0], weights[2], weights[1]], dim=1)
    d = torch.cdist(gen, y)
    scale = (d * w[:, None]).mean() / w.mean()
    gen, y, d = gen * dim**0.5 / scale.detach(), y * dim**0.5 / scale, d / scale
    d[:, range(m), range(m)] += 100  # a point ignores itself
    total = 0
    for t in temps:
        a = ((-d / t).softmax(2) * (-d / t).softmax(1)).clip(min=floor**2).sqrt() * w[:, None]
        a_neg, a_pos = a[..., :num_negative], a[..., num_negative:]
        neg_part, pos_part = -a_neg * a_pos.sum(2)[..., None], a_pos * a_neg.sum(2)[..., None]
        coefficients = torch.cat([neg_part, pos_part], dim=2)
        force = coefficients @ y - coefficients.sum(2)[..., None] * gen
        total = total + force / force.square().mean().clip(min=1e-8).sqrt()
    return (gen - (gen + total).detach()).square().mean()


class Cell(NamedTuple):
    """The points of one group and label, which alone interact."""

    group: int
    label: int
    generated: Tensor  # [m] int64, which of the group's
    points: Tensor  # [K, D], generated before fixed before data
    weights: Tensor  # [K]
    num_negative: int  # generated and fixed

    def distances(self, preset: str) -> Tensor:
        rows = self.points[: len(self.generated)] if preset == "paper" else self.points
        return torch.cdist(rows, self.points, compute_mode="donot_use_mm_for_euclid_dist")


class Result(NamedTuple):
    """Loss, force and diagnostics."""

    loss: Tensor
    force: Tensor  # as negative, in units of the coordinates that the loss compares
    metrics: dict[str, Tensor]


def literal(
    preset: str,
    negative: Tensor,
    positive: Tensor,
    negative_labels: Tensor | None = None,
    positive_labels: Tensor | None = None,
    fixed: Tensor | None = None,
    fixed_labels: Tensor | None = None,
    negative_weights: Tensor | None = None,
    positive_weights: Tensor | None = None,
    fixed_weights: Tensor | None = None,
    *,
    temperatures: Sequence[float] | None = None,
    scale_scope: str | None = None,
    norm_scope: str | None = None,
    affinity_floor: float = 0.0,
    normalise_total: bool = False,
) -> Result:
    """Every preset with every option, in loops over groups, labels and pairs."""
    cells = cells_of(
        (negative, fixed, positive),
        (negative_labels, fixed_labels, positive_labels),
        (negative_weights, fixed_weights, positive_weights),
    )
    norm = norm_scope or SCOPES[preset]
    scales = pooled_scales(cells, preset, scale_scope or SCOPES[preset])
    metrics = {"scale": torch.stack(scales).mean().detach()}
    # Coordinates, and so forces, are in these; temperatures in units of the scale.
    units = [s / math.sqrt(negative.shape[-1]) if preset == "paper" else s for s in scales]
    units = units if preset == "seed" else [unit.detach() for unit in units]
    total = [torch.zeros_like(cell.points[: len(cell.generated)]) for cell in cells]
    for t in temperatures or TEMPERATURES[preset]:
        found = [
            force_of(cell, preset, t * scale.item(), unit.item(), affinity_floor)
            for cell, scale, unit in zip(cells, scales, units, strict=True)
        ]
        forces, lengths, neighbours = (list(x) for x in zip(*found, strict=True))
        rms = pooled_rms(cells, forces, norm)
        forces = over(forces, rms if preset == "paper" else pooled_rms(cells, lengths, norm))
        rms = rms if preset == "paper" else pooled_rms(cells, forces, norm)
        metrics[f"force_rms/{t:g}"] = torch.stack(rms).mean()
        metrics[f"neighbours/{t:g}"] = torch.cat(neighbours).mean()
        total = [a + b for a, b in zip(total, forces, strict=True)]
    if normalise_total:
        total = over(total, pooled_rms(cells, total, norm))
    loss, force = negative.new_zeros(()), torch.zeros_like(flat(negative))
    for cell, unit, f in zip(cells, units, total, strict=True):
        n = cell.points[: len(cell.generated)] / unit
        loss = loss + (n - (n + f).detach()).square().sum()
        force[cell.group, cell.generated] = f
    return Result(loss / negative.numel(), force.reshape(negative.shape), metrics)


def flat(x: Tensor) -> Tensor:
    """[..., n, D] -> [G, n, D]."""
    return x.reshape(-1, *x.shape[-2:])


def cells_of(points: Sequence, labels: Sequence, weights: Sequence) -> list[Cell]:
    """Each of (generated, fixed, data); None for no fixed, no labels, all weights 1."""
    kinds = [i for i, x in enumerate(points) if x is not None]
    x = {i: flat(points[i]) for i in kinds}
    tags = {i: torch.zeros(x[i].shape[1]) if labels[i] is None else labels[i] for i in kinds}
    w = {i: torch.ones_like(points[i][..., 0]) for i in kinds}
    w = {i: w[i] if weights[i] is None else w[i] * weights[i] for i in kinds}
    w = {i: w[i].reshape(x[i].shape[:-1]) for i in kinds}
    cells = []
    for g in range(len(x[0])):
        for label in torch.cat(list(tags.values())).unique().tolist():
            at = {i: (tags[i] == label).nonzero().flatten() for i in kinds}
            of_kinds = torch.cat([x[i][g, at[i]] for i in kinds])
            num_negative = sum(len(at[i]) for i in kinds if i < 2)
            weight = torch.cat([w[i][g, at[i]] for i in kinds])
            cells.append(Cell(g, label, at[0], of_kinds, weight, num_negative))
    return cells


def pool(cells: list[Cell], parts: list, scope: str) -> list:
    """For every cell, the list of the parts of all cells that a scope puts with it."""
    places = {"label": (0, 1), "group": (0,), "global": ()}[scope]
    keys = [tuple(cell[i] for i in places) for cell in cells]
    return [[part for k, part in zip(keys, parts, strict=True) if k == key] for key in keys]


def pooled_scales(cells: list[Cell], preset: str, scope: str) -> list[Tensor]:
    """Mean distance, pairs being weighted as their key is."""
    pairs = []
    for cell in cells:
        d = cell.distances(preset)
        w = cell.weights.expand_as(d)
        pairs.append(torch.stack([(d * w).sum(), w.sum()]))
    means = [sum(parts)[0] / sum(parts)[1] for parts in pool(cells, pairs, scope)]
    return [mean if mean > 0 else torch.ones_like(mean) for mean in means]


def pooled_rms(cells: list[Cell], parts: list[Tensor], scope: str) -> list[Tensor]:
    """Root mean square of all numbers of the parts."""
    pools = [torch.cat([x.flatten() for x in parts]) for parts in pool(cells, parts, scope)]
    return [x.square().mean().sqrt() if len(x) else x.new_zeros(()) for x in pools]


def over(forces: list[Tensor], units: list[Tensor]) -> list[Tensor]:
    """Quotients; 0/0 is 0."""
    return [f / u if u > 0 else f for f, u in zip(forces, units, strict=True)]


@torch.no_grad()
def force_of(
    cell: Cell, preset: str, temperature: float, unit: float, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Force on the generated points and d A of all pairs, in units; and how many points each
    generated one sees."""
    d, m = cell.distances(preset), len(cell.generated)
    own = torch.eye(len(d), d.shape[1], dtype=torch.bool)
    scores = -d / temperature
    if preset != "seed":
        scores = scores.masked_fill(own, -torch.inf)
    rows, columns = (scores.softmax(dim).nan_to_num(0.0) for dim in (1, 0))
    # k != j; what is below the floor is brought to it, a point with itself too.
    a = (rows * columns).sqrt().masked_fill(own, 0.0).clamp(min=floor) * cell.weights
    x, force = cell.points / unit, torch.zeros_like(cell.points[:m])
    for j in range(m):
        for i in range(cell.num_negative, len(x)):
            for k in range(cell.num_negative):
                force[j] += a[j, i] * a[j, k] * (x[i] - x[k])
    seen = rows[:m].square().sum(1)
    return force, d / unit * a, torch.where(seen > 0, 1 / seen, 0.0)


def specified(
    preset: str,
    negative: Tensor,
    positive: Tensor,
    negative_labels: Tensor | None = None,
    positive_labels: Tensor | None = None,
    fixed: Tensor | None = None,
    fixed_labels: Tensor | None = None,
    negative_weights: Tensor | None = None,
    positive_weights: Tensor | None = None,
    fixed_weights: Tensor | None = None,
    *,
    temperatures: Sequence[float] | None = None,
    scale_scope: str | None = None,
    norm_scope: str | None = None,
    affinity_floor: float = 0.0,
    normalise_total: bool = False,
) -> Result:
    """What the specification finds."""
    kinds = [
        (negative, negative_labels, negative_weights),
        (fixed, fixed_labels, fixed_weights),
        (positive, positive_labels, positive_weights),
    ]
    numbers, labels, weights, points = [], [], [], []
    for number, (x, label, weight) in enumerate(kinds):
        if x is not None:
            one = torch.ones_like(x[..., 0])
            points.append(flat(x))
            weights.append(flat((one if weight is None else one * weight)[..., None])[..., 0])
            labels.append(torch.zeros(x.shape[-2]) if label is None else label)
            numbers.append(torch.full(x.shape[-2:-1], number))
    kind, label, rules = torch.cat(numbers), torch.cat(labels), PRESETS[preset]
    is_generated = kind == 0
    result = spec.loss(
        torch.cat(points, 1),
        is_generated,
        kind == 2,
        label,
        torch.cat(weights, 1),
        temperatures=temperatures or rules.temperatures,
        square=rules.square,
        mask_self=rules.mask_self,
        divide_by=rules.divide_by,
        scale_scope=scale_scope or rules.scale_scope,
        norm_scope=norm_scope or rules.norm_scope,
        scale_gradient=rules.scale_gradient,
        per_dimension=rules.per_dimension,
        floor=affinity_floor,
        normalise_total=normalise_total,
    )
    first = [(label == x).nonzero()[0, 0] for x in label.unique()]
    metrics = {"scale": result.scale[:, first].mean().detach()}
    for number, t in enumerate(temperatures or rules.temperatures):
        metrics[f"force_rms/{t:g}"] = result.rms[number][:, first].mean()
        metrics[f"neighbours/{t:g}"] = result.neighbours[number][:, is_generated].mean()
    return Result(result.value, result.force[:, is_generated].reshape(negative.shape), metrics)
