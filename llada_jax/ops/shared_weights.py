"""Parameters that ranks share along `embed`: whole where they are used, gradients scattered.

A parameter is gathered for its product, forward and again backward, and is not kept in between. The
ranks' gradients are summed and scattered at once. Written as a sum, the same is compiled for TPUs
to an all-reduce of the whole gradient, of which each rank then takes its part: twice the bytes.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llada_jax import sharding


def product(
    x: Float[Array, "B T ..."],
    kernel: Float[Array, "..."],
    axes: Sequence[str | None],
    *,
    num_in: int = 1,
    rules: sharding.AxisRules,
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "B T ..."]:
    """Contracts the last `num_in` dimensions of x with the first of the kernel.

    Args:
      x: activations, whole along `embed`.
      kernel: the input's contracted dimensions, then the output's.
      axes: logical axes of the kernel.
      num_in: contracted dimensions.
      rules: how the arrays are split over the mesh.
      precision: of the products.
    """
    how = (tuple(axes), num_in, rules, precision)
    if not _is_scattered(rules):
        return _contract(x, whole(kernel, axes, rules), *how)
    return _product(x, kernel, how)


def rows(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], *, rules: sharding.AxisRules
) -> Float[Array, "B T D"]:
    """Rows of a table whose axes are `vocab` and `embed`."""
    if not _is_scattered(rules):
        return _take_rows(table, tokens, rules)
    return _rows(table, tokens, rules)


def whole(
    kernel: Float[Array, "..."], axes: Sequence[str | None], rules: sharding.AxisRules
) -> Float[Array, "..."]:
    """The kernel gathered along `embed`; the identity where nothing is shared."""
    return jax.reshard(kernel, rules.spec(*(None if a == "embed" else a for a in axes)))


def scattered_sum(
    gradient: Float[Array, "..."], axes: Sequence[str | None], rules: sharding.AxisRules
) -> Float[Array, "..."]:
    """The sum over all ranks with tokens of their own, laid out as `gradient_spec` says.

    Within `jax.shard_map`. One mesh axis after the other: a single scatter over several axes is
    compiled to an all-reduce for v5p.

    Args:
      gradient: of a kernel that is whole along `embed`, from this rank's tokens.
      axes: logical axes of the kernel.
      rules: how the arrays are split over the mesh.
    """
    summed = rules.token_axes
    if _is_scattered(rules):
        for name in sharding.axis_names(rules.embed):
            gradient = jax.lax.psum_scatter(
                gradient, name, scatter_dimension=list(axes).index("embed"), tiled=True
            )
        summed = tuple(name for name in summed if name not in sharding.axis_names(rules.embed))
    return jax.lax.psum(gradient, summed) if summed else gradient


def gradient_spec(axes: Sequence[str | None], rules: sharding.AxisRules) -> jax.P:
    """The kernel's own partition, but whole along `embed` where ranks that share it are alike."""
    names = axes if _is_scattered(rules) else (None if a == "embed" else a for a in axes)
    return rules.spec(*names)


def _is_scattered(rules: sharding.AxisRules) -> bool:
    """Whether ranks share parameters, and all that do have tokens of their own."""
    embed = sharding.axis_names(rules.embed)
    return sharding.axis_size(rules.embed) > 1 and set(embed) <= set(rules.token_axes)


def _specs(axes, num_in, rules):
    """Partitions of the input and of the output."""
    names = [None if a == "embed" else a for a in axes]
    return tuple(rules.spec("batch", "length", *part) for part in (names[:num_in], names[num_in:]))


def _contract(x, kernel, axes, num_in, rules, precision):
    contracted = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))
    return jax.lax.dot_general(
        x,
        kernel,
        (contracted, ((), ())),
        precision=precision,
        out_sharding=_specs(axes, num_in, rules)[1],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, kernel, how):
    return _contract(x, whole(kernel, how[0], how[2]), *how)


def _product_forward(x, kernel, how):
    return _product(x, kernel, how), (x, kernel)


def _product_backward(how, residuals, d_out):
    axes, num_in, rules, precision = how
    x, kernel = residuals
    in_spec, out_spec = _specs(axes, num_in, rules)
    num_out = kernel.ndim - num_in
    d_x = jax.lax.dot_general(
        d_out,
        whole(kernel, axes, rules),
        ((tuple(range(2, 2 + num_out)), tuple(range(num_in, kernel.ndim))), ((), ())),
        precision=precision,
        out_sharding=in_spec,
    )

    @functools.partial(
        jax.shard_map,
        in_specs=(in_spec, out_spec),
        out_specs=rules.spec(*axes),
        check_vma=False,
    )
    def local(x, d_out):
        over_rows = (((0, 1), (0, 1)), ((), ()))
        d_kernel = jax.lax.dot_general(x, d_out, over_rows, precision=precision)
        return scattered_sum(d_kernel, axes, rules)

    return d_x.astype(x.dtype), local(x, d_out).astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


def _take_rows(table, tokens, rules):
    table = whole(table, ("vocab", "embed"), rules)
    return table.at[tokens].get(out_sharding=rules.spec("batch", "length", None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(table, tokens, rules):
    return _take_rows(table, tokens, rules)


def _rows_forward(table, tokens, rules):
    return _rows(table, tokens, rules), (tokens, table)


def _rows_backward(rules, residuals, d_rows):
    tokens, table = residuals
    num_ranks = sharding.axis_size(rules.vocab)

    @functools.partial(
        jax.shard_map,
        in_specs=(rules.spec("batch", "length"), rules.spec("batch", "length", None)),
        out_specs=rules.spec("vocab", "embed"),
        check_vma=False,
    )
    def local(tokens, d_rows):
        num_rows = table.shape[0] // num_ranks
        places = tokens - sharding.axis_index(rules.vocab) * num_rows
        # Other ranks' rows are past the end: a negative index would count from there.
        places = jnp.where((places >= 0) & (places < num_rows), places, num_rows)
        d_table = jnp.zeros((num_rows, table.shape[1]), d_rows.dtype)
        return scattered_sum(d_table.at[places].add(d_rows, mode="drop"), ("vocab", "embed"), rules)

    return local(tokens, d_rows).astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
