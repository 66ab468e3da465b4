"""What is compared, by its name in records, tables and figures."""

OURS, PUBLISHED = "absgd_jax", "absgd 0.0.1 (PyTorch)"
ROUNDED = "absgd_jax, first weights moved by one rounding"
EPOCH, SWEEP, STEPWISE = "absgd_jax, compiled epoch", "absgd_jax, compiled epoch of a sweep", "absgd_jax, step by step"
