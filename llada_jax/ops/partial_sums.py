"""A sum over parts whose number is data, with a reverse mode.

`lax.while_loop` has none, and a scan over the largest number of parts would do work that is hardly
ever needed. Here the parts are computed again in the backward pass, one at a time.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Part = Callable[..., tuple[Array, Array]]


def sum_of_parts(part: Part, count: Int[Array, ""], *inputs: Array) -> tuple[Array, Array]:
    """part(0, *inputs) + ... + part(count - 1, *inputs), `count` being at least 1.

    The first part is computed in line and is differentiated as any other code, since it is most
    often the only one. The others keep nothing for the backward pass.

    Args:
      part: takes its number, as an int32 scalar, and the inputs, and closes over no array. Gives an
        array, and integers that are summed along with it.
      count: how many parts there are; alike on all devices where parts hold collectives.
      *inputs: arrays. Gradients flow to those of floating point, and are summed in float32.
    """
    first = part(jnp.int32(0), *inputs)
    return jax.tree.map(jnp.add, first, _later_parts(part, count, *inputs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _later_parts(part: Part, count: Array, *inputs: Array) -> tuple[Array, Array]:
    shapes = jax.eval_shape(part, jax.ShapeDtypeStruct((), jnp.int32), *inputs)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(k: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.tree.map(jnp.add, totals, part(k, *inputs))

    return jax.lax.fori_loop(1, count, body, zeros)


def _forward(part: Part, count: Array, *inputs: Array):
    return _later_parts(part, count, *inputs), (count, inputs)


def _backward(part: Part, residuals, cotangents):
    count, inputs = residuals
    d_out, _ = cotangents
    is_float = [jnp.issubdtype(a.dtype, jnp.floating) for a in inputs]
    floats = tuple(a for a, wanted in zip(inputs, is_float, strict=True) if wanted)

    def of_floats(k: Array, *floats: Array) -> tuple[Array, Array]:
        given = iter(floats)
        return part(k, *(next(given) if f else a for a, f in zip(inputs, is_float, strict=True)))

    def body(k: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        _, pull, _ = jax.vjp(functools.partial(of_floats, k), *floats, has_aux=True)
        return tuple(t + g.astype(t.dtype) for t, g in zip(totals, pull(d_out), strict=True))

    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in floats)
    totals = iter(jax.lax.fori_loop(1, count, body, zeros))
    gradients = (
        next(totals).astype(a.dtype) if f else None for a, f in zip(inputs, is_float, strict=True)
    )
    return None, *gradients


_later_parts.defvjp(_forward, _backward)
