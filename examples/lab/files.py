"""Files that are complete or absent, also when the disk is full or the machine stops."""

import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


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
