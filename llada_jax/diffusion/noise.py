"""How text is noised for training: levels per block, masks, random replacements.

Everything drawn is a function of a key (of the run's seed and the step) and of the examples' global
ids. It is computed alike on every device, so no mesh and no number of processes changes it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt

from llada_jax import sharding

# Purposes that a key is folded with; a purpose's number never changes.
_LEVEL, _MASK, _REPLACE, _EMBEDDING = range(4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Choices of the corruption. R0 is arXiv:2512.15745, R1 arXiv:2602.08676.

    Attributes:
      mask_id: id of [MASK].
      vocab_size: ids below this may be drawn as replacements.
      special_ids: ids that never are: control tokens.
      level: what shares a noise level: a "block" (BD3-LM, arXiv:2503.09573), or an "example", all
        of a row's documents (the reference trainer). R0's equation has one level outside its sum
        over blocks and does not say; the default is ours, for its lower variance.
      low: least level. With "elbo" weights a level near 0 has a huge weight, so it is not 0; 1e-3
        as NeMo Automodel's trainer. Fine-tuning narrows the band (R0, section 5); the public
        value is 0.3.
      high: largest level; in public fine-tuning 0.8.
      is_stratified: whether the levels of a batch fill the band evenly: of N blocks each draws from
        its own N-th of the band (BD3-LM).
      weighting: "elbo", 1 / level on masked tokens: the likelihood bound for the linear schedule
        (R0, equation 2); "uniform", 1, as the reference trainer.
      is_complementary: whether every row comes twice, the second time with the other targets
        masked (R0, section 5; fine-tuning only).
      normalize_by: what the batch's sum is divided by: "targets", all tokens that may be masked,
        or "masked", those that are supervised (the reference trainer).
      replace_rate: largest share of a row's unmasked target tokens that random tokens replace; each
        row draws its share evenly from 0 to this. The editing stream of R1, which publishes no
        rate and not whether masks and replacements share a sequence; ours: they do.
      replace_weight: weight of a replaced token's loss. R1 publishes none; 1 is ours.
    """

    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...] = ()
    level: str = "block"
    low: float = 1e-3
    high: float = 1.0
    is_stratified: bool = True
    weighting: str = "elbo"
    is_complementary: bool = False
    normalize_by: str = "targets"
    replace_rate: float = 0.0
    replace_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high <= 1:
            raise ValueError(f"noise: 0 < low {self.low} < high {self.high} <= 1 does not hold")
        if not 0 <= self.replace_rate <= 1:
            raise ValueError(f"noise.replace_rate: {self.replace_rate} must lie in 0..1")
        for name, known in (
            ("level", ("block", "example")),
            ("weighting", ("elbo", "uniform")),
            ("normalize_by", ("targets", "masked")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"noise.{name}: {getattr(self, name)!r} is not one of {known}")
        if self.replace_rate and len(self.replacements) < 2:
            raise ValueError("noise.replace_rate: the vocabulary has no two ordinary tokens")

    @property
    def replacements(self) -> np.ndarray:
        """Ids that may replace a token."""
        banned = {self.mask_id, *self.special_ids}
        return np.setdiff1d(np.arange(self.vocab_size), sorted(banned)).astype(np.int32)


@struct.dataclass
class Corruption:
    """What happens to each position, of R rows (twice the batch's with complementary pairs).

    Attributes:
      level: [R, L] probability with which the position was masked.
      is_masked: [R, L], targets that [MASK] replaces.
      tokens: [R, L], the noised text.
      is_replaced: [R, L], targets that another token replaces.
      row_keys: [R, 2], key data of each row, for more noise of its own.
    """

    level: Float[Array, "R L"]
    is_masked: Bool[Array, "R L"]
    tokens: Int[Array, "R L"]
    is_replaced: Bool[Array, "R L"]
    row_keys: UInt[Array, "R 2"]


def row_keys(key: Array, example_ids: Int[Array, "B"]) -> Array:
    """A key for each example, [B]."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(example_ids)


def block_starts(
    segments: Int[Array, "B L"], positions: Int[Array, "B L"], block_length: int | None
) -> Int[Array, "B L"]:
    """Index of the first position of each position's block; None means one block per row."""
    places = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    if block_length is None:
        return jnp.zeros_like(places)
    blocks = positions // block_length
    is_start = (segments[:, 1:] != segments[:, :-1]) | (blocks[:, 1:] != blocks[:, :-1])
    is_start = jnp.concatenate([jnp.ones_like(is_start[:, :1]), is_start], axis=1)
    return jax.lax.cummax(jnp.where(is_start, places, 0), axis=1)


def noise_levels(
    keys: Array, starts: Int[Array, "B L"], is_used: Bool[Array, "B L"], cfg: NoiseConfig
) -> Float[Array, "B L"]:
    """A level in [low, high) for every position, the same within a block.

    Args:
      keys: one per row.
      starts: see `block_starts`.
      is_used: positions whose block counts: a block none of whose positions does takes part in no
        stratification.
      cfg: the choices.
    """
    batch, length = starts.shape
    uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, _LEVEL), (2, length)))(
        keys
    )
    order, jitter = uniform[:, 0], uniform[:, 1]
    if cfg.is_stratified:
        rows = jnp.arange(batch)[:, None]
        is_block = jnp.zeros((batch, length), bool).at[rows, starts].max(is_used)
        # Blocks in a random order: the place of each is the stratum it draws from.
        flat = jnp.where(is_block, order, jnp.inf).reshape(-1)
        rank = jnp.argsort(jnp.argsort(flat, stable=True), stable=True).reshape(batch, length)
        count = jnp.maximum(jnp.sum(is_block), 1)
        unit = (rank + jitter) / count
    else:
        unit = jitter
    level = cfg.low + (cfg.high - cfg.low) * jnp.clip(unit, 0.0, 1.0)
    return jnp.take_along_axis(level.astype(jnp.float32), starts, axis=1)


def corrupt(
    key: Array,
    tokens: Int[Array, "B L"],
    is_target: Bool[Array, "B L"],
    starts: Int[Array, "B L"],
    example_ids: Int[Array, "B"],
    cfg: NoiseConfig,
) -> Corruption:
    """Masks and replaces targets; nothing else changes.

    Args:
      key: of the seed and the step.
      tokens: the text; the arrays must not be sharded.
      is_target: positions that may be noised.
      starts: see `block_starts`.
      example_ids: global ids.
      cfg: the choices.
    """
    keys = row_keys(key, example_ids)
    length = tokens.shape[1]
    level = noise_levels(keys, starts, is_target, cfg)

    def uniforms(purpose: int, count: int) -> Array:
        return jax.vmap(
            lambda k: jax.random.uniform(jax.random.fold_in(k, purpose), (count, length))
        )(keys)

    is_masked = (uniforms(_MASK, 1)[:, 0] < level) & is_target
    if cfg.is_complementary:
        is_masked = _pairs(is_masked, ~is_masked & is_target)
        # The second of a pair masks with the probability that the first does not.
        level = _pairs(level, jnp.maximum(1 - level, cfg.low))
        tokens, is_target = _pairs(tokens, tokens), _pairs(is_target, is_target)
        copies = jax.vmap(lambda k: jax.vmap(lambda c: jax.random.fold_in(k, c))(jnp.arange(2)))
        keys = copies(keys).reshape(-1)
    noised = jnp.where(is_masked, cfg.mask_id, tokens)
    is_replaced = jnp.zeros_like(is_masked)
    if cfg.replace_rate:
        draws = uniforms(_REPLACE, 3)
        rate = cfg.replace_rate * draws[:, 2, :1]
        is_replaced = is_target & ~is_masked & (draws[:, 0] < rate)
        noised = jnp.where(is_replaced, _other_token(draws[:, 1], tokens, cfg), noised)
    return Corruption(
        level=level,
        is_masked=is_masked,
        tokens=noised,
        is_replaced=is_replaced,
        row_keys=jax.vmap(jax.random.key_data)(keys),
    )


def _pairs(first: Array, second: Array) -> Array:
    """Rows of two arrays in turn."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


def _other_token(uniform: Array, tokens: Array, cfg: NoiseConfig) -> Array:
    """Ordinary tokens other than the ones given."""
    allowed = cfg.replacements
    place = np.full(cfg.vocab_size, len(allowed), np.int32)
    place[allowed] = np.arange(len(allowed), dtype=np.int32)
    own = jnp.asarray(place)[tokens]
    # Where the token itself is ordinary there is one choice less, and it is stepped over.
    count = len(allowed) - (own < len(allowed))
    drawn = jnp.minimum((uniform * count).astype(jnp.int32), count - 1)
    return jnp.asarray(allowed)[drawn + (drawn >= own)]


def embedding_offset(
    row_keys: UInt[Array, "R 2"],
    is_masked: Bool[Array, "R T"],
    table: Float[Array, "V D"],
    *,
    scale: Float[Array, ""],
    rules: sharding.AxisRules,
) -> Float[Array, "R T D"]:
    """Gaussian noise for the embeddings of masked positions (R0, section 7.1).

    Args:
      row_keys: see `Corruption`.
      is_masked: where the noise goes.
      table: the token embeddings.
      scale: standard deviation, in units of the mean RMS of the table's rows.
      rules: how rows are split over the mesh.
    """
    rms = jnp.sqrt(jnp.mean(jnp.square(table.astype(jnp.float32)), axis=-1))
    deviation = jax.lax.stop_gradient(scale * jnp.mean(rms))
    width = table.shape[-1]

    def local(keys: Array, is_masked: Array, deviation: Array) -> Array:
        def one(data, is_masked):
            key = jax.random.fold_in(jax.random.wrap_key_data(data), _EMBEDDING)
            drawn = jax.random.normal(key, (*is_masked.shape, width), jnp.float32)
            return jnp.where(is_masked[:, None], deviation * drawn, 0.0)

        return jax.vmap(one)(keys, is_masked)

    rows = rules.spec("batch", None)
    drawn = jax.shard_map(
        local,
        in_specs=(rows, rows, jax.P()),
        out_specs=rules.spec("batch", None, None),
        check_vma=False,
    )(row_keys, is_masked, jax.reshard(deviation, jax.P()))
    return drawn.astype(table.dtype)
