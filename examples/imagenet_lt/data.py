"""Photographs by official lists, packed into one file; and a small stand-in, scenes of 15 classes."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from examples.lab import files
from examples.lab.errors import UserError

LISTS = "https://github.com/facebookresearch/classifier-balancing"


class Official(NamedTuple):
    """A dataset that is given by lists, one image and its class a line."""

    classes: int
    folder: str  # of the images
    lists: dict[str, str]
    images: str  # where to get them


OFFICIAL = {
    "imagenet-lt": Official(
        1000,
        "ImageNet",
        {split: f"ImageNet_LT_{split}.txt" for split in ("train", "val", "test")},
        "https://image-net.org",
    ),
    "places-lt": Official(
        365,
        "Places365",
        {split: f"Places_LT_{split}.txt" for split in ("train", "val", "test")},
        "http://places2.csail.mit.edu",
    ),
    # Its official test set is its validation set.
    "inaturalist18": Official(
        8142,
        "iNaturalist18",
        {"train": "iNaturalist18_train.txt", "test": "iNaturalist18_val.txt"},
        "https://github.com/visipedia/inat_comp/tree/master/2018",
    ),
}


def read_list(path: Path, classes: int) -> tuple[list[str], np.ndarray]:
    """The names and classes of a list."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Get the lists from {LISTS}.") from None
    names, labels = [], []
    for number, line in enumerate(lines, 1):
        name, _, label = line.rpartition(" ")
        if not name or not label.isdecimal() or int(label) >= classes:
            raise UserError(f"{path}, line {number}: {line!r} is not a path and a class below {classes}.")
        names.append(name)
        labels.append(int(label))
    return names, np.array(labels, np.int32)


def decoded(content: bytes, side: int, crop: int) -> np.ndarray:
    """The middle of an image whose shorter side is resized to ``side``: uint8 (crop, crop, 3)."""
    with Image.open(io.BytesIO(content)) as image:
        image.draft("RGB", (side, side))  # a JPEG of twice the size is decoded at a fraction of the work
        scale = side / min(image.size)
        shape = [max(side, round(length * scale)) for length in image.size]
        resized = image.convert("RGB").resize(shape, Image.Resampling.BILINEAR)
        left, top = ((length - crop) // 2 for length in shape)
        return np.asarray(resized.crop((left, top, left + crop, top + crop)))


def pack(names: Iterable[str], labels: np.ndarray, root: Path, path: Path, *, skip_broken: bool) -> None:
    """Writes the images of a list as they are into an ArrayRecord file, and their labels beside it.

    Args:
      names: files below ``root``.
      labels: their classes, shape (N,).
      root: the folder of the images.
      path: the file to write, complete or not at all; labels go to the same name with the suffix ``.npy``.
      skip_broken: leave out what is missing or is no image, instead of an error.

    Raises:
      UserError: for the first image that is missing or cannot be decoded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, kept, writer = files.beside(path), [], None
    try:
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")
        for name, label in zip(names, labels, strict=True):
            try:
                content = (root / name).read_bytes()
                with Image.open(io.BytesIO(content)) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for some broken files
                if skip_broken:
                    continue
                hint = "Leave such images out with --skip-broken, or get them again"
                raise UserError(f"{root / name} is missing or no image ({error}). {hint}.") from None
            writer.write(content)
            kept.append(label)
        if not kept:
            raise UserError(f"{root} has no image of the list: where are they?")
        writer.close()
        with files.aside(path.with_suffix(".npy")) as file:
            np.save(file, np.array(kept, np.int32))
        unfinished.replace(path)
    finally:
        if writer is not None and writer.is_open():
            writer.close()
        unfinished.unlink(missing_ok=True)


class Packed:
    """Images of an ArrayRecord file as an array, decoded when they are asked for: uint8 (N, crop, crop, 3)."""

    def __init__(self, path: Path, side: int, crop: int):
        import grain  # not by those who do not stream: it warns about older versions of JAX

        self.source: Any = grain.sources.ArrayRecordDataSource(str(path))
        self.side, self.crop = side, crop
        self.identity = f"{path.name} {path.stat().st_size} {side} {crop}".encode()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, places: Any) -> np.ndarray:
        wanted = np.arange(len(self))[places].tolist()
        return np.stack([decoded(content, self.side, self.crop) for content in self.source.__getitems__(wanted)])


class Rows:
    """Some rows of images, or of their features, which are read when they are asked for."""

    def __init__(self, images: Any, rows: np.ndarray):
        self.images, self.rows = images, rows

    def __getitem__(self, places: Any) -> np.ndarray:
        return self.images[self.rows[places]]


def packed(name: str, split: str, data_dir: Path, *, skip_broken: bool) -> tuple[Path, np.ndarray]:
    """The file of a split of an official dataset, which is made when it is asked for first, and the labels."""
    known = OFFICIAL[name]
    path = data_dir / "cache" / f"{name}-{split}.array_record"
    names, labels = read_list(data_dir / known.lists[split], known.classes)
    if not path.is_file():
        root = data_dir / known.folder
        if not root.is_dir():
            raise UserError(f"{root} is not there. Get the images of {name} from {known.images} and put them there.")
        pack(names, labels, root, path, skip_broken=skip_broken)
    kept = np.load(path.with_suffix(".npy"))
    if left_out := len(labels) - len(kept):
        missing = f"{left_out:,} of {len(labels):,} images, which were missing or broken"
        if not skip_broken:
            hint = "Go on without them with --skip-broken, or delete the file and get them again"
            raise UserError(f"{path} lacks {missing}. {hint}.")
        print(f"{name}, {split}: without {missing}.")
    return path, kept


def scenes(data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stand-in: ``scene15/{train,test}/<class>/*.jpg``, grey images of one size.

    Returns:
      Images (N, H, W) uint8, classes (N,) int32 with the class of most images first, and which are of the official test
      set (N,).
    """
    root = data_dir / "scene15"
    paths = sorted(root.glob("*/*/*.jpg"))
    names, counts = np.unique([path.parent.name for path in paths], return_counts=True)
    if not paths or {path.parts[-3] for path in paths} != {"train", "test"}:
        raise UserError(f"{root} has no images: it should hold train/<class>/*.jpg and test/<class>/*.jpg.")
    order = names[np.argsort(-counts, kind="stable")].tolist()
    try:
        images = []
        for path in paths:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("L")))
    except OSError as error:
        raise UserError(f"{path} is no image ({error}).") from None
    if len({image.shape for image in images}) > 1:
        raise UserError(f"{root} holds images of several sizes; 128 × 128 pixels are expected.")
    labels = np.array([order.index(path.parent.name) for path in paths], np.int32)
    return np.stack(images), labels, np.array([path.parts[-3] == "test" for path in paths])
