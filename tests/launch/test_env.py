"""env.sh: exactly these flags per generation, each with its reason."""

import re
import subprocess

import pytest

from tests.launch.conftest import LAUNCH

RAGGED = "--xla_tpu_enable_ragged_dot_kernel=true"
ALL_REDUCE = "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true"
SLICES = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
FLAGS = {
    "v5p": (),
    "v5e": (RAGGED, ALL_REDUCE),
    "v6e": (RAGGED,),
    "v5p multislice": SLICES,
    "v5e multislice": (RAGGED, ALL_REDUCE, *SLICES),
    "v6e multislice": (RAGGED, *SLICES),
}


def bash(script: str, before: str = "", status: int = 0):
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=LAUNCH,
        env={"PATH": "/usr/bin:/bin"} | ({"LIBTPU_INIT_ARGS": before} if before else {}),
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.parametrize("arguments", FLAGS)
def test_sourced_it_exports_the_flags(arguments):
    show = "set -eu; source env.sh {}; env | grep ^LIBTPU_INIT_ARGS=; echo $-"
    value, options = bash(show.format(arguments)).stdout.splitlines()
    assert value == f"LIBTPU_INIT_ARGS={' '.join(FLAGS[arguments])}"
    assert "u" in options


def test_shell_options_stay_as_they_are():
    assert bash("before=$-; source env.sh v5e; [ $- = $before ] && echo same").stdout == "same\n"


def test_what_was_set_before_comes_last_and_a_second_time_changes_nothing():
    show = 'source env.sh v6e; source env.sh v6e; echo "$LIBTPU_INIT_ARGS"'
    assert bash(show, before="--a=1 --b=2").stdout == f"{RAGGED} --a=1 --b=2\n"
    assert bash(show.replace("v6e", "v5p"), before="--a=1").stdout == "--a=1\n"


def test_dry_run_prints_the_export_and_sets_nothing():
    line = f"export LIBTPU_INIT_ARGS='{RAGGED} {ALL_REDUCE}'\n"
    assert bash("./env.sh --dry-run v5e").stdout == line
    shown = bash('source env.sh --dry-run v5e; echo "${LIBTPU_INIT_ARGS-unset}"').stdout
    assert shown == f"{line}unset\n"


@pytest.mark.parametrize("arguments", ["v4", "", "'v5p '", "v5p v6e"])
def test_another_generation_is_refused(arguments):
    done = bash(f"set -e; source env.sh {arguments}; echo not reached", status=2)
    assert done.stdout == ""
    assert re.match(r"error: env\.sh: found .*, expected .*; name", done.stderr)


def test_run_as_a_command_it_says_how_to_source_it():
    assert "write: source launch/env.sh v5e" in bash("./env.sh v5e", status=2).stderr


def test_every_flag_has_a_reason_and_a_source_above_it():
    lines = (LAUNCH / "env.sh").read_text().splitlines()
    flags = [i for i, line in enumerate(lines) if re.match(r"\s*flags\+=\(--\S+\)$", line)]
    assert {line for i in flags for line in re.findall(r"--\w+=\w+", lines[i])} == {
        flag for values in FLAGS.values() for flag in values
    }
    assert len([line for line in lines if "--xla" in line]) == len(flags)
    for i in flags:
        comment = []
        while lines[(i := i - 1)].strip().startswith("#"):
            comment.insert(0, lines[i].strip())
        assert comment[0].startswith("# Reason: "), lines[i : i + 6]
        assert any(line.startswith("# Source: ") for line in comment), comment
