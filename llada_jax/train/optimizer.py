"""AdamW from optax, without its learning rate, which each step is given as a number."""

from typing import Any

import jax
import optax

from llada_jax.train import options

# Last names of tree paths that hold no matrix, and the table whose rows are looked up.
_NO_MATRIX = ("scale", "bias")
_TABLE = "embed"


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A tree path as names, without those of the containers' own fields."""
    return tuple(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def make_optimizer(
    opts: options.OptimizerOptions, router: options.RouterOptions
) -> optax.GradientTransformation:
    """Clipping, moments and decoupled decay; the caller multiplies by minus the learning rate."""

    def decays(params: Any) -> Any:
        def one(path, leaf):
            names = path_names(path)
            return opts.decay == "all" or not (_TABLE in names or names[-1] in _NO_MATRIX)

        return jax.tree_util.tree_map_with_path(one, params)

    def is_router(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda p, _: "router" in path_names(p), params)

    frozen = optax.masked(optax.set_to_zero(), is_router) if router.is_frozen else optax.identity()
    return optax.chain(
        # A router that is frozen counts neither in the norm nor in the update.
        frozen,
        optax.clip_by_global_norm(opts.clip_norm),
        optax.scale_by_adam(b1=opts.b1, b2=opts.b2, eps=opts.eps),
        optax.add_decayed_weights(opts.weight_decay, mask=decays),
        frozen,
    )
