"""Vectors of a data set by a trained run, in a file with its keys.

Samples are embedded in parts of a fixed size, each of which is a file that is there whole or not at
all: rows, keys and numbers of its samples. So a part is the same whichever rank makes it, what was
done before an interruption is not done again, and a row never stands beside another one's key.
"""

import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
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
from dist_contrastive.data.source import Source
from dist_contrastive.data.sources import join_sources, open_source, sources_at
from dist_contrastive.data.training import first_sample
from dist_contrastive.errors import ConfigError, DataError, UnreachableError
from dist_contrastive.evaluation.splits import BATCH, batched, shape_of
from dist_contrastive.runs import load_weights
from dist_contrastive.tasks import ImageTask, Paired, Task

What = Literal["representation", "embedding", "partner"]
"""representation: of the encoder; embedding: after its head, what the loss compares; partner: that
of the second modality."""
FORMATS = (".npy", ".parquet")
PART = 4096  # samples of a file in the meantime


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
            for number in range(backend.rank, work.num_parts, backend.world_size):
                work.make_part(number)
        with collectives.raised_together():
            embedded = work.count()
        with collectives.raised_together():
            if backend.is_main:
                work.join(embedded.rows)
        return embedded
    finally:
        backend.close()


class _Work:
    """One source, one network, and the folder of parts."""

    def __init__(
        self, source: Source, fields: Fields, example: Samples, network: "_Network", out: Path
    ) -> None:
        self._source, self._fields, self._network, self._out = source, fields, network, out
        self._shape = shape_of(example)
        self._folder = out.with_name(f".{out.name}.parts")
        self.num_parts = -(-len(source) // PART)

    @classmethod
    def open(
        cls, config: RunConfig, source: str, out: Path, what: What, backend: Backend
    ) -> "_Work":
        """The same on all ranks; parts of other work are refused."""
        with collectives.raised_together():
            opened = [
                open_source(one, config.data.cache, config.data.background)
                for one in sources_at(source)
            ]
            joined = join_sources(opened)
            wanted = {"label": None} if what == "partner" else {"label": None, "pair": None}
            example = first_sample(config.fields, join_sources(config.data.open_train()), 1000)
            fields = config.fields.model_copy(update=wanted)
            fields.check(joined, len(joined) - 1)
            task = config.build_task(example).eval()
            load_weights(task, config.run_dir)
            network = _network(task.to(backend.device), what)
            work = cls(joined, fields, first_sample(fields, joined, len(joined)), network, out)
            if backend.is_main:
                prints = [one.fingerprint for one in opened]
                work._begin(checkpoint.run_weights(config.run_dir), prints, what)
        return work

    def _begin(self, weights: dict[str, Tensor], fingerprints: list[str], what: What) -> None:
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

    def make_part(self, number: int) -> None:
        """The file of a part, unless it is there."""
        path = self._path(number)
        if path.exists():
            return
        rows: list[Tensor] = []
        keys: list[str] = []
        left_out: list[str] = []
        numbers = range(number * PART, min((number + 1) * PART, len(self._source)))
        # One thread reads ahead of the network: sources need not be safe for several.
        with closing(map_in_threads(self._read, numbers, 1)) as samples:
            for batch in batched(_readable(samples, left_out), BATCH):
                rows.append(self._network(self._fields.samples(collate(batch))).cpu())
                keys += [row["__key__"] for row in batch]
        vectors = torch.cat(rows).float().numpy() if rows else np.zeros((0, 0), np.float32)
        with atomic.open_file(path) as file:
            np.savez(file, rows=vectors, keys=np.array(json.dumps([keys, left_out])))

    def _read(self, number: int) -> dict[str, Any] | str:
        """A sample, or why it cannot be read."""
        try:
            row = self._fields.row(self._source, number)
            shape = shape_of(self._fields.samples(collate([row])))
        except UnreachableError:
            raise
        except DataError as error:
            return str(error)
        if shape != self._shape:
            return f"sample {row['__key__']} has the shape {shape}, and the first {self._shape}"
        return row

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


def _readable(
    samples: Iterator[dict[str, Any] | str], left_out: list[str]
) -> Iterator[dict[str, Any]]:
    """Samples that could be read; why the others could not goes to `left_out`."""
    for sample in samples:
        if isinstance(sample, str):
            left_out.append(sample)
        else:
            yield sample


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
