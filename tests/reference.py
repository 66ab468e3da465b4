"""Independent truth: the papers' formulas written down literally, in NumPy's long doubles or in 60 digits."""

import mpmath
import numpy as np


def algorithm1(
    losses,
    gradients,
    params,
    *,
    temperature,
    gamma,
    learning_rate,
    momentum=0.0,
    weight_decay=0.0,
    bias_correction=False,
):
    """Algorithm 1 of arXiv 2012.06951 on given losses (T, B) and per-example gradients (T, B, D).

    Returns the parameters after T steps, the weights p̃ (T, B) and λ log s (T,), all long doubles. λ is finite; the
    exponentials are relative to the largest loss of the whole run, which cancels in p̃, so that none overflows.
    """
    real = np.longdouble
    losses, gradients, w = losses.astype(real), gradients.astype(real), params.astype(real)
    lam, gamma, v, s = real(temperature), real(gamma), np.zeros_like(w), real(0)
    shift = np.max(losses / lam)
    weights, log_s = [], []
    for t, (batch, grads) in enumerate(zip(losses, gradients, strict=True), start=1):
        exponentials = np.exp(batch / lam - shift)
        s = (1 - gamma) * s + gamma * np.mean(exponentials)
        p = exponentials / (s / (1 - (1 - gamma) ** t) if bias_correction else s)
        v = momentum * v + np.mean(p[:, None] * grads, axis=0) + weight_decay * w
        w = w - learning_rate * v
        weights.append(p)
        log_s.append(lam * (np.log(s) + shift))
    return w, np.array(weights), np.array(log_s)


def bounded_algorithm1(losses, *, temperature, gamma, max_weight, bias_correction=False):
    """Algorithm 1 with weights min(exp((L - R_t)/λ), c) relative to the risk R_t before the batch.

    The first of the batches (T, B) is taken as by SGD; its mean loss is the first R. Returns p̃ (T, B) and R after each.
    """
    real = np.longdouble
    losses, lam, gamma, c = losses.astype(real), real(temperature), real(gamma), real(max_weight)
    risk, mass = np.mean(losses[0]), real(0)
    weights, risks = [np.ones_like(losses[0])], [risk]
    for batch in losses[1:]:
        w = np.minimum(np.exp((batch - risk) / lam), c)  # relative to exp(R_t/λ), as is s below
        s = (1 - gamma) * mass + gamma * np.mean(w)
        mass = (1 - gamma) * mass + gamma
        weights.append(w / (s / mass if bias_correction else s))
        risk = risk + lam * np.log(s / mass)
        risks.append(risk)
    return np.array(weights), np.array(risks)


def entropic_risk(losses, temperature, weights=None, digits=60):
    """λ log Σ w exp(L/λ), its gradient p̂ and KL(p̂ ‖ w), in ``digits`` decimal digits."""
    with mpmath.workdps(digits):
        losses = [mpmath.mpf(float(x)) for x in losses]
        weights = [mpmath.mpf(1)] * len(losses) if weights is None else [mpmath.mpf(float(x)) for x in weights]
        total = mpmath.fsum(weights)
        weights, lam = [w / total for w in weights], mpmath.mpf(float(temperature))
        if mpmath.isinf(lam):
            return mpmath.fdot(weights, losses), weights, mpmath.mpf(0)
        tilted = [w * mpmath.exp(x / lam) for w, x in zip(weights, losses, strict=True)]
        z = mpmath.fsum(tilted)
        shares = [t / z for t in tilted]
        risk = lam * mpmath.log(z)
        return risk, shares, (mpmath.fdot(shares, losses) - risk) / lam
