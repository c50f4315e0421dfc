"""A sum over parts whose number is data, with a reverse mode.

`lax.while_loop` has none, and a scan over the largest number of parts would do work that is hardly
ever needed. Here the parts are computed again in the backward pass, one at a time.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Part = Callable[..., Array]


def sum_of_parts(part: Part, count: Int[Array, ""], *inputs: Array) -> Array:
    """part(0, *inputs) + ... + part(count - 1, *inputs), `count` being at least 1.

    The first part is computed in line and is differentiated as any other code, since it is most
    often the only one. The others keep nothing for the backward pass.

    Args:
      part: takes its number, as an int32 scalar, and the inputs, and closes over no array.
      count: how many parts there are; alike on all devices where parts hold collectives.
      *inputs: arrays. Gradients flow to those of floating point, and are summed in float32.
    """
    later: Array = _later_parts(part, count, *inputs)
    return part(jnp.int32(0), *inputs) + later


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _later_parts(part: Part, count: Array, *inputs: Array) -> Array:
    shape = jax.eval_shape(part, jax.ShapeDtypeStruct((), jnp.int32), *inputs)
    zeros = jnp.zeros(shape.shape, shape.dtype)
    return jax.lax.fori_loop(1, count, lambda k, total: total + part(k, *inputs), zeros)


def _forward(part: Part, count: Array, *inputs: Array):
    return _later_parts(part, count, *inputs), (count, inputs)


def _backward(part: Part, residuals, d_out):
    count, inputs = residuals
    is_float = [jnp.issubdtype(a.dtype, jnp.floating) for a in inputs]
    floats = tuple(a for a, wanted in zip(inputs, is_float, strict=True) if wanted)

    def of_floats(k: Array, *floats: Array) -> Array:
        given = iter(floats)
        return part(k, *(next(given) if f else a for a, f in zip(inputs, is_float, strict=True)))

    def body(k: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        _, pull = jax.vjp(functools.partial(of_floats, k), *floats)
        return tuple(t + g.astype(t.dtype) for t, g in zip(totals, pull(d_out), strict=True))

    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in floats)
    totals = iter(jax.lax.fori_loop(1, count, body, zeros))
    gradients = (
        next(totals).astype(a.dtype) if f else None for a, f in zip(inputs, is_float, strict=True)
    )
    return None, *gradients


_later_parts.defvjp(_forward, _backward)
