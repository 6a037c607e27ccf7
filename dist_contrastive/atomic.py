"""Small files written whole: a crash leaves the old one or the new one."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file, or make it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
