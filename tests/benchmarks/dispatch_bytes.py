"""Bytes that each way of sending tokens to experts moves, from programs compiled for TPU chips.

    python tests/benchmarks/dispatch_bytes.py --slice v5e:2x4 --tokens 4096

One mixture-of-experts layer of a preset, forward, its experts over all chips of the slice.
Prints one JSON object per algorithm: bytes sent per token, by all chips together along rings; what
the algorithm's own arithmetic needs, without indices, weights and room in buffers; and their ratio.
Where an uneven load takes several rounds, one is counted. Needs the `tpu` extra, and no TPU.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp

from llada_jax import config, sharding
from llada_jax.ops import expert_parallel
from llada_jax.plan import collectives, compiled, hardware, traffic


def compile_layer(
    algorithm: str, cfg: config.ModelConfig, mesh: jax.sharding.Mesh, tokens: int
) -> compiled.Compiled:
    """The layer's experts on `tokens` tokens per chip."""
    rules = sharding.serve_rules(splits_rows=algorithm != "replicated")
    rows, embed, inner = mesh.size, cfg.hidden_size, cfg.moe_intermediate_size

    def array(shape, dtype, *axes):
        placed = jax.NamedSharding(mesh, rules.spec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    by_row = functools.partial(array, (rows, tokens, cfg.num_experts_per_tok))
    into = array((cfg.num_experts, embed, inner), jnp.bfloat16, "expert", None, "mlp")
    out_of = array((cfg.num_experts, inner, embed), jnp.bfloat16, "expert", "mlp", None)
    layer = functools.partial(
        expert_parallel.expert_mlp,
        layer=None,
        rules=rules,
        dispatch=expert_parallel.Dispatch(
            algorithm=algorithm, num_groups=cfg.n_group, top_groups=cfg.topk_group
        ),
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda *arrays: layer(*arrays)[0]).lower(
            array((rows, tokens, embed), jnp.bfloat16, "batch", None, None),
            by_row(jnp.int32, "batch", None, None),
            by_row(jnp.float32, "batch", None, None),
            into,
            into,
            out_of,
        )
        return compiled.compile_lowered(lowered, {})


def main() -> None:
    """Compiles the layer with every algorithm asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slice", default="v5e:2x4", help="chips, as in v5p:2x2x2")
    parser.add_argument("--preset", default="mini", choices=("mini", "flash"))
    parser.add_argument("--tokens", type=int, default=4096, help="per chip")
    parser.add_argument(
        "--algorithms",
        nargs="+",
        choices=expert_parallel.ALGORITHMS,
        default=expert_parallel.ALGORITHMS[:5],
    )
    args = parser.parse_args()
    where = hardware.find_slice(args.slice)
    num_chips = len(where.devices)
    mesh = hardware.make_mesh(where, config.MeshConfig(expert=num_chips))
    cfg = config.ModelConfig.preset(args.preset)
    for algorithm in args.algorithms:
        done = compile_layer(algorithm, cfg, mesh, args.tokens)
        assert done.module is not None
        found = collectives.collectives(done.module, dict(mesh.shape))
        first = [c for c in found if not c.unknown_loops]
        sent = sum(c.sent_bytes * c.count for c in first) / args.tokens
        needed = traffic.dispatched(algorithm, cfg, num_chips)
        figures = {
            "algorithm": algorithm,
            "bytes_per_token": round(sent),
            "needed": round(needed),
            "ratio": round(sent / needed, 3),
            "kinds": sorted({c.kind for c in first}),
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
