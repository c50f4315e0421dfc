"""The likelihood bound on held-out text, inside a run and on its own.

Noise and batches are the same at every evaluation, so that a curve shows the model and not the
draws; several draws per batch make the estimate steady.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llada_jax.diffusion import objective
from llada_jax.train import options
from llada_jax.train import step as step_lib

# A key of its own: no training step may share noise with an evaluation.
_SEED = 0x5EED


class Evaluator:
    """Estimates the bound of several objectives on the same batches.

    Args:
      opts: of the evaluation.
      batches: held-out rows, on the devices.
      goals: an objective for each of `opts.block_lengths`.
      graph: the model's structure.
      dtype: of the computation.
      loss: for the size of the cross entropy's chunks.
      num_draws: draws of noise per batch.
    """

    def __init__(
        self,
        opts: options.EvalOptions,
        *,
        batches: Sequence[objective.Batch],
        goals: Sequence[objective.Objective],
        graph: Any,
        dtype: str,
        loss: options.LossOptions,
        num_draws: int = 2,
    ):
        self._opts, self._batches, self._goals = opts, batches, goals
        self._num_draws = num_draws
        chunks = options.LossOptions(chunk_tokens=loss.chunk_tokens)
        self._step = jax.jit(
            functools.partial(eval_step, graph=graph, dtype=dtype, loss=chunks),
            static_argnames=("goal",),
        )

    def __call__(self, params: Any, rest: Any) -> dict[str, float]:
        """Nats per target token, by the name of the metric."""
        found: dict[str, float] = {}
        for length, goal in zip(self._opts.block_lengths, self._goals, strict=True):
            total, count = 0.0, 0
            for draw in range(self._num_draws):
                key = jax.random.fold_in(jax.random.key(_SEED), draw)
                for batch in self._batches:
                    nll, targets = jax.device_get(self._step(params, rest, key, batch, goal=goal))
                    total, count = total + float(np.float64(nll)), count + int(targets)
            found[f"eval/bound_{length or 'full'}"] = total / max(count, 1)
        return found


def eval_step(
    params: Any,
    rest: Any,
    key: jax.Array,
    batch: objective.Batch,
    *,
    graph: Any,
    goal: objective.Objective,
    dtype: str,
    loss: options.LossOptions,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the weighted negative log-likelihood over a batch, and its target tokens."""
    noised = goal.prepare(key, batch)
    model = step_lib.build_model(graph, params, rest, dtype)
    terms = step_lib.part_terms(model, noised, loss)
    return terms.sums.nll_sum, terms.sums.num_targets
