"""Synthetic images in the official layout of CIFAR-10, full size."""

from pathlib import Path

import numpy as np


def write_cifar10(folder: Path) -> Path:
    """Ten classes told apart by brightness in one of ten bands, with noise."""
    rng = np.random.default_rng(0)
    target = folder / "cifar-10-batches-bin"
    target.mkdir(parents=True)
    labels = np.arange(1000) % 10
    images = rng.integers(0, 100, (1000, 3, 32, 32), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 3 * label : 3 * label + 3] += 150
    records = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(1000, -1)], axis=1)
    content = records.tobytes() * 10
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        (target / name).write_bytes(content)
    return folder
