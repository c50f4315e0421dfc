"""Sends tokens to their experts and sums what comes back, over a mesh.

Dropless: every token reaches each of its experts, whatever the load. Tokens are replicated over
the `expert` and `tensor` axes; each rank computes its own experts' share and the shares are summed.

Dimension letters: `M` dispatched rows, `A` all experts of a stack of layers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int

from llada_jax import sharding
from llada_jax.ops import grouped_matmul


def expert_mlp(
    x: Float[Array, "B T D"],
    expert_indices: Int[Array, "B T X"],
    expert_weights: Float[Array, "B T X"],
    gate_proj: Float[Array, "*L E D F"],
    up_proj: Float[Array, "*L E D F"],
    down_proj: Float[Array, "*L E F D"],
    *,
    layer: Int[Array, ""] | None,
    rules: sharding.AxisRules,
    implementation: str,
) -> Float[Array, "B T D"]:
    """Weighted sum over each token's experts of down(silu(gate(x)) * up(x)).

    Matrix products are in the dtype of `x`; the weighted sum is float32, cast back once.

    Args:
      x: tokens.
      expert_indices: experts of each token, in 0..E-1.
      expert_weights: float32 weight of each of them.
      gate_proj: one matrix per expert; with a leading L axis where `layer` is given.
      up_proj: as `gate_proj`.
      down_proj: the way back to D.
      layer: which layer of the stack to use, or None if the arrays are one layer's own.
      rules: how the arrays are split over the mesh.
      implementation: see `grouped_matmul`.
    """
    leading = () if layer is None else ("layers",)
    batch_spec = rules.spec("batch", None, None)
    in_spec = rules.spec(*leading, "expert", None, "mlp")
    out_spec = rules.spec(*leading, "expert", "mlp", None)
    # A parameter shared over `embed` ranks is made whole here, one layer at a time.
    gate_proj, up_proj = jax.reshard((gate_proj, up_proj), in_spec)
    down_proj = jax.reshard(down_proj, out_spec)

    @functools.partial(
        jax.shard_map,
        in_specs=(batch_spec, batch_spec, batch_spec, in_spec, in_spec, out_spec, P()),
        out_specs=batch_spec,
        check_vma=False,
    )
    def local(x, indices, weights, gate_proj, up_proj, down_proj, layer):
        experts = gate_proj.shape[-3]
        first = _rank(rules.expert) * experts
        out = _local_expert_mlp(
            x.reshape(-1, x.shape[-1]),
            indices.reshape(-1, indices.shape[-1]) - first,
            weights.reshape(-1, weights.shape[-1]),
            *(w.reshape(-1, *w.shape[-2:]) for w in (gate_proj, up_proj, down_proj)),
            num_experts=experts,
            group_offset=layer * experts,
            implementation=implementation,
        )
        axes = sharding.axis_names(rules.expert) + sharding.axis_names(rules.mlp)
        out = jax.lax.psum(out, axes) if axes else out
        return out.astype(x.dtype).reshape(x.shape)

    offset = jnp.int32(0) if layer is None else layer
    return local(x, expert_indices, expert_weights, gate_proj, up_proj, down_proj, offset)


def _local_expert_mlp(
    x: Float[Array, "T D"],
    indices: Int[Array, "T X"],
    weights: Float[Array, "T X"],
    gate_proj: Float[Array, "A D F"],
    up_proj: Float[Array, "A D F"],
    down_proj: Float[Array, "A F D"],
    *,
    num_experts: int,
    group_offset: Int[Array, ""],
    implementation: str,
) -> Float[Array, "T D"]:
    """One rank's share, float32: choices outside 0..num_experts-1 contribute nothing."""
    num_tokens, num_choices = indices.shape
    alignment = grouped_matmul.row_alignment(implementation, indices.size, num_experts)
    is_local = (indices >= 0) & (indices < num_experts)
    groups = jnp.where(is_local, indices, num_experts).reshape(-1)
    positions, group_sizes = _sorted_positions(groups, num_experts, alignment)
    num_rows = indices.size + num_experts * (alignment - 1)
    num_rows += -num_rows % alignment
    sources = jnp.zeros((num_rows,), jnp.int32)
    sources = sources.at[positions].set(
        jnp.arange(indices.size, dtype=jnp.int32) // num_choices, mode="drop", unique_indices=True
    )
    out = grouped_matmul.grouped_mlp(
        x,
        sources,
        gate_proj,
        up_proj,
        down_proj,
        group_sizes,
        group_offset=group_offset,
        row_alignment=alignment,
        implementation=implementation,
    )
    per_choice = out.at[positions].get(mode="fill", fill_value=0).astype(jnp.float32)
    per_choice = per_choice.reshape(num_tokens, num_choices, -1)
    return jnp.einsum("txd,tx->td", per_choice, jnp.where(is_local, weights, 0.0))


def _sorted_positions(
    groups: Int[Array, "M"], num_groups: int, alignment: int
) -> tuple[Int[Array, "M"], Int[Array, "G"]]:
    """Where each choice goes so that choices are sorted by group and groups start aligned.

    Returns:
      positions: row of each choice; far out of range for `groups == num_groups` (not ours).
      group_sizes: rows per group, rounded up to `alignment`.
    """
    one_hot = (groups[:, None] == jnp.arange(num_groups)).astype(jnp.int32)
    running = jnp.cumsum(one_hot, axis=0)
    counts = running[-1]
    sizes = (counts + alignment - 1) // alignment * alignment
    starts = jnp.cumsum(sizes) - sizes
    positions = jnp.sum(one_hot * (running - 1 + starts), axis=1)
    return jnp.where(groups < num_groups, positions, jnp.iinfo(jnp.int32).max), sizes


def _rank(axes: sharding.MeshAxes) -> Array:
    return jax.lax.axis_index(sharding.axis_names(axes)) if axes else jnp.int32(0)
