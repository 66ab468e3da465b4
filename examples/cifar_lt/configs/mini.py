"""A network and a subset small enough for a CPU.

python -m examples.cifar_lt.main --preset mini --temperature 1.0

ResNet-8 of half the width, 4,958 images (2,000 to 20 a class), 20 epochs, the second stage being the last four.

Cost: about 1 minute on two CPU cores that do nothing else. Result: top-1 34.8 ± 0.5 % with λ = 1, 35.4 ± 0.3 % with
--kl-radius 1.0, 32.3 ± 1.0 % with --temperature inf (three seeds; see README.md).
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
