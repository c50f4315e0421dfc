"""A small training step compiles for a TPU slice, and its text can be read."""

import pytest

from llada_jax import config
from llada_jax.plan import compiled, hardware, report, training
from llada_jax.train import options, schedule

pytestmark = [pytest.mark.tpu_compile, pytest.mark.timeout(900)]


def test_the_state_is_donated_and_every_axis_is_known():
    phase = options.Phase(
        name="blocks",
        objective="block_diffusion",
        block_length=32,
        steps=1,
        learning_rate=schedule.LearningRate(peak=1e-3, kind="constant"),
    )
    cfg = options.TrainConfig(
        batch_size=8,
        phases=(phase,),
        model=options.ModelOptions(preset="tiny", overrides={"head_dim": 128}),
        data=config.DataConfig(
            sources=(config.SourceConfig(path="nowhere"),),
            packing=config.PackingConfig(row_length=512),
        ),
        mesh=config.MeshConfig(fsdp=2, expert=4),
    )
    where = hardware.find_slice("v5p:2x2x2")
    mesh = hardware.make_mesh(where, cfg.mesh)
    program = training.training_program(cfg, mesh)
    result = compiled.compile_lowered(program.lowered, {})
    figures = report.report(program, result, where, mesh)
    assert figures["hbm"]["fits"]
    kept = ("parameters", "optimizer", "routers' biases")
    assert figures["hbm"]["aliased_bytes"] >= sum(program.argument_bytes[name] for name in kept)
    axes = {row["axes"] for row in figures["collectives"]}
    assert axes
    assert "?" not in axes
    # Gradients of shared weights are scattered; what is summed whole is norms' scales and scalars.
    whole = [
        row
        for row in figures["collectives"]
        if row["kind"] == "all-reduce" and row["axes"] == "fsdp+expert"
    ]
    assert 0 < sum(row["sent_bytes"] for row in whole) < 10_000
    scattered = [row for row in figures["collectives"] if row["kind"] == "reduce-scatter"]
    assert sum(row["count"] for row in scattered) >= 16
    assert figures["program_text"]["estimated_cycles_by_the_compiler"]["cheapest_branches"] > 0
