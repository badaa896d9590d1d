"""SmoothQuant's scales for matrices; `folding` applies them.

Xiao et al. 2022 (arXiv:2211.10438): outlier features of the inputs are divided out and multiplied
into the weights, so that both fit 8 bits.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jinfer.config.fields import require
from jinfer.linear.qtensor import check_finite

LEAST = 1e-5


def smooth_scales(act_max: Array, w: Array, *, alpha: float = 0.5) -> Array:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha): inputs are divided by s, weights multiplied.

    Args:
      act_max: f32 [I], largest |x| over tokens.
      w: [I, O], **all** weights that share the input, side by side along O (one s for q, k and v).
      alpha: share of the difficulty that goes to the weights. The paper: 0.5; 0.8 to 0.9 for
        models with stronger outliers (Llama 2, Mistral).

    Returns:
      s f32 [I], at least 1e-5; 1 for inputs that never fired.

    Raises:
      ValueError: alpha is outside 0..1, shapes disagree or something is not finite.
    """
    require(0.0 <= alpha <= 1.0, f"alpha must lie in 0..1, got {alpha}")
    require(
        act_max.shape == w.shape[:1],
        f"act_max must be [{w.shape[0]}] for a weight {list(w.shape)}, got {list(act_max.shape)}",
    )
    check_finite(act_max, "act_max")
    check_finite(w, "weight")
    weight_max = jnp.maximum(jnp.max(jnp.abs(w.astype(jnp.float32)), axis=1), LEAST)
    s = jnp.maximum(act_max, LEAST) ** alpha / weight_max ** (1 - alpha)
    return jnp.where(act_max == 0, 1.0, jnp.maximum(s, LEAST))
