"""Shows that everything works.

python -m examples.cifar_lt.main --preset smoke

Cost: seconds on two CPU cores. Result: nothing to learn from, about chance.
"""

from examples.cifar_lt.config import Config

CONFIG = Config(
    preset="smoke",
    depth=8,
    width=4,
    epochs=5,
    decay=0.1,
    n_max=100,
    test_per_class=20,
    eval_every=1,
    batch_size=32,
)
