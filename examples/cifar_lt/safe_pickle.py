"""Loads pickles of NumPy arrays and plain containers, and nothing else: a pickle can otherwise run any code."""

import pickle
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which an archive of images does not need"
            ) from None


def load(file: BinaryIO) -> Any:
    """What a pickle holds; byte strings of Python 2 are read as Latin-1, as NumPy arrays need it.

    Raises:
      pickle.UnpicklingError: if it asks for anything but NumPy arrays and plain containers, or is damaged.
    """
    try:
        return _Unpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from None
