"""The programs of a run, traced with real shapes for devices that need not be there.

They are the jitted functions that `Generator` and `llada-train` run. Arrays are shapes, types and
shardings only, so a model of any size takes no memory here.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax import config, sharding
from llada_jax.diffusion import objective
from llada_jax.generate import batching, request
from llada_jax.generate import programs as sampling_programs
from llada_jax.model import cache as kv_cache
from llada_jax.model import transformer
from llada_jax.ops import grouped_matmul
from llada_jax.plan import traffic
from llada_jax.train import architecture, flops, goals, optimizer, options
from llada_jax.train import state as state_lib
from llada_jax.train import step as step_lib

SAMPLING = ("prefill", "denoise_block", "commit_block")
NAMES = ("train_step", *SAMPLING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A traced program and what is known of it before it is compiled.

    Attributes:
      name: one of `NAMES`.
      lowered: ready to compile.
      num_parameters: of the model.
      sizes: what the shapes follow from, for the report.
      argument_bytes: of one device's arguments, by what they are.
      work: operations that the model needs, see `train.flops`; forward only where it samples.
      model_flops: of the whole step, over all devices.
      tokens: that a step works on, over all devices.
      hbm_bytes: that a device must read and write, by what it is, see `traffic`.
      expected_bytes: of temporaries that are known beforehand, on one device.
    """

    name: str
    lowered: Any
    num_parameters: int
    sizes: dict[str, Any]
    argument_bytes: dict[str, int]
    work: flops.StepFlops
    model_flops: float
    tokens: int
    hbm_bytes: dict[str, float]
    expected_bytes: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSizes:
    """Shapes of a program of sampling.

    Attributes:
      batch: rows.
      cache_tokens: positions that the cache holds for a row.
      chunk_tokens: positions per forward pass of prefill.
      block_length: tokens per block; None takes the model's.
      strategy: name of the rule that accepts tokens, see `generate.request`.
    """

    batch: int = 16
    cache_tokens: int = 4096
    chunk_tokens: int = 512
    block_length: int | None = None
    strategy: str = "fixed"


def sampling_model(cfg: config.ModelConfig, platform: str) -> transformer.LLaDA2:
    """The model as `Generator.from_pretrained` builds it on such devices; needs `jax.set_mesh`."""
    return transformer.abstract_model(
        cfg,
        sharding.SERVE_RULES,
        grouped_matmul=grouped_matmul.default_implementation(platform),
    )


def sampling_program(
    name: str, cfg: config.ModelConfig, mesh: jax.sharding.Mesh, sizes: SamplingSizes
) -> Program:
    """Traces a program of sampling.

    Raises:
      ValueError: sizes do not fit the model or the mesh.
    """
    job = batching.Job(
        0,
        (0,),
        request.SamplingParams.create(
            strategy=sizes.strategy, block_length=sizes.block_length
        ).resolve(cfg),
    )
    block = job.block_length
    _check_sampling(sizes, cfg, mesh, block)
    rules = sharding.SERVE_RULES
    with jax.set_mesh(mesh):
        model = sampling_model(cfg, mesh.devices.flat[0].platform)
        cache = on_mesh(
            jax.eval_shape(
                lambda: kv_cache.init_cache(
                    cfg,
                    rules,
                    batch=sizes.batch,
                    capacity_tokens=sizes.cache_tokens,
                    dtype=cfg.dtype,
                )
            )
        )

        def rows(tree: Any) -> Any:
            return on_mesh(tree, lambda x: rules.spec("batch", *[None] * (x.ndim - 1)))

        length = sizes.chunk_tokens if name == "prefill" else block
        tokens = rows(np.zeros((sizes.batch, length), np.int32))
        start = rows(np.zeros((sizes.batch,), np.int32))
        is_active = rows(np.zeros((sizes.batch,), bool))
        batch = rows(batching.host_rows([job], sizes.batch))
        if name == "prefill":
            lowered = sampling_programs.prefill.lower(
                model, tokens, start, cache, block_length=block
            )
        elif name == "commit_block":
            lowered = sampling_programs.commit_block.lower(model, tokens, start, cache)
        elif name == "denoise_block":
            mask_id = on_mesh(np.zeros((), np.int32), lambda _: jax.P())
            lowered = sampling_programs.denoise_block.lower(
                model, tokens, start, is_active, batch, cache, mask_id, history_steps=0
            )
        else:
            raise ValueError(f"program {name!r} is not one of {SAMPLING}")
    num_tokens = sizes.batch * length
    before = sizes.cache_tokens - length
    own = flops.allowed_pairs(np.asarray([length]), block, has_clean_half=False)
    work = flops.step_flops(
        cfg,
        input_tokens=num_tokens,
        predicted_tokens=num_tokens if name == "denoise_block" else 0,
        pairs=sizes.batch * (length * before + own),
    )
    return Program(
        name=name,
        lowered=lowered,
        num_parameters=_num_parameters(model),
        sizes={
            "batch": sizes.batch,
            "tokens_per_row": length,
            "cache_tokens": sizes.cache_tokens,
            "block_length": block,
            "dtype": cfg.dtype,
        },
        argument_bytes={"parameters": device_bytes(model), "cache": device_bytes(cache)},
        work=work,
        model_flops=work.forward,
        tokens=num_tokens,
        hbm_bytes=traffic.sampling(
            model,
            cfg,
            weights=device_bytes,
            cache_bytes=device_bytes(cache),
            device_tokens=math.prod(tokens.sharding.shard_shape(tokens.shape)),
            written_share=0 if name == "denoise_block" else length / sizes.cache_tokens,
            logits_bytes=_logits_bytes(cfg, tokens) if name == "denoise_block" else 0,
        ),
        expected_bytes={},
    )


def training_program(
    cfg: options.TrainConfig, mesh: jax.sharding.Mesh, *, phase: str | None = None
) -> Program:
    """Traces the step of a training run.

    Args:
      cfg: the run.
      mesh: devices; `cfg.mesh` is not looked at.
      phase: name of the phase; by default the one with the most steps.

    Raises:
      ValueError: the configuration contradicts itself or the mesh.
    """
    chosen = _phase(cfg, phase)
    model_cfg, tokenizer = architecture.with_tokenizer(cfg.model)
    goal = goals.goal_of(chosen, cfg.noise, model_cfg, tokenizer)
    first_step = sum(p.steps for p in cfg.phases[: cfg.phases.index(chosen)])
    length = cfg.data.packing.row_length
    with jax.set_mesh(mesh):
        model = architecture.abstract_model(
            model_cfg, cfg.compute, platform=mesh.devices.flat[0].platform
        )
        made = optimizer.make_optimizer(cfg.optimizer, cfg.router)
        state = state_lib.abstract_state(model_cfg, made)
        shape = (cfg.batch_size, length)
        ids = np.broadcast_to(np.int32(0), shape)
        batch = on_mesh(
            objective.Batch(
                tokens=ids,
                segments=ids,
                positions=ids,
                is_target=np.broadcast_to(np.bool_(False), shape),
                example_ids=np.zeros(cfg.batch_size, np.int32),
            ),
            lambda _: model.rules.spec("batch"),
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        number = jax.ShapeDtypeStruct((), jnp.float32)
        inputs = on_mesh(
            step_lib.StepInputs(
                key=key,
                learning_rate=number,
                embedding_noise=number,
                is_watched=jax.ShapeDtypeStruct((), jnp.bool_),
            ),
            lambda _: jax.P(),
        )
        program = step_lib.jit_step(
            cfg, model_cfg.num_experts_per_tok, state_lib.split_model(model)[0], made
        )
        lowered = program.lower(
            state,
            batch,
            inputs,
            goal=goal,
            has_embedding_noise=goals.embedding_noise(cfg, first_step) > 0,
        )
        whole = transformer.abstract_model(model_cfg.replace(dtype=cfg.compute.dtype), _WHOLE)
    has_clean, block = goals.mask_shape(chosen)
    copies = goals.copies(goal)
    tokens = cfg.batch_size * length
    work = flops.step_flops(
        model_cfg,
        input_tokens=copies * (2 if has_clean else 1) * tokens,
        predicted_tokens=copies * tokens,
        # Documents as long as rows: the most pairs that packing can give.
        pairs=copies
        * flops.allowed_pairs(np.full(cfg.batch_size, length), block, has_clean_half=has_clean),
    )
    device_rows = batch.tokens.sharding.shard_shape(shape)[0] / cfg.accumulation
    device_tokens = device_rows * copies * (2 if has_clean else 1) * length
    expected: dict[str, float] = {"gradients": device_bytes(state.params)}
    saved = traffic.saved_activations(model_cfg, cfg.compute, device_tokens)
    if saved is not None:
        expected["saved activations"] = saved
    return Program(
        name="train_step",
        lowered=lowered,
        num_parameters=_num_parameters(model),
        sizes={
            "batch": cfg.batch_size,
            "accumulation": cfg.accumulation,
            "row_length": length,
            "phase": chosen.name,
            "objective": chosen.objective,
            "block_length": chosen.block_length,
            "remat": cfg.compute.remat,
            "attention": cfg.compute.attention,
            "dtype": cfg.compute.dtype,
        },
        argument_bytes={
            "parameters": device_bytes(state.params),
            "optimizer": device_bytes(state.opt_state),
            "routers' biases": device_bytes(state.rest),
            "batch": device_bytes(batch),
        },
        work=work,
        model_flops=work.train,
        tokens=tokens,
        hbm_bytes=traffic.training(
            state_bytes=device_bytes(state.params),
            weight_bytes=device_bytes(whole),
            saved_bytes=saved or 0.0,
            compute=cfg.compute,
            accumulation=cfg.accumulation,
        ),
        expected_bytes=expected,
    )


# Parameters as a layer multiplies them: training shares them over `embed`, and gathers that.
_WHOLE = dataclasses.replace(sharding.TRAIN_RULES, embed=None)


def on_mesh(tree: Any, spec_of: Any = lambda x: x.sharding.spec) -> Any:
    """Shapes and types of a tree, placed on the current mesh's devices."""
    mesh = jax.sharding.get_mesh()

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        placed = jax.sharding.NamedSharding(mesh, spec_of(leaf))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    return jax.tree.map(one, tree)


def device_bytes(tree: Any) -> int:
    """Bytes of one device's part of placed arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _num_parameters(model: transformer.LLaDA2) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def _logits_bytes(cfg: config.ModelConfig, tokens: jax.ShapeDtypeStruct) -> int:
    logits = on_mesh_like(tokens, (*tokens.shape, cfg.vocab_size))
    return device_bytes(logits)


def on_mesh_like(tokens: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Float32 logits of tokens, split over rows and the vocabulary."""
    spec = sharding.SERVE_RULES.spec("batch", None, "vocab")
    placed = jax.sharding.NamedSharding(tokens.sharding.mesh, spec)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)


def _check_sampling(
    sizes: SamplingSizes, cfg: config.ModelConfig, mesh: jax.sharding.Mesh, block: int
) -> None:
    config.MeshConfig(**dict(mesh.shape)).validate(cfg)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if sizes.batch < 1 or sizes.batch % shards:
        raise ValueError(
            f"batch: {sizes.batch} rows do not divide among data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} of the mesh; choose a multiple of {shards}, or another mesh"
        )
    for name in ("cache_tokens", "chunk_tokens"):
        value = getattr(sizes, name)
        if value < block or value % block:
            raise ValueError(f"{name}: {value} is not a multiple of the block's {block} tokens")
    if sizes.chunk_tokens > sizes.cache_tokens:
        raise ValueError(
            f"chunk_tokens: {sizes.chunk_tokens} is more than cache_tokens {sizes.cache_tokens}"
        )
    if sizes.cache_tokens > cfg.max_position_embeddings:
        raise ValueError(
            f"cache_tokens: {sizes.cache_tokens} is more than the model's "
            f"max_position_embeddings {cfg.max_position_embeddings}"
        )


def _phase(cfg: options.TrainConfig, name: str | None) -> options.Phase:
    if name is None:
        return max(cfg.phases, key=lambda phase: phase.steps)
    for phase in cfg.phases:
        if phase.name == name:
            return phase
    raise ValueError(f"phase {name!r} is not one of {[phase.name for phase in cfg.phases]}")
