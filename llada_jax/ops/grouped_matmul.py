"""Matrix products of runs of rows with one matrix each: row i times the matrix of its group.

The interface is `lax.ragged_dot`'s, plus a `group_offset` so that the groups may be a slice of a
longer stack of matrices (all layers' experts) without that slice being copied first.

Dimension letters: `M` rows, `I` input width, `O` output width, `G` groups, `A` all matrices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("ragged_dot", "blocks")


def default_implementation(platform: str) -> str:
    """The fastest formulation measured for a backend ("cpu", "tpu", "gpu"); see BENCHMARKS.md."""
    return "blocks" if platform == "cpu" else "ragged_dot"


def row_alignment(implementation: str, num_rows: int, num_groups: int) -> int:
    """Rows that every group's size must be a multiple of.

    "blocks" multiplies blocks of this many rows. Small blocks waste little padding, large ones
    amortise reading the matrix; the choice aims at two blocks per group of average size.
    """
    if implementation == "ragged_dot":
        return 1
    average = max(num_rows // max(num_groups, 1), 1)
    return min(max(1 << (average // 2).bit_length(), 8), 64)


def grouped_matmul(
    x: Float[Array, "M I"],
    w: Float[Array, "A I O"],
    group_sizes: Int[Array, "G"],
    *,
    group_offset: Int[Array, ""] | int = 0,
    row_alignment: int,
    implementation: str,
) -> Float[Array, "M O"]:
    """Multiplies consecutive runs of rows by consecutive matrices.

    Args:
      x: rows, sorted by group; group g owns the next `group_sizes[g]` of them.
      w: one matrix per group.
      group_sizes: rows per group, each a multiple of `row_alignment`. Rows beyond their sum
        belong to no group and their results are unspecified.
      group_offset: index in `w` of the first group's matrix.
      row_alignment: see the function of that name; "blocks" needs it.
      implementation: "ragged_dot" (`lax.ragged_dot`: a grouped kernel on TPUs, a dense computation
        on CPUs) or "blocks" (a loop over blocks of rows, fast on CPUs, no reverse mode).
    """
    if implementation == "ragged_dot":
        num_groups = group_sizes.shape[0]
        if w.shape[0] != num_groups:
            w = jax.lax.dynamic_slice_in_dim(w, group_offset, num_groups)
        return jax.lax.ragged_dot(x, w, group_sizes).astype(x.dtype)
    if implementation == "blocks":
        return _blocks(x, w, group_sizes, group_offset, row_alignment)
    raise ValueError(f"implementation {implementation!r} is not one of {IMPLEMENTATIONS}")


def _blocks(
    x: Array, w: Array, group_sizes: Array, group_offset: Array | int, block_rows: int
) -> Array:
    ends = jnp.cumsum(group_sizes)
    starts = jnp.arange(0, x.shape[0], block_rows)
    groups = jnp.searchsorted(ends, starts, side="right").astype(jnp.int32) + group_offset

    def body(i: Array, out: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(x, i * block_rows, block_rows)
        matrix = jax.lax.dynamic_index_in_dim(w, groups[i], keepdims=False)
        product = jnp.dot(rows, matrix, preferred_element_type=jnp.float32).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, product, i * block_rows, 0)

    # The trip count is the number of blocks in use, not the worst case.
    return jax.lax.fori_loop(
        0, ends[-1] // block_rows, body, jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    )
