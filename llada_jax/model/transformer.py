"""LLaDA2: a pre-norm transformer with leading dense layers and mixture-of-experts layers.

Layers of a kind are stacked along a leading axis and applied by one `lax.scan`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from llada_jax import config, sharding
from llada_jax.model import attention as attention_layer
from llada_jax.model import cache as kv_cache
from llada_jax.model import layers, moe
from llada_jax.ops import block_mask, norm_rope

# Implementations of `grouped_matmul` that index the whole stack of layers themselves. Slicing one
# layer's experts out of the stack would copy them at every forward pass; on a CPU that copy takes
# longer than the products of a block of 32 tokens.
_READS_STACK = frozenset({"blocks"})

ATTENTION = ("dense", "tiles")

# What the backward pass of a layer finds kept from the forward pass: everything, only the layer's
# input, or also the results of products with weights (attention scores and experts' rows are
# computed again).
_REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMAT = tuple(_REMAT_POLICIES)


@struct.dataclass
class Intermediates:
    """What each layer computed, for comparisons with the reference; layers are the first axis.

    Attributes:
      attention: output of the attention layer, [L, B, T, D].
      mlp: output of the MLP or the mixture of experts, [L, B, T, D].
      residual: residual stream after the layer, [L, B, T, D].
      routing: the router's choices in the mixture-of-experts layers, or None.
    """

    attention: Float[Array, "L B T D"]
    mlp: Float[Array, "L B T D"]
    residual: Float[Array, "L B T D"]
    routing: moe.Routing | None


class Block(nnx.Module):
    """One transformer layer, with a dense MLP or a mixture of experts."""

    def __init__(
        self,
        cfg: config.ModelConfig,
        rules: sharding.AxisRules,
        *,
        is_moe: bool,
        grouped_matmul: str,
        dispatch: str,
        stack: tuple[int, ...],
        rngs: nnx.Rngs,
    ):
        embed = cfg.hidden_size
        self.input_norm = layers.RMSNorm(embed, cfg, rules, stack=stack)
        self.attention = attention_layer.Attention(cfg, rules, stack=stack, rngs=rngs)
        self.post_attention_norm = layers.RMSNorm(embed, cfg, rules, stack=stack)
        if is_moe:
            self.mlp = moe.MoE(
                cfg,
                rules,
                grouped_matmul=grouped_matmul,
                dispatch=dispatch,
                stack=stack,
                rngs=rngs,
            )
        else:
            self.mlp = moe.MLP(cfg.intermediate_size, cfg, rules, stack=stack, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Float[Array, "B T R"], Float[Array, "B T R"]],
        mask: Bool[Array, "#B T T"] | block_mask.MaskTags,
        cache: kv_cache.KVCache | None,
        layer: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], kv_cache.BlockKV, Intermediates]:
        """Applies the layer; `layer` is its place in a stack that `mlp.experts` still holds."""
        with jax.named_scope("attention"):
            attended, kv = self.attention(self.input_norm(x), rope, mask, cache)
        x = x + attended
        normed, routing = self.post_attention_norm(x), None
        with jax.named_scope("mlp"):
            if isinstance(self.mlp, moe.MoE):
                out, routing = self.mlp(normed, layer)
            else:
                out = self.mlp(normed)
        x = x + out
        return x, kv, Intermediates(attention=attended, mlp=out, residual=x, routing=routing)


class LLaDA2(nnx.Module):
    """LLaDA2 mixture-of-experts diffusion language model.

    Build it under `jax.set_mesh(mesh)`; `jax.eval_shape` of the constructor is the one source of
    parameter shapes, dtypes and shardings (`abstract_state`).

    Args:
      cfg: the architecture.
      rules: how parameters and activations are split over the current mesh.
      grouped_matmul: formulation of the experts' products, see `ops.grouped_matmul`.
      attention: what is done where the mask is given as tags: "dense" builds it whole, "tiles"
        leaves out its empty tiles.
      remat: what of a layer the backward pass computes again: "none"; "dots", all but the products
        with parameters; "full", everything.
      slices_experts: whether a layer's experts are always cut out of their stack. Training needs
        it: a formulation that reads the whole stack has a gradient as large as the stack, at every
        layer.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        cfg: config.ModelConfig,
        rules: sharding.AxisRules,
        *,
        grouped_matmul: str = "ragged_dot",
        dispatch: str = "replicated",
        attention: str = "dense",
        remat: str = "none",
        slices_experts: bool = False,
        rngs: nnx.Rngs,
    ):
        _check_option("attention", attention, ATTENTION)
        _check_option("remat", remat, REMAT)

        def blocks(count: int, *, is_moe: bool) -> Block | None:
            if not count:
                return None
            return Block(
                cfg,
                rules,
                is_moe=is_moe,
                grouped_matmul=grouped_matmul,
                dispatch=dispatch,
                stack=(count,),
                rngs=rngs,
            )

        self.embed = layers.Embed(cfg, rules, rngs=rngs)
        self.dense_layers = blocks(cfg.first_k_dense_replace, is_moe=False)
        self.moe_layers = blocks(cfg.num_moe_layers, is_moe=True)
        self.final_norm = layers.RMSNorm(cfg.hidden_size, cfg, rules)
        self.lm_head = None if cfg.tie_word_embeddings else layers.Embed(cfg, rules, rngs=rngs)
        self.cfg, self.rules, self.grouped_matmul = cfg, rules, grouped_matmul
        self.attention, self.remat, self.slices_experts = attention, remat, slices_experts

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#B T T"],
        cache: kv_cache.KVCache | None = None,
    ) -> tuple[Float[Array, "B T V"], kv_cache.BlockKV]:
        """Logits in float32, and the keys and values a cache would keep of these positions.

        Args:
          tokens: token ids.
          positions: absolute position of each token in its text, from 0.
          mask: True where a query (first T) may attend to a key (second T) of this call.
          cache: finished earlier positions, which every query sees.
        """
        hidden, kv, _ = self.hidden_states(tokens, positions=positions, mask=mask, cache=cache)
        return self.logits(hidden), kv

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 scores over the vocabulary of normed hidden states."""
        with jax.named_scope("lm_head"):
            head = self.embed if self.lm_head is None else self.lm_head
            return head.logits(hidden)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#B T T"] | block_mask.MaskTags,
        cache: kv_cache.KVCache | None = None,
        embed_offset: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], kv_cache.BlockKV, list[Intermediates]]:
        """Normed hidden states, keys and values, and each stack's intermediates.

        Intermediates that the caller drops are removed by the compiler.

        Args:
          tokens: as in `__call__`.
          positions: as in `__call__`.
          mask: as in `__call__`, or tags that describe it; then there is no cache.
          cache: as in `__call__`.
          embed_offset: added to the tokens' embeddings.
        """
        if cache is not None and isinstance(mask, block_mask.MaskTags):
            raise ValueError("mask: tags describe whole texts and go without a cache")
        if self.attention == "dense" and isinstance(mask, block_mask.MaskTags):
            mask = block_mask.dense(mask)  # Once, not at every layer.
        with jax.named_scope("embed"):
            x = self.embed(tokens)
            if embed_offset is not None:
                x = x + embed_offset.astype(x.dtype)
        frequencies, factor = rope_parameters(self.cfg)
        rope = norm_rope.rope_table(positions, frequencies, factor, x.dtype)
        kvs, intermediates, first = [], [], 0
        for stack, count in (
            (self.dense_layers, self.cfg.first_k_dense_replace),
            (self.moe_layers, self.cfg.num_moe_layers),
        ):
            if stack is None:
                continue
            layer_cache = None
            if cache is not None:
                layer_cache = (cache.key[first : first + count], cache.value[first : first + count])
            apply = functools.partial(
                _one_layer, rope=rope, mask=mask, length=None if cache is None else cache.length
            )
            x, kv, inner = self._scan(apply, stack, x, layer_cache, count)
            kvs.append(kv)
            intermediates.append(inner)
            first += count
        kv = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *kvs)
        return self.final_norm(x), kv, intermediates

    def _scan(self, apply, stack, x, layer_cache, count):
        """Scans `apply` over a stack; experts stay outside the scanned leaves where they can."""
        reads_stack = self.grouped_matmul in _READS_STACK and not self.slices_experts
        whole_filter = nnx.PathContains("experts") if reads_stack else nnx.Nothing()
        graph, whole, sliced = nnx.split(stack, whole_filter, ...)

        def body(x, scanned):
            sliced, layer_cache, index = scanned
            block = nnx.merge(graph, whole, sliced)
            x, kv, inner = apply(block, x, layer_cache, index if reads_stack else None)
            return x, (kv, inner)

        if self.remat != "none":
            # Inside a scan the compiler cannot merge a layer with its second computation.
            policy = _REMAT_POLICIES[self.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x, (kv, inner) = jax.lax.scan(body, x, (sliced, layer_cache, jnp.arange(count)))
        return x, kv, inner


def _one_layer(block, x, layer_cache, index, *, rope, mask, length):
    cache = None
    if layer_cache is not None:
        cache = kv_cache.KVCache(key=layer_cache[0], value=layer_cache[1], length=length)
    return block(x, rope, mask, cache, index)


def _check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: {value!r} is not one of {known}")


def rope_parameters(cfg: config.ModelConfig) -> tuple[np.ndarray, float]:
    """Rotary frequencies, float64 [rotary_dim / 2], and the factor on cos and sin."""
    scaling = cfg.rope_scaling
    plain = norm_rope.rope_frequencies(cfg.rotary_dim, cfg.rope_theta)
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    trained = scaling.original_max_position_embeddings or cfg.max_position_embeddings
    frequencies = norm_rope.yarn_frequencies(
        cfg.rotary_dim,
        cfg.rope_theta,
        factor=scaling.factor,
        trained_length_tokens=trained,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        truncate=scaling.truncate,
    )
    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor

    def magnitude(coefficient: float) -> float:
        return 0.1 * coefficient * float(np.log(scaling.factor)) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return frequencies, magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return frequencies, magnitude(1.0)


def abstract_model(
    cfg: config.ModelConfig,
    rules: sharding.AxisRules,
    *,
    grouped_matmul: str = "ragged_dot",
    dispatch: str = "replicated",
    attention: str = "dense",
    remat: str = "none",
    slices_experts: bool = False,
) -> LLaDA2:
    """The model with a ShapeDtypeStruct, sharding included, in place of every array.

    Needs `jax.set_mesh(mesh)`. The options are those of `LLaDA2`.
    """
    model = jax.eval_shape(
        lambda: LLaDA2(
            cfg,
            rules,
            grouped_matmul=grouped_matmul,
            dispatch=dispatch,
            attention=attention,
            remat=remat,
            slices_experts=slices_experts,
            rngs=nnx.Rngs(0),
        )
    )
    mesh = jax.sharding.get_mesh()

    # Tracing knows the mesh's shape only; restoring and placing need its devices.
    def on_devices(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        placed = jax.sharding.NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    return jax.tree.map(on_devices, model)


def num_parameters(cfg: config.ModelConfig) -> int:
    """Parameters of an architecture, the router's bias included; counted, not computed by hand."""
    with jax.set_mesh(sharding.make_mesh()):
        model = abstract_model(cfg, sharding.SERVE_RULES)
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
