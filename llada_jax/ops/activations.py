"""The gated activation of every MLP and expert."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def swiglu(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """silu(gate) * up (arXiv:2002.05202, equation 6).

    The sigmoid and its product with `gate` are float32, rounded once, as in the reference. Rounding
    the sigmoid by itself loses enough in bfloat16 to send tokens to other experts.
    """
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
