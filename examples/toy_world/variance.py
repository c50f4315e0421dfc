"""How noisy the preference score of diffusion models is, by how its noise is drawn.

Preference optimisation compares bounds B of a policy and of a reference on the same text. VRPO
(LLaDA 1.5, arXiv:2505.19223) lowers the variance of dB = B_policy - B_reference by giving both the
same levels and masks, and by spending a budget of n draws on n levels with one mask each. Only the
variance is measured here, from the objective's own code: the project has no preference training.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from configs import toy_world
from examples.toy_world import exactness, measure, world
from llada_jax import sharding
from llada_jax.diffusion import noise, objective
from llada_jax.model import transformer

NUM_ROWS, NUM_REPEATS, BUDGET = 16, 20, 4
NEAR_STEP = 1e-3  # of a parameter's standard deviation
GOAL = objective.BlockDiffusion(
    block_length=toy_world.BLOCK,
    noise=noise.NoiseConfig(
        mask_id=world.MASK, vocab_size=toy_world.VOCAB, low=0.05, is_stratified=False
    ),
)


def check(folders: dict[str, pathlib.Path], root: pathlib.Path) -> dict[str, dict[str, float]]:
    """Variances of dB for each reference; the policy is the model of that name.

    Args:
      folders: "policy" and references; "near", the policy after a small step, is added.
      root: of the data.
    """
    with jax.set_mesh(sharding.make_mesh()):
        models = {name: measure.load(folder) for name, folder in folders.items()}
        policy = models.pop("policy")
        rng = np.random.default_rng(7)

        def moved(x: jax.Array) -> jax.Array:
            step = rng.standard_normal(x.shape).astype(np.float32)
            return x + NEAR_STEP * jnp.std(x) * jax.device_put(step, x.sharding)

        models["near"] = jax.tree.map(moved, policy)
        batch = measure.put(measure.batches(root, "heldout_copy", rows=NUM_ROWS)[0])
        return {name: variances(policy, model, batch) for name, model in models.items()}


def variances(
    policy: transformer.LLaDA2, reference: transformer.LLaDA2, batch: objective.Batch
) -> dict[str, float]:
    """Mean over rows of the variance of dB, and how policy and reference go together."""
    found: dict[str, list[np.ndarray]] = {}
    pairs: list[np.ndarray] = []
    for repeat in range(NUM_REPEATS):
        # Draws of a level, and of masks at that level, for two models that do not share them.
        draws = [[100 * repeat + 50 * side + i for i in range(BUDGET)] for side in (0, 1)]
        bounds = {
            (name, side): np.array([row_bounds(model, batch, d, d) for d in draws[side]])
            for name, model in (("policy", policy), ("reference", reference))
            for side in (0, 1)
        }
        same_level = [
            np.array([row_bounds(model, batch, own[0], d) for d in own])
            for model, own in ((policy, draws[0]), (reference, draws[1]))
        ]
        one, shared, other = bounds["policy", 0], bounds["reference", 0], bounds["reference", 1]
        for name, difference in {
            "independent": one[0] - other[0],
            "shared": one[0] - shared[0],
            "independent_n_levels": (one - other).mean(axis=0),
            "independent_n_masks": (same_level[0] - same_level[1]).mean(axis=0),
            "shared_n_levels": (one - shared).mean(axis=0),
        }.items():
            found.setdefault(name, []).append(difference)
        pairs.append(np.stack([one[0], shared[0]]))
    centred = np.stack(pairs, axis=1) - np.mean(pairs, axis=0)[:, None]
    correlation = np.corrcoef(centred[0].ravel(), centred[1].ravel())[0, 1]
    spread = {n: float(np.var(d, axis=0, ddof=1).mean()) for n, d in found.items()}
    return spread | {"correlation": float(correlation)}


@jax.jit
def row_bounds(
    model: transformer.LLaDA2, batch: objective.Batch, level: jax.Array, mask: jax.Array
) -> jax.Array:
    """A draw of the bound on the log-likelihood of each row, with a level per document, [B]."""
    keys = [jax.random.fold_in(jax.random.key(i), draw) for i, draw in enumerate((level, mask))]
    is_target = batch.is_target & (batch.segments != 0)
    starts = noise.block_starts(batch.segments, batch.positions, None)
    levels = noise.noise_levels(keys[0], is_target, starts, batch.example_ids, GOAL.noise)
    is_masked = noise.hidden(jax.random.uniform(keys[1], levels.shape), levels, is_target)
    corruption = noise.Corruption(
        level=levels,
        is_masked=is_masked,
        tokens=jnp.where(is_masked, jnp.int32(world.MASK), batch.tokens),
        is_replaced=jnp.zeros_like(is_masked),
        is_kept=jnp.zeros_like(is_masked),
        row_keys=noise.row_keys(keys[1], batch.example_ids),
    )
    noised = GOAL.assemble(batch, corruption)
    return -jnp.sum(noised.weights * exactness.token_nll(model, noised), axis=1)
