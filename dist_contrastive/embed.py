"""Vectors of a data set by a trained run, in a file with its keys.

Samples are embedded in parts of a fixed size, each of which is a file that is there whole or not at
all: rows, keys and numbers of its samples. So a part is the same whichever rank makes it, what was
done before an interruption is not done again, and a row never stands beside another one's key.
"""

import itertools
import json
import os
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from dist_contrastive import atomic, checkpoint, collectives
from dist_contrastive import config as configs
from dist_contrastive.backend import Backend
from dist_contrastive.config import RunConfig
from dist_contrastive.data.collate import collate
from dist_contrastive.data.fields import Fields, Samples
from dist_contrastive.data.progress import map_in_threads
from dist_contrastive.data.record import recorded_example
from dist_contrastive.data.source import Source
from dist_contrastive.data.sources import join_sources, open_source, sources_at
from dist_contrastive.data.training import first_sample
from dist_contrastive.errors import ConfigError, DataError
from dist_contrastive.evaluation.splits import shape_of, usable_row
from dist_contrastive.runs import load_weights
from dist_contrastive.tasks import ImageTask, Paired, Task

What = Literal["representation", "embedding", "partner"]
"""representation: of the encoder; embedding: after its head, what the loss compares; partner: that
of the second modality."""
FORMATS = (".npy", ".parquet")
PART = 4096  # samples of a file in the meantime
BATCH = 64  # samples that are read, and embedded, at a time
_READERS = min(4, os.cpu_count() or 1)  # threads


class Embedded(NamedTuple):
    """What a file holds, and what it lacks."""

    path: Path
    rows: int
    left_out: list[str]
    """A sentence for each sample that could not be read."""


def embed(
    run_dir: Path, source: str, out: Path, what: What = "representation", is_trusted: bool = False
) -> Embedded:
    """Write vectors of all samples of a source, in their order.

    OUT.npy holds fp32 [n, D], and OUT.keys.jsonl beside it the keys, line by line; OUT.parquet has
    columns ``key`` and ``vector``. Called on each rank of torchrun, or in one process. When it was
    interrupted, the same call goes on.

    Args:
        source: as `data.train` of a config: a folder, pattern or URL of shards; or a folder of
            images.

    Raises:
        ConfigError, DataError: on all ranks: the run, the source or OUT cannot be used.

    Collectives: gathers of objects.
    """
    if what not in get_args(What):
        raise ConfigError(f"what={what!r} is not known; use one of {', '.join(get_args(What))}")
    if out.suffix not in FORMATS:
        raise ConfigError(f"{out} ends with none of {', '.join(FORMATS)}; name a file that does")
    if out.exists():
        raise ConfigError(f"{out} is there already; delete it, or name another file")
    config = configs.load_run(run_dir, is_trusted=is_trusted)
    backend = Backend(config.backend.model_copy(update={"zero_stage": 0}))
    try:
        work = _Work.open(config, source, out, what, backend)
        with collectives.raised_together():
            work.make_parts(range(backend.rank, work.num_parts, backend.world_size))
        with collectives.raised_together():
            embedded = work.count()
        with collectives.raised_together():
            if backend.is_main:
                work.join(embedded.rows)
        return embedded
    finally:
        backend.close()


class _Read(NamedTuple):
    """Samples that could be read, and why the others could not."""

    samples: Samples | None
    keys: list[str]
    left_out: list[str]


class _Work:
    """One source, one network, and the folder of parts."""

    def __init__(
        self,
        open_source: Callable[[], Source],
        source: Source,
        fields: Fields,
        example: Samples,
        network: "_Network",
        out: Path,
    ) -> None:
        self._source, self._fields, self._network, self._out = source, fields, network, out
        self._open_source, self._reader = open_source, threading.local()
        self._shape = shape_of(example)
        self._folder = out.with_name(f".{out.name}.parts")
        self.num_parts = -(-len(source) // PART)

    @classmethod
    def open(
        cls, config: RunConfig, source: str, out: Path, what: What, backend: Backend
    ) -> "_Work":
        """The same on all ranks; parts of other work are refused."""
        with collectives.raised_together():
            data, settings = config.data, sources_at(source)

            def open_all() -> list[Source]:
                return [open_source(one, data.cache, data.background) for one in settings]

            opened = open_all()
            joined = join_sources(opened)
            wanted = {"label": None} if what == "partner" else {"label": None, "pair": None}
            example = recorded_example(config.run_dir)
            if example is None:  # an export, or of an older version
                example = first_sample(config.fields, join_sources(data.open_train()), 1000)
            fields = config.fields.model_copy(update=wanted)
            fields.check(joined, len(joined) - 1)
            task = config.build_task(example).eval()
            load_weights(task, config.run_dir, config.evaluate.weights)
            network = _network(task.to(backend.device), what)
            first = first_sample(fields, joined, len(joined))
            work = cls(lambda: join_sources(open_all()), joined, fields, first, network, out)
            if backend.is_main:
                prints = [one.fingerprint for one in opened]
                about = f"{what}, {config.evaluate.weights} weights"
                work._begin(checkpoint.run_weights(config.run_dir), prints, about)
        return work

    def _begin(self, weights: dict[str, Tensor], fingerprints: list[str], what: str) -> None:
        """Make the folder of parts, or go on with one of the same work."""
        about = {
            "weights": [zlib.crc32(_bytes_of(x)) for x in weights.values()],
            "source": fingerprints,
            "samples": len(self._source),
            "part": PART,
            "what": what,
        }
        path = self._folder / "about.json"
        if path.exists() and json.loads(path.read_text()) != about:
            raise ConfigError(
                f"{self._folder} holds parts of other weights or another source; delete it, or "
                f"name another file than {self._out}"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, json.dumps(about))

    def make_parts(self, numbers: Iterable[int]) -> None:
        """The files of these parts that are not there; samples are read ahead of the network, those
        of the next part too."""
        missing = [number for number in numbers if not self._path(number).exists()]
        batches = (batch for number in missing for batch in self._batches(number))
        with closing(map_in_threads(self._read, batches, _READERS)) as read:
            for number in missing:
                self._make_part(number, itertools.islice(read, len(self._batches(number))))

    def _batches(self, part: int) -> list[range]:
        """Numbers of the samples of a part, some at a time."""
        stop = min((part + 1) * PART, len(self._source))
        return [range(n, min(n + BATCH, stop)) for n in range(part * PART, stop, BATCH)]

    def _make_part(self, number: int, read: Iterable["_Read"]) -> None:
        rows: list[Tensor] = []
        keys: list[str] = []
        left_out: list[str] = []
        for batch in read:
            if batch.samples is not None:
                rows.append(self._network(batch.samples).cpu())
            keys += batch.keys
            left_out += batch.left_out
        vectors = torch.cat(rows).float().numpy() if rows else np.zeros((0, 0), np.float32)
        with atomic.open_file(self._path(number)) as file:
            np.savez(file, rows=vectors, keys=np.array(json.dumps([keys, left_out])))

    def _read(self, numbers: range) -> "_Read":
        """Some samples, by a thread that has a source of its own: they need not be safe for
        several."""
        if not hasattr(self._reader, "source"):
            self._reader.source = self._open_source()
        rows: list[dict[str, Any]] = []
        left_out: list[str] = []
        for number in numbers:
            found = usable_row(self._fields, self._reader.source, number)
            if isinstance(found, str):
                left_out.append(found)
            elif found[1] != self._shape:
                key = found[0]["__key__"]
                left_out.append(
                    f"sample {key} has the shape {found[1]}, and the first {self._shape}"
                )
            else:
                rows.append(found[0])
        samples = self._fields.samples(collate(rows)) if rows else None
        return _Read(samples, [row["__key__"] for row in rows], left_out)

    def count(self) -> Embedded:
        """What all parts hold together."""
        num_rows, left_out = 0, list[str]()
        for _, keys, reasons in self._parts(with_rows=False):
            num_rows += len(keys)
            left_out += reasons
        if not num_rows:
            raise DataError(f"none of {len(self._source)} samples can be read: {left_out[0]}")
        return Embedded(self._out, num_rows, left_out)

    def join(self, num_rows: int) -> None:
        """Put all parts, which have so many rows, in one file, and delete them."""
        parts = ((rows, keys) for rows, keys, _ in self._parts() if keys)
        if self._out.suffix == ".npy":
            _write_npy(self._out, parts, num_rows)
        else:
            _write_parquet(self._out, parts)
        shutil.rmtree(self._folder)

    def _parts(self, with_rows: bool = True) -> Iterator[tuple[np.ndarray, list[str], list[str]]]:
        """Rows, keys, and why samples are left out, of one part after the other."""
        for path in map(self._path, range(self.num_parts)):
            try:
                with np.load(path) as part:
                    keys, left_out = json.loads(str(part["keys"]))
                    rows = part["rows"] if with_rows else np.empty(0)
            except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise DataError(
                    f"{path} is damaged ({error}); delete it and start again, which makes it anew"
                ) from error
            yield rows, keys, left_out

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:07d}.npz"


def _bytes_of(x: Tensor) -> bytes:
    return x.flatten().view(torch.uint8).numpy().tobytes()


_Network = Callable[[Samples], Tensor]


def _network(task: Task, what: What) -> _Network:
    if not isinstance(task, ImageTask):
        raise ConfigError("the run trains no encoder of images; embed needs one that does")
    if what == "representation":
        return lambda samples: task.represent(samples.images)
    if what == "partner":
        if not isinstance(task, Paired):
            raise ConfigError("what=partner is of the task paired; use representation or embedding")
        return lambda samples: task.embed_pair(samples.pair or ())
    return lambda samples: task.embed_representations(task.represent(samples.images))


_Parts = Iterator[tuple[np.ndarray, list[str]]]


def _write_npy(out: Path, parts: _Parts, num_rows: int) -> None:
    """The keys first: where there are vectors their keys are there too."""
    unfinished, vectors, begin = out.with_name(f".{out.name}.partial"), None, 0
    with atomic.open_file(out.with_suffix(".keys.jsonl")) as lines:
        for rows, keys in parts:
            if vectors is None:
                shape = num_rows, rows.shape[1]
                vectors = np.lib.format.open_memmap(unfinished, "w+", np.float32, shape)
            vectors[begin : begin + len(rows)] = rows
            begin += len(rows)
            lines.writelines(json.dumps(key).encode() + b"\n" for key in keys)
    assert vectors is not None
    vectors.flush()
    unfinished.replace(out)


def _write_parquet(out: Path, parts: _Parts) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    with atomic.open_file(out) as file:
        writer = None
        for rows, keys in parts:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
            table = pa.table({"key": keys, "vector": vectors})
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
