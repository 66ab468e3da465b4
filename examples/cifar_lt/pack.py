"""The images and labels of a run in one small file, to carry them to a machine that cannot download the archive.

The first line of a pack has the SHA-256 of all that follows, the second is JSON: the settings that chose the images,
and the splits. Then come the images of each split, compressed without loss, and its labels.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from examples.cifar_lt import files
from examples.cifar_lt.data import Split
from examples.cifar_lt.errors import UserError


def write(path: Path, splits: dict[str, Split], identity: dict[str, Any]) -> None:
    """Writes a pack, which is complete or absent.

    Args:
      path: The file. Its folder is made where missing.
      splits: Images, shape (N, H, W, 3), dtype uint8, and labels, shape (N,), dtype int32, by name.
      identity: The settings that the images depend on, as JSON knows them.

    Raises:
      ValueError: if a split has other shapes or types.
    """
    sizes, body = {}, []
    for name, (images, labels) in splits.items():
        found = (images.dtype, images.shape[3:], labels.dtype, labels.shape)
        if found != (np.uint8, (3,), np.int32, images.shape[:1]):
            raise ValueError(f"{name}: images {images.dtype}{images.shape}, labels {labels.dtype}{labels.shape}")
        body += [_compress(images), labels.astype("<i4").tobytes()]
        sizes[name] = {"shape": images.shape, "compressed": len(body[-2])}
    content = b"\n".join([json.dumps({"identity": identity, "splits": sizes}).encode(), b"".join(body)])
    files.write(path, _title(content) + b"\n" + content)


def read(path: Path, identity: dict[str, Any] | None = None) -> dict[str, Split]:
    """The splits of a pack.

    Args:
      path: The file.
      identity: The settings of the run; those of the pack have to be the same. None takes any.

    Returns:
      Images, shape (N, H, W, 3), dtype uint8, and labels, shape (N,), dtype int32, by name.

    Raises:
      UserError: if the file is missing or damaged, or was packed with other settings.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: it should be a file with the images and labels of a run.")
    title, _, content = path.read_bytes().partition(b"\n")
    # The checksum is compared before anything else is looked at, so that what follows need not expect damage.
    if title != _title(content):
        raise UserError(f"{path} is damaged, truncated or not a pack of images. Copy it again, or pack it again.")
    head, _, body = content.partition(b"\n")
    header = json.loads(head)
    if identity is not None:
        _compare(path, header["identity"], json.loads(json.dumps(identity)))
    splits, start = {}, 0
    for name, size in header["splits"].items():
        middle = start + size["compressed"]
        end = middle + 4 * size["shape"][0]
        labels = np.frombuffer(body[middle:end], "<i4").astype(np.int32)
        splits[name] = Split(_decompress(body[start:middle], size["shape"]), labels)
        start = end
    return splits


def _title(content: bytes) -> bytes:
    return b"cifar_lt pack 1 " + hashlib.sha256(content).hexdigest().encode()


def _compare(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    missing = "not set"
    changed = [k for k in sorted({*there, *here}) if there.get(k, missing) != here.get(k, missing)]
    if changed:
        differences = ", ".join(f"{k}: {there.get(k, missing)} there, {here.get(k, missing)} here" for k in changed)
        raise UserError(
            f"{path} was packed with other settings ({differences}). Change the settings, or pack it again."
        )


def _compress(images: np.ndarray) -> bytes:
    # Red and blue are close to green, and a pixel to left + above - above left: the differences (mod 256) are small.
    # They hardly repeat, so that zlib's default search for repetitions would cost much time and gain nothing.
    images = images.copy()
    images[..., ::2] -= images[..., 1:2]
    planes = images.transpose(3, 0, 1, 2)
    for axis in (2, 3):
        planes = np.diff(planes, axis=axis, prepend=np.uint8(0))
    compressor = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return compressor.compress(planes.tobytes()) + compressor.flush()


def _decompress(compressed: bytes, shape: list[int]) -> np.ndarray:
    planes = np.frombuffer(zlib.decompress(compressed), np.uint8).reshape(shape[3], *shape[:3])
    for axis in (2, 3):
        planes = np.cumsum(planes, axis=axis, dtype=np.uint8)
    images = np.ascontiguousarray(planes.transpose(1, 2, 3, 0))
    images[..., ::2] += images[..., 1:2]
    return images
