"""Loads pickles of arrays and plain containers, and nothing else: a pickle can otherwise run any code."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from numpy._core.multiarray import _reconstruct


def _dtype(name: str, *_: Any) -> np.dtype:
    # The flags that Python 2 wrote (align=0, copy=1) are not the booleans that NumPy now wants.
    return np.dtype(name)


def _encode(text: str, _: str) -> bytes:
    # Protocol 2 has no byte strings: they are text and how to encode it, always Latin-1.
    return text.encode("latin1")


_ADMITTED = {
    ("_codecs", "encode"): _encode,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
}


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset < 0 or min(stride, default=0) < 0 or (0 not in size and last >= storage.size):
        raise pickle.UnpicklingError(f"a tensor of shape {size} lies outside its storage of {storage.size} numbers")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


_TENSORS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch", "FloatStorage"): np.float32,
    ("torch", "HalfStorage"): np.float16,
    ("torch", "DoubleStorage"): np.float64,
    ("torch", "LongStorage"): np.int64,
}


class _Unpickler(pickle.Unpickler):
    storage: Callable[[str], bytes] | None = None

    def find_class(self, module: str, name: str) -> Any:
        admitted = _ADMITTED if self.storage is None else _ADMITTED | _TENSORS
        try:
            return admitted[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which arrays do not need") from None

    def persistent_load(self, pid: Any) -> np.ndarray:
        if self.storage is None:
            raise pickle.UnpicklingError("it refers to other files")
        _, dtype, key, *_ = pid
        return np.frombuffer(self.storage(key), dtype)


def load(file: BinaryIO, storage: Callable[[str], bytes] | None = None) -> Any:
    """What a pickle holds; byte strings of Python 2 are read as Latin-1, as NumPy arrays need it.

    Args:
      file: the pickle.
      storage: the bytes of a storage by its key, where tensors of PyTorch are expected; they are read as NumPy arrays.

    Raises:
      pickle.UnpicklingError: if it asks for anything but arrays and plain containers, or is damaged.
    """
    unpickler = _Unpickler(file, encoding="latin1")
    unpickler.storage = storage
    try:
        return unpickler.load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None
