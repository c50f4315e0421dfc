"""Tokens as rows in another order, each way a gather, and each the other's transpose.

Dimension letters: `M` rows, `S` rows of a token.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

# Where there is no row, or no token: out of every range.
NOWHERE = jnp.iinfo(jnp.int32).max


@struct.dataclass
class Placement:
    """Which row stands for which of a token's choices.

    It is kept both ways, so that no gather needs a scatter as its transpose.

    Attributes:
      choices: [M], the choice t * S + s that row m stands for, or NOWHERE.
      places: [T, S], the row of each choice, or NOWHERE.
    """

    choices: Int[Array, "M"]
    places: Int[Array, "T S"]

    @property
    def tokens(self) -> Int[Array, "M"]:
        """The token of each row, or NOWHERE."""
        per_token = self.places.shape[1]
        return jnp.where(self.choices == NOWHERE, NOWHERE, self.choices // per_token)


def place(places: Int[Array, "T S"], num_rows: int) -> Placement:
    """The placement that puts every choice at its place; no two may share one."""
    choices = jnp.full((num_rows,), NOWHERE, jnp.int32)
    choices = choices.at[places.reshape(-1)].set(
        jnp.arange(places.size, dtype=jnp.int32), mode="drop", unique_indices=True
    )
    return Placement(choices=choices, places=places)


def take(x: Array, indices: Array) -> Array:
    """x[indices], and zeros for NOWHERE."""
    return x.at[indices].get(mode="fill", fill_value=0)


@jax.custom_vjp
def rows_of_tokens(x: Float[Array, "T D"], placement: Placement) -> Float[Array, "M D"]:
    """Every row's token, and zeros where a row stands for none."""
    return take(x, placement.tokens)


def _rows_backward(placement: Placement, d_rows: Array):
    return _sum_over_rows(d_rows, placement.places).astype(d_rows.dtype), None


rows_of_tokens.defvjp(lambda x, rows: (rows_of_tokens(x, rows), rows), _rows_backward)


@jax.custom_vjp
def tokens_of_rows(
    rows: Float[Array, "M D"], weights: Float[Array, "T S"], placement: Placement
) -> Float[Array, "T D"]:
    """The weighted sum of each token's rows, in float32."""
    return _sum_over_rows(rows, placement.places, weights)


def _sum_over_rows(
    rows: Float[Array, "M D"],
    places: Int[Array, "T S"],
    weights: Float[Array, "T S"] | None = None,
) -> Float[Array, "T D"]:
    """One row of each token at a time: all together they would be S times as large."""
    total = jnp.zeros((places.shape[0], rows.shape[1]), jnp.float32)
    for s in range(places.shape[1]):
        row = take(rows, places[:, s]).astype(jnp.float32)
        total += row if weights is None else row * weights[:, s, None]
    return total


def _tokens_forward(rows, weights, placement):
    return tokens_of_rows(rows, weights, placement), (rows, weights, placement)


def _tokens_backward(residuals, d_tokens):
    rows, weights, placement = residuals
    weight = take(weights.reshape(-1), placement.choices)
    # Gathered in the rows' dtype, to which callers round the sum, so that nothing is lost: float32
    # copies for every row were the largest arrays of a training step.
    d_own = take(d_tokens.astype(rows.dtype), placement.tokens).astype(jnp.float32)
    d_rows = (d_own * weight[:, None]).astype(rows.dtype)
    d_weights = [
        jnp.sum(take(rows, placement.places[:, s]).astype(jnp.float32) * d_tokens, axis=1)
        for s in range(weights.shape[1])
    ]
    return d_rows, jnp.stack(d_weights, axis=1), None


tokens_of_rows.defvjp(_tokens_forward, _tokens_backward)
