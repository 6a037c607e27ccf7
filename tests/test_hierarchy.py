"""The tree of classes and its cross-entropy, against formulas written out and over ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dist_contrastive.errors import ConfigError, NonFiniteError
from dist_contrastive.losses.classification import PathCrossEntropy
from dist_contrastive.losses.hierarchy import Hierarchy
from dist_contrastive.testing import run_ranks

DIGITS = {"round": [0, 6, 8, 9], "straight": [1, 4, 7], "curved": [2, 3, 5]}
DEEP = {  # groups of one, levels of different width, names that are numbers
    "a": {"b": [4, 1], "c": [0]},
    2: {"d": [2, 6, 3], "e": [5], "f": [7, 8]},
}
TREES = {"flat": (list(range(6)), 6), "digits": (DIGITS, 10), "deep": (DEEP, 9)}


def path_of(tree, number: int) -> list[tuple]:
    """The names from below the root to a class."""
    if not isinstance(tree, dict):
        return [(number,)] if number in tree else []
    for name, below in tree.items():
        path = path_of(below, number)
        if path:
            return [(name,), *((name, *rest) for rest in path)]
    return []


def leaves(tree) -> set[int]:
    return set().union(*map(leaves, tree.values())) if isinstance(tree, dict) else set(tree)


def naive_log_p(tree, hierarchy: Hierarchy, logits: Tensor) -> tuple[Tensor, Tensor]:
    """log p(class) [b, C] and log p(node | parent) on the way [b, C, L], decision by decision."""
    number = {name: place for place, name in enumerate(hierarchy.names)}
    p = logits.new_ones(len(logits), hierarchy.num_classes, hierarchy.depth)
    for c in range(hierarchy.num_classes):
        below = tree
        for level, names in enumerate(path_of(tree, c)):
            siblings = [number["/".join(map(str, (*names[:-1], name)))] for name in below]
            own = number["/".join(map(str, names))]
            assert hierarchy.paths[c, level] == own
            p[:, c, level] = logits[:, own].exp() / logits[:, siblings].exp().sum(1)
            below = below[names[-1]] if isinstance(below, dict) else None
    return p.prod(2).log(), p.log()


@pytest.mark.parametrize("name", TREES)
def test_probabilities_are_those_of_each_decision(name):
    tree, num_classes = TREES[name]
    hierarchy = Hierarchy.of_tree(tree, num_classes)
    logits = 3 * torch.randn(5, hierarchy.num_nodes, dtype=torch.float64)
    log_p, on_path = naive_log_p(tree, hierarchy, logits)
    found = hierarchy.log_probabilities(logits)
    torch.testing.assert_close(found, log_p, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(5).double(), rtol=0, atol=1e-12)
    nodes = hierarchy.level_log_probabilities(logits)
    torch.testing.assert_close(nodes[:, hierarchy.paths], on_path, rtol=0, atol=1e-11)
    assert hierarchy.decide(logits).equal(log_p.argmax(1))
    assert sorted(set(hierarchy.paths.flatten().tolist())) == list(range(hierarchy.num_nodes))


def test_matched_levels_are_the_common_path():
    hierarchy = Hierarchy.of_tree(DEEP, 9)
    a, b = torch.arange(9)[:, None], torch.arange(9)
    for i in range(9):
        for j in range(9):
            same = [x == y for x, y in zip(path_of(DEEP, i), path_of(DEEP, j), strict=True)]
            assert hierarchy.matched_levels(a, b)[i, j] == sum(same)
    assert hierarchy.matched_levels(torch.tensor(4), torch.tensor([4, 1, 0, 2])).tolist() == [
        *(3, 2, 1, 0)
    ]


def test_names_and_numbers():
    hierarchy = Hierarchy.of_tree(DIGITS, 10)
    assert (hierarchy.depth, hierarchy.num_nodes, hierarchy.num_classes) == (2, 13, 10)
    assert [hierarchy.names[node] for node in hierarchy.ancestors(torch.tensor(4))] == [
        "straight",
        "straight/4",
    ]
    flat = Hierarchy.flat(3)
    assert flat.names == ("0", "1", "2")
    assert flat.paths.tolist() == [[0], [1], [2]]


def test_half_precision_is_summed_in_fp32():
    hierarchy = Hierarchy.of_tree(DIGITS, 10)
    logits = torch.randn(4, 13).bfloat16()
    found = hierarchy.log_probabilities(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, hierarchy.log_probabilities(logits.double()).float())


BAD_TREES = {
    "missing": ([0, 1], 4, "2 of 4 classes are missing from the hierarchy, the first is 2"),
    "twice": ({"a": [0, 1], "b": [1, 2]}, 3, "class 1 stands twice in the hierarchy"),
    "too large": ([0, 3], 2, "label outside the hierarchy: class 3 is not among 0 to 1"),
    "negative": ([0, -1], 2, "label outside the hierarchy: class -1 is not among 0 to 1"),
    "depths": ({"a": [0], "b": {"c": [1]}}, 2, "different depths: group 'a'"),
    "depth of a class": ({"a": [0], "b": 1}, 2, "group 'b' of the hierarchy is 1, not a tree"),
    "empty list": ({"a": [0, 1], "b": []}, 2, "group 'b' of the hierarchy is empty"),
    "empty mapping": ({}, 2, "the hierarchy is empty"),
    "nothing": (None, 2, "the hierarchy is None, not a tree"),
    "words": ({"a": {"b": "0, 1"}}, 2, "group 'a/b' of the hierarchy is '0, 1', not a tree"),
    "list of lists": ([[0], [1]], 2, "[0] stands in the place of a class"),
    "boolean": ([0, True], 2, "True stands in the place of a class"),
    "one class": ([0], 1, "num_classes=1 leaves nothing to decide"),
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_bad_trees_are_refused(name):
    tree, num_classes, words = BAD_TREES[name]
    with pytest.raises(ConfigError) as caught:
        Hierarchy.of_tree(tree, num_classes)
    assert words in str(caught.value)


def test_settings_and_logits_must_fit():
    hierarchy = Hierarchy.of_tree(DIGITS, 10)
    with pytest.raises(ConfigError, match="one weight for each level"):
        PathCrossEntropy(hierarchy, [1.0])
    with pytest.raises(ConfigError, match=r"level_weights\.1=-1"):
        PathCrossEntropy(hierarchy, [1.0, -1.0])
    with pytest.raises(ConfigError, match="10 logits for a hierarchy of 13 nodes on 2 level"):
        PathCrossEntropy(hierarchy)(torch.zeros(2, 10), torch.zeros(2).long())
    with pytest.raises(ConfigError, match="give integers"):
        PathCrossEntropy(hierarchy)(torch.zeros(2, 13), torch.zeros(2))


def test_one_level_is_cross_entropy():
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, 0, -1, 4, 4, -1, 1])
    expected = F.cross_entropy(logits, labels, ignore_index=-1)
    (slope,) = torch.autograd.grad(expected, logits)
    loss = PathCrossEntropy(Hierarchy.flat(5))(logits, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits.grad, slope, rtol=0, atol=1e-12)


SPLITS = {1: [(7,)], 2: [(4, 3), (0, 7)], 3: [(1, 4, 2), (5, 0, 2)]}
# In the split (4, 3) all labels are on rank 0; in (5, 0, 2) rank 2 has rows but no label.
LABELS = {"some": [3, -1, 8, 0, -1, -1, -1], "none": [-1] * 7, "all": [0, 1, 2, 3, 3, 8, 7]}
WEIGHTS = (2.0, 0.5, 1.25)


def problem(labels: str) -> tuple[nn.Linear, Tensor, Tensor]:
    """The same linear classifier, rows and labels in every process."""
    generator = torch.Generator().manual_seed(5)
    hierarchy = Hierarchy.of_tree(DEEP, 9)
    model = nn.Linear(4, hierarchy.num_nodes, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    rows = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    return model, rows, torch.tensor(LABELS[labels])


def naive_path_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    hierarchy = Hierarchy.of_tree(DEEP, 9)
    _, on_path = naive_log_p(DEEP, hierarchy, logits)
    terms = [
        -sum(w * on_path[i, c, level] for level, w in enumerate(WEIGHTS))
        for i, c in enumerate(labels.tolist())
        if c >= 0
    ]
    return torch.stack(terms).mean() if terms else 0 * logits.sum()


def on_rank(split: tuple[int, ...]) -> dict[str, tuple[Tensor, list[Tensor]]]:
    found = {}
    for name in LABELS:
        model, rows, labels = problem(name)
        rank = dist.get_rank()
        loss = PathCrossEntropy(Hierarchy.of_tree(DEEP, 9), WEIGHTS)
        value = loss(model(rows.split(split)[rank]), labels.split(split)[rank])
        value.backward()
        found[name] = value.detach(), [parameter.grad for parameter in model.parameters()]
    return found


@pytest.mark.parametrize(("world_size", "split"), [(w, s) for w in SPLITS for s in SPLITS[w]])
def test_gradient_contract(world_size, split):
    results = run_ranks(on_rank, world_size, split)
    for name in LABELS:
        model, rows, labels = problem(name)
        expected = naive_path_cross_entropy(model(rows), labels)
        slopes = torch.autograd.grad(expected, list(model.parameters()))
        for value, _ in (result[name] for result in results):
            torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-11)
        for place, slope in enumerate(slopes):
            mean = torch.stack([result[name][1][place] for result in results]).mean(0)
            torch.testing.assert_close(mean, slope, rtol=1e-9, atol=1e-12)


BAD_ROWS = {  # logits and labels of rank 1, error, words
    "label": (torch.zeros(2, 13), [0, 10], ConfigError, "label outside the hierarchy: 10 is not"),
    "below -1": (torch.zeros(2, 13), [0, -2], ConfigError, "-2 as the lowest"),
    "NaN": (torch.full((2, 13), torch.nan), [0, 1], NonFiniteError, "2 of 2 rows of logits on"),
    "rows": (torch.zeros(2, 13), [0], ConfigError, "rank 1 has 2 rows of logits, 1 rows of labels"),
    "nodes": (torch.zeros(2, 10), [0, 1], ConfigError, "logits differ between ranks"),
}


def refused() -> dict[str, str]:
    messages = {}
    loss = PathCrossEntropy(Hierarchy.of_tree(DIGITS, 10))
    for name, (logits, labels, error, _) in BAD_ROWS.items():
        if dist.get_rank() == 0:
            logits, labels = torch.zeros(3, 13), [0, 1, -1]
        with pytest.raises(error) as caught:
            loss(logits, torch.tensor(labels))
        messages[name] = str(caught.value)
    return messages


def test_bad_rows_on_one_rank_are_refused_on_all_in_the_same_words():
    first, second = run_ranks(refused, 2)
    for name, (*_, words) in BAD_ROWS.items():
        assert first[name] == second[name]
        assert words in first[name]
