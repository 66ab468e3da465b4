"""A network and a subset small enough for a CPU.

python -m examples.cifar_lt.main --preset mini --temperature 1.0

ResNet-8 of half the width, 4,958 images (2,000 to 20 a class), 20 epochs, the second stage being the last four.

Cost: about 1 minute on two CPU cores that do nothing else. Result: see README.md.
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
    validation=0.1,
)
