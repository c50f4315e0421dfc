"""Processes that share a mesh, as in a training run that samples, get what one gets."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from llada_jax import generate
from tests.train import kill_many

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5]]
WORKER = """
import json, os, sys
import jax
count, number = (int(os.environ[f"LLADA_{name}"]) for name in ("NUM_PROCESSES", "PROCESS_ID"))
jax.distributed.initialize(os.environ["LLADA_COORDINATOR"], count, number)
from llada_jax import generate
generator = generate.Generator.from_pretrained(sys.argv[1], mesh="2,1,1,1")
answers = generator.generate(json.loads(sys.argv[2]), gen_length=8, block_length=8)
open(f"{sys.argv[3]}/{number}.json", "w").write(json.dumps([a.token_ids for a in answers]))
"""


@pytest.mark.long
def test_rows_of_other_processes_are_read(golden, tmp_path):
    model = str(golden / "llada2_tiny_f32")
    command = [str(ROOT / "launch/local_pod.sh"), "2", "1", sys.executable, "-c", WORKER]
    command += [model, json.dumps(PROMPTS), str(tmp_path)]
    env = os.environ | {
        "XLA_FLAGS": kill_many.QUICK_COMPILES,
        "LOCAL_POD_LOGS": str(tmp_path / "logs"),
    }
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    alone = generate.Generator.from_pretrained(model)
    answers = alone.generate(PROMPTS, gen_length=8, block_length=8)
    wanted = [list(answer.token_ids) for answer in answers]
    for number in (0, 1):
        assert json.loads((tmp_path / f"{number}.json").read_text()) == wanted
