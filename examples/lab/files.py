"""Files that are complete or absent, also when the disk is full or the machine stops."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write(path: Path, content: bytes) -> None:
    """Writes aside, then renames. The folder is made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


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
