"""Runs of several processes equal those of one, with the same data."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llada_jax.train import metrics
from tests.train import kill_many

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 4


def run(folder, config, name, *, processes):
    """A run of that many processes, four devices together."""
    workdir = folder / name
    command = [str(ROOT / "launch/local_pod.sh"), str(processes), str(DEVICES // processes)]
    command += [sys.executable, "-m", "llada_jax.cli.train"]
    command += [f"--config={config}", f"--workdir={workdir}"]
    env = os.environ | {
        "XLA_FLAGS": kill_many.QUICK_COMPILES,
        "LOCAL_POD_LOGS": str(folder / f"{name}_logs"),
    }
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_as_one_does(tmp_path, processes):
    mesh = {"data": 2, "expert": 2} if processes == 2 else {"data": 2, "fsdp": 2}
    config = kill_many.write_config(tmp_path, steps=4, mesh=mesh)
    alone = run(tmp_path, config, "alone", processes=1)
    several = run(tmp_path, config, "several", processes=processes)
    pairs = zip(metrics.read_metrics(alone), metrics.read_metrics(several), strict=True)
    for one, other in pairs:
        for name in ("train/loss", "train/grad_norm", "train/target_tokens", "data/waste"):
            np.testing.assert_allclose(other[name], one[name], rtol=1e-5, err_msg=name)
        assert other["router/load"] == one["router/load"]
    tensors = [kill_many.final_tensors(w, w.with_name(f"{w.name}_hf")) for w in (alone, several)]
    for key, wanted in tensors[0].items():
        # AdamW's first steps are signs of gradients: rounding shows where one is nearly 0.
        np.testing.assert_allclose(tensors[1][key], wanted, atol=5e-4, err_msg=key)


def test_a_process_that_fails_ends_the_others(tmp_path):
    script = tmp_path / "worker.sh"
    script.write_text('[ "$LLADA_PROCESS_ID" = 1 ] && exit 7\nsleep 60\n')
    command = [str(ROOT / "launch/local_pod.sh"), "3", "1", "bash", str(script)]
    env = os.environ | {"LOCAL_POD_LOGS": str(tmp_path / "logs")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 7
    assert "status 7" in done.stderr
