"""The sampling programs compile for TPU slices, ahead of time, by the real compiler."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from llada_jax import config, sharding
from llada_jax.diffusion import sampler, unmask
from llada_jax.generate import generator
from llada_jax.model import cache as kv_cache
from llada_jax.model import transformer

pytestmark = [pytest.mark.tpu_compile, pytest.mark.timeout(600)]
RULES = sharding.SERVE_RULES


@functools.cache
def topology(name: str):
    """Devices of a slice; the compiler needs neither metadata servers nor the library's lock."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def lowered_programs(preset: str, slice_name: str, mesh_text: str, batch: int, capacity: int):
    """Lowers prefill (512 tokens) and decode_block; yields name, lowered, bytes of the cache."""
    cfg = config.ModelConfig.preset(preset)
    mesh_config = config.MeshConfig.parse(mesh_text)
    sharding.check_fits(mesh_config, cfg, sharding.SERVE_RULES)
    mesh = sharding.make_mesh(mesh_config, topology(slice_name).devices)

    def array(shape, dtype, *axes):
        placed = jax.sharding.NamedSharding(mesh, RULES.spec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    with jax.set_mesh(mesh):
        model = transformer.abstract_model(cfg, RULES)
        axes = ("layers", "batch", "length", "kv_heads", "head_dim")
        shape = (cfg.num_hidden_layers, batch, capacity, cfg.num_key_value_heads, cfg.head_dim)
        entry = array(shape, jnp.dtype(cfg.dtype), *axes)
        row = functools.partial(array, (batch,))
        cache = kv_cache.KVCache(key=entry, value=entry, length=row(jnp.int32, "batch"))
        number = row(jnp.float32, "batch")
        count = row(jnp.int32, "batch")
        flag = row(jnp.bool_, "batch")
        rows = sampler.Rows(
            prompt_length=count,
            end=count,
            eos_ids=array((batch, 4), jnp.int32, "batch", None),
            eos_early_stop=flag,
            strategy=unmask.JointThreshold(
                threshold=number,
                editing_threshold=number,
                max_post_steps=count,
                num_to_transfer=count,
            ),
            sampling=unmask.Sampling(
                temperature=number, top_k=count, top_p=number, seed=row(jnp.uint32, "batch")
            ),
        )
        block = array((batch, 32), jnp.int32, "batch", None)
        chunk = array((batch, 512), jnp.int32, "batch", None)
        mask_id = array((), jnp.int32)
        shards = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["tensor"]
        cache_bytes = 2 * entry.size * entry.dtype.itemsize // shards
        yield (
            "prefill",
            generator._prefill.lower(model, chunk, count, cache, block_length=32),
            cache_bytes,
        )
        yield (
            "decode_block",
            generator._decode_block.lower(
                model, block, count, flag, rows, cache, mask_id, history_steps=0
            ),
            cache_bytes,
        )


@pytest.mark.parametrize(
    ("preset", "slice_name", "mesh_text", "batch", "capacity", "limit_gib"),
    [
        ("tiny", "v5e:2x4", "1,1,4,2", 4, 1024, 1),
        ("mini", "v5p:2x2x1", "1,1,4,1", 16, 4096, 95),
    ],
)
def test_programs_compile_fit_and_reuse_the_cache(
    preset, slice_name, mesh_text, batch, capacity, limit_gib
):
    names = []
    for name, lowered, cache_bytes in lowered_programs(
        preset, slice_name, mesh_text, batch, capacity
    ):
        memory = lowered.compile().memory_analysis()
        # The cache comes in donated and goes out in the same buffers.
        assert memory.alias_size_in_bytes >= cache_bytes, name
        assert memory.peak_memory_in_bytes < limit_gib * 2**30, name
        print(f"{preset} {slice_name} {name}: peak {memory.peak_memory_in_bytes / 2**30:.2f} GiB")
        names.append(name)
    assert names == ["prefill", "decode_block"]
