"""Training objectives: what the network sees, what it must predict, and what that costs.

Each objective turns a batch of text into `Noised`; one function adds up its loss. Sums and counts
are kept apart, so that a mean over the global batch is divided once (LLaDA2.0, arXiv:2512.15745,
equations 1, 2 and 5).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt

from llada_jax import sharding
from llada_jax.diffusion import masks, noise
from llada_jax.ops import block_mask, cross_entropy


@struct.dataclass
class Batch:
    """Packed rows of text.

    Attributes:
      tokens: [B, L] ids.
      segments: [B, L] document of the row, from 1; 0 is padding.
      positions: [B, L] place in the document, from 0.
      is_target: [B, L] positions that may be noised and are learnt.
      example_ids: [B] number of the row in the run's global sequence of rows.
    """

    tokens: Int[Array, "B L"]
    segments: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    is_target: Bool[Array, "B L"]
    example_ids: Int[Array, "B"]


@struct.dataclass
class Noised:
    """What the network sees and what it must predict. T is 2 L with the clean half, else L.

    Attributes:
      tokens: [R, T] ids.
      positions: [R, T] for the rotary embedding: both halves count alike.
      tags: who may attend to whom.
      is_masked: [R, T] where `tokens` hold [MASK] in place of a target.
      targets: [R, L] what position i of the first L must predict.
      weights: [R, L] of each prediction's negative log-likelihood; 0 where nothing is predicted.
      is_supervised: [R, L] where something is.
      is_target: [R, L] where something might be: what the likelihood bound is a mean over.
      is_replaced: [R, L] supervised positions that show another token instead of [MASK].
      row_keys: [R, 2] key data, for more noise of the row's own.
    """

    tokens: Int[Array, "R T"]
    positions: Int[Array, "R T"]
    tags: block_mask.MaskTags
    is_masked: Bool[Array, "R T"]
    targets: Int[Array, "R L"]
    weights: Float[Array, "R L"]
    is_supervised: Bool[Array, "R L"]
    is_target: Bool[Array, "R L"]
    is_replaced: Bool[Array, "R L"]
    row_keys: UInt[Array, "R 2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDiffusion:
    """Predict masked tokens from their own noised block and the clean blocks before it.

    Attributes:
      block_length: tokens per block, counted from each document's start.
      noise: how text is noised.
    """

    block_length: int
    noise: noise.NoiseConfig

    def prepare(self, key: Array, batch: Batch) -> Noised:
        """Noises a whole batch; `key` is of the seed and the step."""
        return _noised(key, batch, self.noise, self.block_length, has_clean_half=True)

    def denominator(self, noised: Noised) -> Float[Array, ""]:
        """What the sum of the loss is divided by."""
        return _denominator(noised, self.noise.normalize_by)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedDiffusion:
    """Predict masked tokens from the whole noised document (LLaDA, arXiv:2502.09992, equation 3).

    Attributes:
      noise: how text is noised. A "block" that shares a level is a document here.
    """

    noise: noise.NoiseConfig

    def prepare(self, key: Array, batch: Batch) -> Noised:
        """Noises a whole batch; `key` is of the seed and the step."""
        return _noised(key, batch, self.noise, batch.tokens.shape[1], has_clean_half=False)

    def denominator(self, noised: Noised) -> Float[Array, ""]:
        """What the sum of the loss is divided by."""
        return _denominator(noised, self.noise.normalize_by)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """Predict each token from those before it in its document.

    Attributes:
      target: "next": position i predicts token i + 1, as autoregressive checkpoints do. "same":
        the [MASK] in place of a token predicts it: block diffusion in blocks of one, everything
        masked. Where a conversion drops the shift is not published (R0); both are here.
      mask_id: id of [MASK].
    """

    target: str
    mask_id: int

    def __post_init__(self) -> None:
        if self.target not in ("next", "same"):
            raise ValueError(f"target: {self.target!r} is not 'next' or 'same'")

    def prepare(self, key: Array, batch: Batch) -> Noised:
        """Targets of a whole batch; nothing is drawn."""
        batch = _replicated(batch)
        keys = jax.vmap(jax.random.key_data)(noise.row_keys(key, batch.example_ids))
        nothing = jnp.zeros_like(batch.is_target)
        if self.target == "same":
            out = _two_halves(
                batch,
                tokens=jnp.where(batch.is_target, self.mask_id, batch.tokens),
                is_masked=batch.is_target,
                weights=batch.is_target.astype(jnp.float32),
                is_supervised=batch.is_target,
                is_replaced=nothing,
                row_keys=keys,
                block_length=1,
            )
            return _sharded(out)

        def ahead(x: Array) -> Array:
            return jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)

        is_same = (ahead(batch.segments) == batch.segments) & (batch.segments != 0)
        is_supervised = ahead(batch.is_target) & is_same
        return _sharded(
            Noised(
                tokens=batch.tokens,
                positions=batch.positions,
                tags=masks.autoregressive(batch.segments, batch.positions),
                is_masked=nothing,
                targets=ahead(batch.tokens),
                weights=is_supervised.astype(jnp.float32),
                is_supervised=is_supervised,
                is_target=is_supervised,
                is_replaced=nothing,
                row_keys=keys,
            )
        )

    def denominator(self, noised: Noised) -> Float[Array, ""]:
        """The number of predictions."""
        return _denominator(noised, "masked")


Objective = BlockDiffusion | MaskedDiffusion | Autoregressive


@struct.dataclass
class LossSums:
    """Sums and counts over rows; those of several parts of a batch are added.

    Attributes:
      nll_sum: of weight times negative log-likelihood.
      nll_unweighted_sum: of the negative log-likelihood where [MASK] or a next token is predicted.
      entropy_sum: of the entropy where the prediction is right (dParallel's confidence term).
      edit_nll_sum: of the negative log-likelihood where another token stood.
      num_targets: positions that might have been supervised.
      num_supervised: positions that are.
      num_correct: of those, rightly predicted.
      num_edits: supervised positions where another token stood.
      num_edits_correct: of those, rightly predicted.
    """

    nll_sum: Float[Array, ""]
    nll_unweighted_sum: Float[Array, ""]
    entropy_sum: Float[Array, ""]
    edit_nll_sum: Float[Array, ""]
    num_targets: Int[Array, ""]
    num_supervised: Int[Array, ""]
    num_correct: Int[Array, ""]
    num_edits: Int[Array, ""]
    num_edits_correct: Int[Array, ""]


def loss_sums(stats: cross_entropy.TokenStatistics, noised: Noised) -> LossSums:
    """Adds up what the head says of each prediction."""

    def total(values: Array, where: Array) -> Array:
        return jnp.sum(jnp.where(where, values, 0.0))

    def count(where: Array) -> Array:
        return jnp.sum(where, dtype=jnp.int32)

    is_right = stats.is_correct & noised.is_supervised
    return LossSums(
        nll_sum=total(noised.weights * stats.nll, noised.is_supervised),
        nll_unweighted_sum=total(stats.nll, noised.is_supervised & ~noised.is_replaced),
        entropy_sum=total(stats.entropy, is_right),
        edit_nll_sum=total(stats.nll, noised.is_replaced),
        num_targets=count(noised.is_target),
        num_supervised=count(noised.is_supervised),
        num_correct=count(is_right),
        num_edits=count(noised.is_replaced),
        num_edits_correct=count(is_right & noised.is_replaced),
    )


def mean(total: Float[Array, ""], count: Array) -> Float[Array, ""]:
    """total / count, and 0 where nothing was counted."""
    return total / jnp.maximum(count, 1).astype(jnp.float32)


def zero_embedding_row_grad(gradient: Float[Array, "V D"], row: int) -> Float[Array, "V D"]:
    """The gradient as PyTorch's `padding_idx` leaves it: none for one row of the embedding.

    The reference trainer's embedding has pad, which is also the end of text, as `padding_idx`. Only
    comparisons with it want this; we train the end of text like any token.
    """
    return jnp.where(jnp.arange(gradient.shape[0])[:, None] == row, 0.0, gradient)


def replay(
    clean: Int[Array, "B L"],
    noised_tokens: Int[Array, "B L"],
    labels: Int[Array, "B L"],
    *,
    block_length: int | None,
    mask_id: int,
    is_shifted: bool = False,
) -> Noised:
    """The reference trainer's batch, from what it recorded; weights are 1.

    Args:
      clean: x_0, whole rows without padding.
      noised_tokens: x_t.
      labels: the clean token where it is supervised, else -100.
      block_length: tokens per block; None is masked diffusion without the clean half.
      mask_id: id of [MASK].
      is_shifted: whether position i predicts label i + 1 (`same_token_labels: false`).
    """
    if is_shifted:
        labels = jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], -100)], axis=1)
    is_supervised = labels != -100
    batch = Batch(
        tokens=clean,
        segments=jnp.ones_like(clean),
        positions=jnp.broadcast_to(jnp.arange(clean.shape[1]), clean.shape),
        is_target=is_supervised,
        example_ids=jnp.arange(clean.shape[0]),
    )
    batch = _replicated(batch)
    fields = {
        "tokens": noised_tokens,
        "is_masked": noised_tokens == mask_id,
        "weights": is_supervised.astype(jnp.float32),
        "is_supervised": is_supervised,
        "is_replaced": jnp.zeros_like(is_supervised),
        "row_keys": jnp.zeros((clean.shape[0], 2), jnp.uint32),
    }
    if block_length is None:
        out = _one_half(batch, **fields)
    else:
        out = _two_halves(batch, **fields, block_length=block_length)
    return _sharded(out.replace(targets=jnp.where(is_supervised, labels, 0)))


def _noised(
    key: Array, batch: Batch, cfg: noise.NoiseConfig, block_length: int, *, has_clean_half: bool
) -> Noised:
    batch = _replicated(batch)
    # Padding is never noised, whatever the caller says of it.
    batch = batch.replace(is_target=batch.is_target & (batch.segments != 0))
    shared = None if cfg.level == "example" else block_length
    starts = noise.block_starts(batch.segments, batch.positions, shared)
    found = noise.corrupt(key, batch.tokens, batch.is_target, starts, batch.example_ids, cfg)
    if cfg.is_complementary:
        batch = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch)
    masked_weight = 1 / found.level if cfg.weighting == "elbo" else jnp.ones_like(found.level)
    weights = jnp.where(found.is_masked, masked_weight, 0.0)
    fields = {
        "tokens": found.tokens,
        "is_masked": found.is_masked,
        "weights": jnp.where(found.is_replaced, cfg.replace_weight, weights),
        "is_supervised": found.is_masked | found.is_replaced,
        "is_replaced": found.is_replaced,
        "row_keys": found.row_keys,
    }
    if has_clean_half:
        return _sharded(_two_halves(batch, **fields, block_length=block_length))
    return _sharded(_one_half(batch, **fields))


def _two_halves(batch: Batch, *, tokens, is_masked, block_length: int, **fields) -> Noised:
    return Noised(
        tokens=jnp.concatenate([tokens, batch.tokens], axis=1),
        positions=jnp.concatenate([batch.positions, batch.positions], axis=1),
        tags=masks.block_diffusion(batch.segments, batch.positions, block_length),
        is_masked=jnp.concatenate([is_masked, jnp.zeros_like(is_masked)], axis=1),
        targets=batch.tokens,
        is_target=batch.is_target,
        **fields,
    )


def _one_half(batch: Batch, *, tokens, is_masked, **fields) -> Noised:
    return Noised(
        tokens=tokens,
        positions=batch.positions,
        tags=masks.masked_diffusion(batch.segments),
        is_masked=is_masked,
        targets=batch.tokens,
        is_target=batch.is_target,
        **fields,
    )


def _denominator(noised: Noised, normalize_by: str) -> Float[Array, ""]:
    counted = noised.is_target if normalize_by == "targets" else noised.is_supervised
    return jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)


def _replicated(batch: Batch) -> Batch:
    """The batch whole on every device: noise that looks across rows is computed alike on all."""
    return jax.tree.map(lambda x: jax.reshard(x, jax.P(*(None,) * x.ndim)), batch)


def _sharded(noised: Noised) -> Noised:
    rules = sharding.TRAIN_RULES

    def one(x: Array) -> Array:
        return jax.reshard(x, rules.spec("batch", *(None,) * (x.ndim - 1)))

    return jax.tree.map(one, noised)
