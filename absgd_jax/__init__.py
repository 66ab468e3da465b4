"""absgd_jax: robust training on imbalanced and noisy data, as an Optax gradient transformation."""

from importlib.metadata import version as _version

from absgd_jax import losses as losses
from absgd_jax._alias import abadam as abadam, absgd as absgd
from absgd_jax._groups import within_groups as within_groups
from absgd_jax._merge import merge_risks as merge_risks
from absgd_jax._risk import entropic_risk as entropic_risk
from absgd_jax._rules import (
    Rule as Rule,
    adaptive_gamma as adaptive_gamma,
    focus_fraction as focus_fraction,
    kl_radius as kl_radius,
    trust_fraction as trust_fraction,
)
from absgd_jax._state import ScaleByAbsgdState as ScaleByAbsgdState
from absgd_jax._transform import scale_by_absgd as scale_by_absgd
from absgd_jax._value_and_grad import value_and_grad as value_and_grad
from absgd_jax._weighting import weight_by_absgd as weight_by_absgd
from absgd_jax._weights import attention_weights as attention_weights, effective_sample_size as effective_sample_size

__version__ = _version("absgd_jax")
