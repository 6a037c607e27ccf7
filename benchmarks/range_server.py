"""A small HTTP server for shards on this machine: whole files and ranges, and, if asked, faults.

    python benchmarks/range_server.py FOLDER [--port 8000]

It stands in for a web server in benchmarks and tests. It keeps connections open, answers each in a
thread of its own, and sends from the page cache without copying.
"""

import argparse
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = str | None  # "reset", "truncate", "503", "404", "slow", "hang", "flip", "whole", ENDLESS
ENDLESS = ("endless", "trickle", "headers", "inflating")


class RangeServer(ThreadingHTTPServer):
    """Serves a folder on the loopback; a context manager that runs in a thread.

    Args:
        fault: called with the path and the number of the request to it, tells what goes wrong:
            "reset" closes the connection in the middle of the body, "truncate" ends the body early
            with a proper end of the connection, "503" and "404" answer so, "slow" waits three
            seconds first, "hang" until the server is closed, "flip" changes a byte, "whole" ignores
            the range, None serves. Of those that end only with the connection, "endless" sends
            zeros at once, "trickle" some bytes a second, "headers" as slow headers, "inflating"
            zeros that are compressed.
    """

    daemon_threads = True
    request_queue_size = 128  # with the default of 5, connections of a burst wait for seconds

    def __init__(
        self, folder: Path, port: int = 0, fault: Callable[[str, int], Fault] = lambda *_: None
    ) -> None:
        self.folder = Path(folder)
        self.fault = fault
        self.requests: dict[str, int] = {}
        self.bytes_sent = 0
        self.lock = threading.Lock()
        self.is_hanging = threading.Event()
        self._is_closed = threading.Event()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """Of the folder."""
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "RangeServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_closed.set()
        self.shutdown()
        self.server_close()

    def wait_for_close(self) -> None:
        """Block until the server is closed."""
        self._is_closed.wait()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go away."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        with self.server.lock:
            count = self.server.requests.get(self.path, 0)
            self.server.requests[self.path] = count + 1
        fault = self.server.fault(self.path, count)
        if fault == "slow":
            time.sleep(3)
        if fault == "hang":
            self.server.is_hanging.set()
            self.server.wait_for_close()
        if fault in ENDLESS and with_body:
            return self._send_for_ever(fault)
        file = self.server.folder / self.path.lstrip("/")
        if fault in ("503", "404"):
            return self._refuse(int(fault))
        if file.is_dir():
            return self._list(file, with_body)
        if not file.is_file():
            return self._refuse(404)
        start, stop, size = self._range(file.stat().st_size)
        if fault == "whole":
            start, stop = 0, size
        if start >= size:
            return self._refuse(416)
        self.send_response(200 if stop - start == size else 206)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        if stop - start != size:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if with_body:
            self._send(file, start, stop, fault)
        return None

    def _range(self, size: int) -> tuple[int, int, int]:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found is None:
            return 0, size, size
        last = int(found[2]) if found[2] else size - 1
        return int(found[1]), min(last + 1, size), size

    def _send(self, file: Path, start: int, stop: int, fault: Fault) -> None:
        self.wfile.flush()
        with file.open("rb") as source:
            if fault in ("reset", "truncate", "flip"):
                source.seek(start)
                data = bytearray(source.read(stop - start))
                if fault == "flip":
                    data[len(data) // 2] ^= 1
                    self.wfile.write(data)
                    return
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                if fault == "reset":
                    linger = struct.pack("ii", 1, 0)  # the close sends RST
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                return
            self.connection.sendfile(source, start, stop - start)
        with self.server.lock:
            self.server.bytes_sent += stop - start

    def _send_for_ever(self, fault: Fault) -> None:
        self.close_connection = True
        if fault != "headers":
            self.send_response(200)
            if fault == "inflating":
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
        packer = zlib.compressobj(wbits=31)
        while True:  # until the client closes the connection
            if fault in ("endless", "inflating"):
                zeros = bytes(1 << 20)
                self.wfile.write(zeros if fault == "endless" else packer.compress(zeros))
            else:
                self.wfile.write(b"X")
                time.sleep(0.05)
            self.wfile.flush()

    def _list(self, folder: Path, with_body: bool) -> None:
        names = sorted(path.name for path in folder.iterdir())
        body = "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    server = RangeServer(args.folder, args.port)
    print(f"{server.url} serves {args.folder}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
