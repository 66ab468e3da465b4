"""The schedule of the ABSGD paper (arXiv 2012.06951, section 5), which is that of LDAM.

python -m examples.cifar_lt.main --preset paper --temperature 1.0

ResNet-32, 200 epochs of batches of 128, momentum 0.9, weight decay 2e-4; the learning rate rises over 5 epochs to 0.1
and is divided by 100 at epochs 160 and 180; λ = ∞ before epoch 160.

Cost: made for one GPU. Result: not run. (Reference, one seed of the published PyTorch package, last epoch: SGD 69.64 %,
ABSGD with λ = 1 69.71 %.)
"""

from examples.cifar_lt.config import Config

CONFIG = Config(
    preset="paper",
    depth=32,
    width=16,
    epochs=200,
    decay=0.01,
    n_max=None,
    test_per_class=None,
    eval_every=1,
)
