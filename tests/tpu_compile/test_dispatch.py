"""What tokens send on their way to experts and back, in programs compiled for TPU slices."""

import pytest

from llada_jax import config
from llada_jax.plan import collectives, hardware, traffic
from tests.benchmarks import dispatch_bytes

pytestmark = [pytest.mark.tpu_compile, pytest.mark.timeout(900)]


def sent(algorithm, topology, preset, tokens):
    """Bytes of a chip by kind of collective, over what the algorithm needs; first rounds only."""
    where = hardware.find_slice(topology)
    cfg, ranks = config.ModelConfig.preset(preset), len(where.devices)
    mesh = hardware.make_mesh(where, config.MeshConfig(expert=ranks))
    result = dispatch_bytes.compile_layer(algorithm, cfg, mesh, tokens)
    assert result.module is not None
    needed = tokens * traffic.dispatched(algorithm, cfg, ranks)
    shares: dict[str, float] = {}
    for c in collectives.collectives(result.module, dict(mesh.shape)):
        if not c.unknown_loops:
            shares[c.kind] = shares.get(c.kind, 0) + c.sent_bytes * c.count / needed
    return shares


@pytest.mark.parametrize(
    ("algorithm", "topology", "preset", "tokens", "kinds"),
    [
        ("all_gather", "v5e:2x4", "mini", 512, {"all-gather", "reduce-scatter"}),
        ("all_gather_exchange", "v5p:2x2x4", "flash", 32, {"all-gather", "all-to-all"}),
        ("group_aligned", "v5e:2x4", "mini", 4096, {"all-to-all"}),
    ],
)
def test_a_dispatch_sends_what_it_needs(algorithm, topology, preset, tokens, kinds):
    shares = sent(algorithm, topology, preset, tokens)
    assert {kind for kind, share in shares.items() if share > 0.01} == kinds
    assert 0.99 < sum(shares.values()) <= 1.2


def test_a_slice_of_three_dimensions_has_no_reduce_scatter():
    """Why there is `all_gather_exchange`; where this fails, the compiler has learnt it."""
    shares = sent("all_gather", "v5p:2x2x4", "flash", 32)
    assert {kind for kind, share in shares.items() if share > 0.01} == {"all-gather", "all-reduce"}
