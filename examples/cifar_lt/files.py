"""Files that are complete or absent, also when the disk is full or the machine stops."""

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Writes aside, then renames. The folder is made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
