"""Configurations are read whole or refused by name."""

import dataclasses

import pytest

from llada_jax.train import architecture, goals, loop, options
from tests.train import runs


def build(**changes):
    return options.from_mapping(runs.run_config("somewhere", **changes))


def test_phases_and_rates_follow_the_steps():
    cfg = build()
    assert cfg.num_steps == 10
    assert [cfg.phase_at(s)[0].name for s in (0, 5, 6, 9)] == ["blocks", "blocks"] + ["whole"] * 2
    assert cfg.phase_at(7)[1] == 1
    assert cfg.learning_rate(3) == 3e-3
    with pytest.raises(ValueError, match="after the run's last"):
        cfg.phase_at(10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3, "mesh": {"data": 2}}, "not divisible by 2"),
        ({"batch": 4}, "batch"),
        ({"phases": []}, "needs at least one"),
        ({"optimizer": {"decay": "most"}}, "optimizer.decay"),
        ({"model": {"preset": "tiny", "init_from": "x"}}, "give one"),
        ({"compute": {"dtype": "float8"}}, "compute.dtype"),
        ({"bad_step": {"action": "ignore"}}, "bad_step.action"),
        ({"seed": "one"}, "seed"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_noise_options_go_to_every_objective():
    cfg = build(noise={"low": 0.25, "weighting": "uniform"})
    model = architecture.model_config(cfg.model)
    found = [goals.goal_of(p, cfg.noise, model) for p in cfg.phases]
    assert [g.noise.low for g in found] == [0.25, 0.25]
    assert found[0].block_length == 8
    with pytest.raises(ValueError, match="mask_id: comes from the model"):
        goals.goal_of(cfg.phases[0], {"mask_id": 3}, model)
    with pytest.raises(ValueError, match="noise"):
        goals.goal_of(cfg.phases[0], {"loww": 3}, model)


def test_embedding_noise_falls_from_the_first_masking_step():
    start = options.Phase(name="a", objective="autoregressive", steps=3, learning_rate=runs.RATE)
    loss = options.LossOptions(mask_embedding_noise=2.0, mask_embedding_noise_steps=4)
    cfg = build()
    cfg = dataclasses.replace(cfg, phases=(start, *cfg.phases), loss=loss)
    got = [goals.embedding_noise(cfg, s) for s in range(9)]
    assert got == [0, 0, 0, 2.0, 1.5, 1.0, 0.5, 0, 0]


def test_unknown_overrides_are_refused():
    model = options.ModelOptions(preset="tiny", overrides={"rotary_dim": 8})
    with pytest.raises(ValueError, match=r"model\.overrides: \['rotary_dim'\]"):
        architecture.model_config(model)


def test_a_model_without_a_mask_is_refused(tmp_path):
    cfg = build()
    overrides = {**cfg.model.overrides, "mask_token_id": None}
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, overrides=overrides))
    with pytest.raises(ValueError, match=r"model\.overrides\.mask_token_id"):
        loop.run(cfg, tmp_path / "run")
