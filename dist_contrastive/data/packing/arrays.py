"""Arrays in files of NumPy as shards: images, vectors, labels."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_contrastive.data.packing.images import channel_axis, channels_first
from dist_contrastive.data.packing.options import (
    PackOptions,
    check_target,
    numbered_key,
    order,
)
from dist_contrastive.data.packing.writer import Packed, pack_samples
from dist_contrastive.errors import ConfigError, DataError


def pack_arrays(
    folder: Path | str,
    options: PackOptions | None = None,
    *,
    image: str | None = None,
    array: str | None = None,
    label: str | None = None,
) -> Packed:
    """Pack the rows of arrays whose first dimensions are equal.

    Each is named as FILE.npy, which is read row by row, or as FILE.npz:NAME, which is held in
    memory. A sample has

        png   row i of `image`, if that is uint8
        npy   row i of `array`; of `image`, if that has another type, as [C, H, W] if it is one of
              the shapes of uint8
        cls   row i of `label`, if those are integers; its number, if those are texts
        json  "index": i; "label": row i of `label`, null where it is NaN; "class": its text

    Texts are numbered in their order.

    Args:
        image: uint8 [n, H, W], [n, C, H, W] or [n, H, W, C] with C = 1 or 3, or any numbers
            [n, ...].
        array: any numbers [n, ...].
        label: integers, floating numbers or texts [n].

    Raises:
        ConfigError: as `check_target`; neither image nor array, or both for one field.
        DataError: as `pack_samples`; a file that cannot be read, or shapes that do not fit.
    """
    options = options or PackOptions()
    check_target(folder, options)
    named = {"image": image, "array": array, "label": label}
    arrays = {role: _load(text, role) for role, text in named.items() if text is not None}
    _check(arrays, named)
    is_png = "image" in arrays and arrays["image"].dtype == np.uint8
    names = _class_names(arrays.get("label"))
    image_of = _image_maker(arrays["image"], f"rows of {image}") if "image" in arrays else None

    def make(number: int) -> dict[str, Any]:
        details: dict[str, Any] = {"index": number}
        sample: dict[str, Any] = {"__key__": numbered_key(number), "json": details}
        if image_of is not None:
            sample["png" if is_png else "npy"] = image_of(number)
        if "array" in arrays:
            sample["npy"] = arrays["array"][number]
        if "label" in arrays:
            value = arrays["label"][number].item()
            if isinstance(value, str):
                details["class"], value = value, names[value]
            details["label"] = value if value == value else None
            if isinstance(value, int):
                sample["cls"] = value
        return sample

    count = len(next(iter(arrays.values())))
    return pack_samples(order(count, options), make, folder, options, count)


def _image_maker(images: NDArray[Any], what: str) -> Callable[[int], NDArray[Any]]:
    """Function from the number of a row to the row as [C, H, W]; as it is, if it is no image and
    has another type than uint8."""
    try:
        axis = channel_axis(images.shape[1:], what)
    except DataError:
        if images.dtype == np.uint8:
            raise
        return images.__getitem__
    return lambda number: channels_first(images[number], axis)


def _class_names(labels: NDArray[Any] | None) -> dict[str, int]:
    """Numbers of labels that are texts."""
    if labels is None or labels.dtype.kind != "U":
        return {}
    return {name: number for number, name in enumerate(np.unique(labels).tolist())}


def _load(text: str, role: str) -> NDArray[Any]:
    file, _, name = text.partition(".npz:")
    path = Path(f"{file}.npz" if name else text)
    problem = ""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _checked(loaded, text, role)
        with loaded:
            if name in loaded.files:
                return _checked(loaded[name], text, role)
            problem = f"it holds {', '.join(loaded.files)}; name one, as {path}:{loaded.files[0]}"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} of --{role} cannot be read ({error}); give numbers, as FILE.npy or "
            f"FILE.npz:NAME"
        ) from error
    raise DataError(f"{text} of --{role} is no array: {problem}")


def _checked(array: NDArray[Any], text: str, role: str) -> NDArray[Any]:
    if role == "label" and array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    if array.dtype.kind not in ("biufU" if role == "label" else "biuf") or array.ndim < 1:
        raise DataError(
            f"{text} has the type {array.dtype} and shape {list(array.shape)}; give numbers "
            f"[n, ...]"
        )
    return array


def _check(arrays: Mapping[str, NDArray[Any]], named: Mapping[str, str | None]) -> None:
    if not arrays.keys() & {"image", "array"}:
        raise ConfigError("there is nothing to pack; give --image FILE.npy or --array FILE.npy")
    if "image" in arrays and "array" in arrays and arrays["image"].dtype != np.uint8:
        raise ConfigError(
            f"the image {named['image']} of type {arrays['image'].dtype} and the array "
            f"{named['array']} would both be the field npy; give uint8 images, or one of the two"
        )
    lengths = {str(named[role]): len(array) for role, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{length} of {name}" for name, length in lengths.items())
        raise DataError(f"the numbers of rows differ: {counts}; give arrays of the same rows")
    if not next(iter(lengths.values())):
        raise DataError(f"{', '.join(lengths)} have 0 rows; give 1 or more")
    if "label" in arrays:
        labels = arrays["label"]
        if labels.ndim != 1 or labels.dtype.kind == "b":
            raise DataError(
                f"the labels {named['label']} have the type {labels.dtype} and shape "
                f"{list(labels.shape)}; give integers, floating numbers or texts [n]"
            )
