"""A folder of images as shards."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from dist_contrastive.data.packing.image_files import (
    IMAGE_EXTENSIONS,
    check_image_field,
    read_image,
)
from dist_contrastive.data.packing.keys import key_of_path
from dist_contrastive.data.packing.options import PackOptions, check_target
from dist_contrastive.data.packing.writer import Packed, pack_samples
from dist_contrastive.errors import DataError


def pack_images(
    source: Path | str,
    folder: Path | str,
    options: PackOptions | None = None,
    field: str | None = None,
) -> Packed:
    """Pack the images of a folder and of those in it; their bytes are copied as they are.

    A sample has

        jpg   or png, webp, bmp, gif, tif, ppm: the image, in the field of its true format
        json  "path": where it lies in the source
        cls   the number of its class
        json  "label": the same; "class": its name

    The last two only if every image lies in a folder directly in the source: the names of these
    folders, sorted, are then the classes 0, 1, .... Files and folders whose names begin with a dot
    are passed over.

    Args:
        field: for all images, whatever their formats; they are decoded by their content.

    Raises:
        ConfigError: as `check_target`, `check_image_field`.
        DataError: as `pack_samples`; no folder, no images, or two that would have the same key.
    """
    options = options or PackOptions()
    check_target(folder, options)
    check_image_field(field)
    source = Path(source)
    if not source.is_dir():
        raise DataError(f"the image folder {source} does not exist; give a folder of images")
    paths = sorted(_image_paths(source))
    if not paths:
        raise DataError(
            f"{source} holds 0 images; give a folder of files that end in "
            f"{', '.join(IMAGE_EXTENSIONS)}"
        )
    keys = _keys(paths)
    classes = _classes(paths)

    def make(number: int) -> dict[str, Any]:
        path = paths[number]
        found, data = read_image(source / path, f"image {path}", options.verify)
        details: dict[str, Any] = {"path": path}
        sample: dict[str, Any] = {"__key__": keys[number], field or found: data, "json": details}
        if classes:
            name = path.partition("/")[0]
            sample["cls"] = classes[name]
            details.update({"label": classes[name], "class": name})
        return sample

    return pack_samples(options.order(len(paths)), make, folder, options, len(paths))


def _image_paths(source: Path) -> Iterator[str]:
    """Paths of images in the source, those behind links to folders too."""
    for folder, names, files in os.walk(source, onerror=_refuse_folder, followlinks=True):
        names[:] = [name for name in names if not name.startswith(".")]
        for name in names:
            below = Path(folder) / name
            if below.is_symlink() and below.resolve() in {x.resolve() for x in below.parents}:
                raise DataError(f"{below} links to a folder that holds it; remove the link")
        for name in files:
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith("."):
                yield (Path(folder) / name).relative_to(source).as_posix()


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(
        f"the folder {error.filename} cannot be read ({error.strerror}); allow it, or move it away"
    ) from error


def _keys(paths: list[str]) -> list[str]:
    found: dict[str, str] = {}
    for path in paths:
        key = key_of_path(path)
        if key in found:
            raise DataError(
                f"{found[key]} and {path} would both have the key {key!r}; rename one of them, or "
                f"pack them apart"
            )
        found[key] = path
    return list(found)


def _classes(paths: list[str]) -> dict[str, int]:
    """Numbers of the folders directly in the source, if they are classes."""
    if any(path.count("/") != 1 for path in paths):
        return {}
    return {name: number for number, name in enumerate(sorted({p.split("/")[0] for p in paths}))}
