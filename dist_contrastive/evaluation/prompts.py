"""Prompts for zero-shot classification: names of classes put into templates, in a YAML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import model_validator

from dist_contrastive.errors import ConfigError
from dist_contrastive.settings import Settings
from dist_contrastive.yaml_files import read_yaml

_PLACE = "{}"


class Prompts(Settings):
    """Texts of classes: ``templates: ["a photo of a {}.", "art of a {}."]``."""

    templates: tuple[str, ...]
    """Texts with {} in the place of the name of a class; of several embeddings are averaged."""
    classes: tuple[str, ...] | None = None
    """Names of the classes 0, 1, ..., as texts have them; null: those of the data."""

    @model_validator(mode="after")
    def _are_prompts(self) -> Self:
        if not self.templates:
            raise ValueError("templates is empty; give one or more, as 'a photo of a {}.'")
        for template in self.templates:
            if template.count(_PLACE) != 1:
                raise ValueError(
                    f"templates holds {template!r}, which has {template.count(_PLACE)} places {{}} "
                    f"for the name of a class; give each one"
                )
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("classes holds a name twice; give each class a name of its own")
        return self

    def texts(self, known: Mapping[int, str], num_classes: int) -> list[list[str]]:
        """The prompts of each class 0 ... num_classes - 1, one for each template.

        Args:
            known: names of the classes of the data, by number, as far as they are known.

        Raises:
            ConfigError: a class has no name, or there are more names than classes.
        """
        names = known if self.classes is None else dict(enumerate(self.classes))
        if set(names) != set(range(num_classes)):
            where = "the data name" if self.classes is None else "the prompts name"
            raise ConfigError(
                f"{where} {len(names)} classes, and there are {num_classes}; give the names of all "
                f"as classes, beside templates"
            )
        return [
            [template.replace(_PLACE, names[number]) for template in self.templates]
            for number in range(num_classes)
        ]


def read_prompts(path: Path) -> Prompts:
    """Prompts of a YAML file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    return Prompts.checked(read_yaml(path, as_text=True).value, f"{path}: ")
