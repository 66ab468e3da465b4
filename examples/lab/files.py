"""Files that are complete or absent, also when the disk is full, the machine stops or a download fails."""

import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pooch

from examples.lab.errors import UserError


@contextmanager
def aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is renamed to ``path`` when all is written. The folder is made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beside(path)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """A name in the same folder that no other process takes."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def write(path: Path, content: bytes) -> None:
    with aside(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Numbers that are not finite become strings that ``float`` reads: JSON has none."""
    write(path, f"{json.dumps(jsonable(content), indent=1, allow_nan=False)}\n".encode())


def jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def download(url: str, checksum: str, archive: Path, wanted: Path, unpack: Any = None) -> Any:
    """Downloads and checks a file; ``wanted`` is what a user without a connection puts there by hand."""
    try:
        return pooch.retrieve(url, checksum, fname=archive.name, path=archive.parent, processor=unpack)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{wanted} is missing, and {url} could not be downloaded ({reason}). Put it there by hand, or name the "
            f"folder that holds {wanted.name} with --data-dir."
        ) from None
