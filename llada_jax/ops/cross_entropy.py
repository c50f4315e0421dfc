"""Likelihood and entropy of target tokens, without ever holding the logits of a whole sequence.

The head is applied to chunks of positions, forward and again backward; between the two only one
float32 per position is kept. The vocabulary may be split over the mesh.

Dimension letters: `Q` positions of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llada_jax import sharding
from llada_jax.ops import shared_weights

# Of the head's kernel.
_AXES = ("vocab", "embed")


@struct.dataclass
class TokenStatistics:
    """What the head says about each target.

    Attributes:
      nll: [B, T] float32, negative log-likelihood of the target, natural logarithm.
      is_correct: [B, T], whether no other token has a larger logit.
      entropy: [B, T] float32, of the distribution over the vocabulary; zeros unless asked for.
    """

    nll: Float[Array, "B T"]
    is_correct: Bool[Array, "B T"]
    entropy: Float[Array, "B T"]


def token_statistics(
    hidden: Float[Array, "B T D"],
    head_kernel: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    *,
    chunk_tokens: int,
    with_entropy: bool = False,
    rules: sharding.AxisRules,
) -> TokenStatistics:
    """Statistics of `targets` under softmax(hidden @ head_kernel^T).

    Differentiable in `hidden` and `head_kernel` (reverse mode), through `nll` and `entropy`.
    Logits are computed in the dtype of `hidden` and used as float32, as `layers.Embed.logits`
    does; the kernel's gradient is summed over positions in float32.

    Args:
      hidden: normed hidden states.
      head_kernel: the head, one row per token.
      targets: token ids.
      chunk_tokens: positions of each row whose logits exist at a time on a device; T need not be a
        multiple.
      with_entropy: whether to compute the entropy.
      rules: how rows, their positions and the vocabulary are split over the mesh.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    chunk = min(chunk_tokens, hidden.shape[1] // sharding.axis_size(rules.length))
    return _statistics(
        hidden, head_kernel.astype(hidden.dtype), targets, chunk, with_entropy, rules
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _statistics(hidden, kernel, targets, chunk, with_entropy, rules):
    return _forward(hidden, kernel, targets, chunk, with_entropy, rules)[0]


def _forward(hidden, kernel, targets, chunk, with_entropy, rules):
    """Keeps the entropy and the logarithm of the softmax's denominator of each position."""
    rows, row_vectors = rules.spec("batch", "length"), rules.spec("batch", "length", None)

    @functools.partial(
        jax.shard_map,
        in_specs=(row_vectors, rules.spec("vocab", None), rows),
        out_specs=(rows,) * 4,
        check_vma=False,
    )
    def local(hidden, kernel, targets):
        axes = sharding.axis_names(rules.vocab)

        def body(i, out):
            hidden_chunk, target_chunk = (_chunk(a, i, chunk) for a in (padded, padded_targets))
            logits = _logits(hidden_chunk, kernel)
            maximum = _reduce(jax.lax.pmax, jnp.max(logits, axis=-1), axes)
            total = _reduce(
                jax.lax.psum, jnp.sum(jnp.exp(logits - maximum[..., None]), axis=-1), axes
            )
            log_total = maximum + jnp.log(total)
            is_target = _is_target(target_chunk, kernel.shape[0], axes)
            target_logit = _reduce(
                jax.lax.psum, jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1), axes
            )
            entropy = jnp.zeros_like(maximum)
            if with_entropy:
                surprise = log_total[..., None] - logits
                entropy = jnp.sum(jnp.exp(-surprise) * surprise, axis=-1)
                entropy = _reduce(jax.lax.psum, entropy, axes)
            new = (log_total - target_logit, target_logit >= maximum, entropy, log_total)
            return tuple(_with_chunk(a, b, i, chunk) for a, b in zip(out, new, strict=True))

        padded, padded_targets = (_padded(a, chunk) for a in (hidden, targets))
        shape = padded_targets.shape
        zeros = jnp.zeros(shape, jnp.float32)
        out = (zeros, jnp.zeros(shape, bool), zeros, zeros)
        out = jax.lax.fori_loop(0, shape[1] // chunk, body, out)
        return tuple(a[:, : targets.shape[1]] for a in out)

    # The head is gathered once the hidden states are there: earlier, it would lie beside them.
    hidden, kernel = jax.lax.optimization_barrier((hidden, kernel))
    nll, is_correct, entropy, log_total = local(hidden, _whole(kernel, rules), targets)
    out = TokenStatistics(nll=nll, is_correct=is_correct, entropy=entropy)
    return out, (hidden, kernel, targets, entropy, log_total)


def _backward(chunk, with_entropy, rules, residuals, d_out):
    """Gradients to the hidden states and to the kernel, from logits computed again.

    With p the softmax and H the entropy, d nll / d logit_v is p_v - [v is the target], and
    d H / d logit_v is -p_v (log p_v + H).
    """
    rows, row_vectors = rules.spec("batch", "length"), rules.spec("batch", "length", None)
    kernel_spec = rules.spec("vocab", None)

    @functools.partial(
        jax.shard_map,
        in_specs=(row_vectors, kernel_spec, *(rows,) * 5),
        out_specs=(row_vectors, shared_weights.gradient_spec(_AXES, rules)),
        check_vma=False,
    )
    def local(hidden, kernel, targets, entropy, log_total, d_nll, d_entropy):
        axes = sharding.axis_names(rules.vocab)
        length = targets.shape[1]
        arrays = (hidden, targets, entropy, log_total, d_nll, d_entropy)
        arrays = tuple(_padded(a, chunk) for a in arrays)

        def body(i, out):
            d_hidden, d_kernel = out
            hidden, targets, entropy, log_total, d_nll, d_entropy = (
                _chunk(a, i, chunk) for a in arrays
            )
            log_p = _logits(hidden, kernel) - log_total[..., None]
            p = jnp.exp(log_p)
            is_target = _is_target(targets, kernel.shape[0], axes)
            d_logits = d_nll[..., None] * (p - is_target)
            if with_entropy:
                d_logits -= d_entropy[..., None] * p * (log_p + entropy[..., None])
            d_logits = d_logits.astype(hidden.dtype)
            # Each rank has its share of the vocabulary; the shares' sum is rounded once.
            d_chunk = jnp.einsum(
                "bqv,vd->bqd", d_logits, kernel, preferred_element_type=jnp.float32
            )
            d_chunk = _reduce(jax.lax.psum, d_chunk, axes).astype(hidden.dtype)
            d_kernel += jnp.einsum(
                "bqv,bqd->vd", d_logits, hidden, preferred_element_type=jnp.float32
            )
            return _with_chunk(d_hidden, d_chunk, i, chunk), d_kernel

        zeros = jnp.zeros_like(arrays[0]), jnp.zeros(kernel.shape, jnp.float32)
        d_hidden, d_kernel = jax.lax.fori_loop(0, arrays[1].shape[1] // chunk, body, zeros)
        d_kernel = shared_weights.scattered_sum(d_kernel, _AXES, rules)
        return d_hidden[:, :length], d_kernel.astype(kernel.dtype)

    hidden, kernel, targets, entropy, log_total = residuals
    d_hidden, d_kernel = local(
        hidden, _whole(kernel, rules), targets, entropy, log_total, d_out.nll, d_out.entropy
    )
    # The head's gradient, whole on each rank, is scattered before the layers' backward pass begins.
    d_kernel = jax.reshard(d_kernel, rules.spec(*_AXES))
    d_hidden, d_kernel = jax.lax.optimization_barrier((d_hidden, d_kernel))
    return d_hidden, d_kernel, None


_statistics.defvjp(_forward, _backward)


def _whole(kernel: Float[Array, "V D"], rules: sharding.AxisRules) -> Float[Array, "V D"]:
    return shared_weights.whole(kernel, _AXES, rules)


def _logits(hidden: Float[Array, "B Q D"], kernel: Float[Array, "V D"]) -> Float[Array, "B Q V"]:
    return jnp.einsum("bqd,vd->bqv", hidden, kernel).astype(jnp.float32)


def _is_target(
    targets: Int[Array, "B Q"], vocab_size: int, axes: tuple[str, ...]
) -> Bool[Array, "B Q V"]:
    first = jax.lax.axis_index(axes) * vocab_size if axes else 0
    return targets[..., None] - first == jnp.arange(vocab_size)


def _reduce(collective, value: Array, axes: tuple[str, ...]) -> Array:
    return collective(value, axes) if axes else value


def _padded(array: Array, chunk: int) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[1] = (0, -array.shape[1] % chunk)
    return jnp.pad(array, widths)


def _chunk(array: Array, i: Array, chunk: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, i * chunk, chunk, axis=1)


def _with_chunk(array: Array, new: Array, i: Array, chunk: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, new, i * chunk, axis=1)
