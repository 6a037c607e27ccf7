"""A tree of classes, and the probabilities that logits give to its nodes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_contrastive import collectives
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses.base import in_full_precision


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """A tree whose leaves are the classes 0 to C - 1, all at the same depth L.

    Nodes are numbered level by level from below the root, and siblings stand together. A model
    gives one logit for each node; siblings compete with each other alone (hierarchical softmax:
    Morin and Bengio 2005; for classification Redmon and Farhadi, arXiv 1612.08242)::

        p(node | parent) = softmax over the node and its siblings
        p(class) = product of p(node | parent) over the nodes on the path of the class

    A decision is always a class, so its nodes on all levels agree with each other. Make a hierarchy
    with `of_tree` or `flat`. It has neither parameters nor state, and works on any device.
    """

    paths: Tensor
    """int64 [C, L]: the node of each class on every level; the last column is its leaf."""
    sibling_counts: tuple[int, ...]
    """How many children each parent has, in the order of the children's numbers."""
    names: tuple[str, ...]
    """Of the nodes, with those above them: `curved`, `curved/2`; in a flat hierarchy `2`."""
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of_tree(cls, tree: Any, num_classes: int) -> "Hierarchy":
        """The hierarchy of nested mappings whose innermost values are lists of class numbers.

        Args:
            tree: as in YAML, ``{round: [0, 6, 8, 9], straight: [1, 4, 7], curved: [2, 3, 5]}`` has
                L = 2; mappings may be deeper, and a list alone has L = 1. num_classes: C.

        Raises:
            ConfigError: not such a tree, or not every class just once in it, or less than 2.
        """
        if num_classes < 2:
            raise ConfigError(f"num_classes={num_classes} leaves nothing to decide; give 2 or more")
        names: list[str] = []
        sibling_counts: list[int] = []
        parents = [_Node("", (), tree)]
        while True:
            _check_groups(parents)
            sibling_counts += [len(parent.below) for parent in parents]
            nodes = [child for parent in parents for child in parent.children()]
            nodes = [node.numbered(len(names) + place) for place, node in enumerate(nodes)]
            names += [node.name for node in nodes]
            if not isinstance(parents[0].below, Mapping):
                break
            parents = nodes
        _check_classes([leaf.below for leaf in nodes], num_classes)
        paths = [leaf.path for leaf in sorted(nodes, key=lambda leaf: leaf.below)]
        return cls(torch.tensor(paths), tuple(sibling_counts), tuple(names))

    @classmethod
    def flat(cls, num_classes: int) -> "Hierarchy":
        """All classes side by side: L = 1, and node c is class c."""
        return cls.of_tree(list(range(num_classes)), num_classes)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.paths.shape[0]

    @property
    def depth(self) -> int:
        """L, the number of levels below the root."""
        return self.paths.shape[1]

    @property
    def num_nodes(self) -> int:
        """Of all levels together: the number of logits."""
        return len(self.names)

    def level_log_probabilities(self, logits: Tensor) -> Tensor:
        """log p(node | parent) of every node: [b, num_nodes], in fp32 or fp64.

        Args:
            logits: floating [b, num_nodes].

        Raises:
            ConfigError: another number of logits.
        """
        if logits.shape[-1] != self.num_nodes:
            raise ConfigError(
                f"{logits.shape[-1]} logits for a hierarchy of {self.num_nodes} nodes on "
                f"{self.depth} level(s); give one for each node"
            )
        (logits,) = in_full_precision(logits)
        groups = logits.split(self.sibling_counts, dim=-1)
        return torch.cat([siblings.log_softmax(-1) for siblings in groups], dim=-1)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """log p(class): [b, C], in fp32 or fp64; see `level_log_probabilities`."""
        nodes = self.level_log_probabilities(logits)
        levels = self._paths_on(nodes.device).unbind(dim=1)
        log_p = nodes.index_select(-1, levels[0])
        for level in levels[1:]:
            log_p = log_p + nodes.index_select(-1, level)
        return log_p

    def decide(self, logits: Tensor) -> Tensor:
        """The most probable class: int64 [b]. Its nodes are the prediction on every level."""
        return self.log_probabilities(logits).argmax(-1)

    def ancestors(self, classes: Tensor) -> Tensor:
        """The nodes on the paths of classes [...]: int64 [..., L]. All must be from 0 to C - 1."""
        return self._paths_on(classes.device)[classes.long()]

    def _paths_on(self, device: torch.device) -> Tensor:
        """Paths on a device, to which they are copied once."""
        if device not in self._copies:
            self._copies[device] = collectives.to_device(self.paths, device)
        return self._copies[device]

    def matched_levels(self, decisions: Tensor, labels: Tensor) -> Tensor:
        """On how many levels, from the root, the paths of two classes agree: int64, 0 to L.

        Args:
            decisions, labels: classes, of shapes that broadcast together.
        """
        return (self.ancestors(decisions) == self.ancestors(labels)).sum(-1)


class _Node(NamedTuple):
    """A node while the tree is read; `below` is a mapping, a list, or a leaf's class."""

    name: str
    path: tuple[int, ...]
    below: Any

    def children(self) -> "list[_Node]":
        if isinstance(self.below, Mapping):
            return [self._child(name, below) for name, below in self.below.items()]
        return [self._child(number, number) for number in self.below]

    def _child(self, name: Any, below: Any) -> "_Node":
        return _Node(f"{self.name}/{name}" if self.name else str(name), self.path, below)

    def numbered(self, number: int) -> "_Node":
        return self._replace(path=(*self.path, number))


def _check_groups(groups: list[_Node]) -> None:
    """Refuse a level whose groups are not all mappings, or all lists."""
    for name, _, below in groups:
        where = f"group {name!r} of the hierarchy" if name else "the hierarchy"
        if not isinstance(below, Mapping | list | tuple):
            raise ConfigError(
                f"{where} is {below!r}, not a tree; give a list of class numbers, or a mapping "
                f"from names to such groups"
            )
        if not below:
            raise ConfigError(f"{where} is empty; put classes into it or take it out")
    deeper = [name for name, _, below in groups if isinstance(below, Mapping)]
    lists = [name for name, _, below in groups if not isinstance(below, Mapping)]
    if deeper and lists:
        raise ConfigError(
            f"leaves are at different depths: group {lists[0]!r} of the hierarchy is a list of "
            f"classes, {deeper[0]!r} has groups below it; give all classes the same depth"
        )


def _check_classes(classes: list[Any], num_classes: int) -> None:
    """Refuse leaves that are not every class just once."""
    for number in classes:
        if not isinstance(number, int) or isinstance(number, bool):
            raise ConfigError(
                f"{number!r} stands in the place of a class in the hierarchy; give class numbers "
                f"from 0 to {num_classes - 1}"
            )
        if not 0 <= number < num_classes:
            raise ConfigError(
                f"label outside the hierarchy: class {number} is not among 0 to "
                f"{num_classes - 1}; take it out, or set num_classes to the number of classes"
            )
    repeated = [number for number, times in Counter(classes).items() if times > 1]
    if repeated:
        raise ConfigError(f"class {repeated[0]} stands twice in the hierarchy; leave it in once")
    missing = sorted(set(range(num_classes)) - set(classes))
    if missing:
        raise ConfigError(
            f"{len(missing)} of {num_classes} classes are missing from the hierarchy, the first is "
            f"{missing[0]}; put every class into a group"
        )
