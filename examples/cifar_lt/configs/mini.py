"""A network and a subset small enough for a CPU.

python -m examples.cifar_lt.main --preset mini
"""

from examples.cifar_lt.config import Config

CONFIG = Config(
    preset="mini",
    depth=8,
    width=8,
    epochs=20,
    decay=0.1,
    n_max=2000,
    test_per_class=None,
    eval_every=5,
)
