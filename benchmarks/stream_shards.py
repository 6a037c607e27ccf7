"""Shards for the tables of stream.py, and web servers for them."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dist_contrastive.data import pack_images
from dist_contrastive.data.shards.indexing import index_folder
from dist_contrastive.data.shards.tars import write_samples

QUALITY = 90  # of the JPEG files
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
SERVER = "nginx" if NGINX else "range_server.py"
START_S = 20.0  # by which a server must answer

_NGINX_CONFIG = """
daemon off; pid {home}/nginx.pid; error_log {home}/error.log; worker_processes 1;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; keepalive_requests 1000000;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fast;
  uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  server {{ listen 127.0.0.1:{port}; root {folder}; autoindex on; }}
}}
"""


def as_files(root: Path, side: int, count: int) -> Path:
    """The same crops packed, in a folder, in Parquet, saved by `datasets`, and in a .csv."""
    import datasets

    images = [sample["jpg"] for sample in crops(side, range(count))]
    (root / "files").mkdir(parents=True)
    for number, data in enumerate(images):
        (root / "files" / f"{number:07d}.jpg").write_bytes(data)
    features = datasets.Features(image=datasets.Image())
    rows = [{"bytes": data, "path": None} for data in images]
    data = datasets.Dataset.from_dict({"image": rows}, features)
    data.to_parquet(root / "rows.parquet", batch_size=256)
    data.save_to_disk(root / "saved")
    lines = [f"files/{number:07d}.jpg,a photograph" for number in range(count)]
    (root / "rows.csv").write_text("\n".join(["image,caption", *lines]))
    pack_images(root / "files", root / "packed", field="jpg")
    return root


def photographs(folder: Path, side: int, shards: int, per_shard: int) -> Path:
    """Pack crops of the two photographs that come with scikit-learn, each as jpg and cls.

    Args:
        side: pixels of a crop, in both directions.
    """
    every = iter(crops(side, range(shards * per_shard)))
    return _pack(folder, shards, lambda _: islice(every, per_shard))


def crops(side: int, numbers: range) -> Iterator[dict[str, Any]]:
    """Samples with a random crop each."""
    from sklearn.datasets import load_sample_images

    pictures = [np.asarray(picture) for picture in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in numbers:
        label = number % len(pictures)
        height, width, _ = pictures[label].shape
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        crop = pictures[label][top : top + side, left : left + side]
        yield {"__key__": f"{number:07d}", "jpg": _jpeg(crop), "cls": label}


def _jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=QUALITY)
    return stream.getvalue()


def random_bytes(folder: Path, length: int, shards: int, per_shard: int) -> Path:
    """Pack samples of one field of so many bytes."""
    rng = np.random.default_rng(0)

    def samples(shard: int) -> Iterator[dict[str, Any]]:
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            yield {"__key__": f"{number:07d}", "bin": rng.bytes(length)}

    return _pack(folder, shards, samples)


def _pack(folder: Path, shards: int, samples: Any) -> Path:
    folder.mkdir(parents=True)
    for shard in range(shards):
        write_samples(folder / f"{shard:05d}.tar", samples(shard))
    index_folder(folder)
    return folder


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of the folder on a server in a process of its own: SERVER."""
    home = folder / ".server"
    home.mkdir(exist_ok=True)
    argv = [sys.executable, str(Path(__file__).parent / "range_server.py"), str(folder)]
    port = _free_port()
    argv += ["--port", str(port)]
    if NGINX:
        (home / "nginx.conf").write_text(_NGINX_CONFIG.format(home=home, folder=folder, port=port))
        argv = [NGINX, "-p", str(home), "-e", f"{home}/error.log", "-c", f"{home}/nginx.conf"]
        if os.geteuid() == 0:  # its workers would change to a user that may not read the folder
            argv += ["-g", "user root;"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as server:
        try:
            _await_answer(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_answer(port: int) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def tars(location: str, shards: int) -> list[str]:
    """The shards of a folder or its URL, as `photographs` names them."""
    return [f"{location}/{shard:05d}.tar" for shard in range(shards)]
