"""Operations counted from the mask, against the mask itself and against the compiler's count."""

import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import config
from llada_jax.diffusion import masks
from llada_jax.ops import block_mask
from llada_jax.train import flops


@pytest.mark.parametrize("block_length", [1, 4, 32, 0])
@pytest.mark.parametrize("lengths", [(40,), (17, 23, 8), (1, 1, 64)])
def test_pairs_are_those_of_the_mask(lengths, block_length):
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)])[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    if block_length:
        tags = masks.block_diffusion(jnp.asarray(segments), jnp.asarray(positions), block_length)
    else:
        tags = masks.masked_diffusion(jnp.asarray(segments))
    wanted = int(block_mask.dense(tags).sum())
    got = flops.allowed_pairs(np.array(lengths), block_length, has_clean_half=bool(block_length))
    assert got == wanted


def test_autoregressive_pairs_are_a_triangle():
    assert flops.allowed_pairs(np.array([5, 3]), 1, has_clean_half=False) == 15 + 6


@pytest.mark.parametrize(("preset", "active"), [("mini", 0.789e9), ("flash", 4.86e9)])
def test_body_parameters_are_the_published_active_ones(preset, active):
    # The published counts leave the embedding and the head out (training notes of the family).
    got = flops.body_parameters(config.ModelConfig.preset(preset))
    assert got == pytest.approx(active, rel=5e-3)
