"""xpk.sh prints, and runs, exactly these xpk commands."""

import pytest

CLUSTER = {"LLADA_GKE_CLUSTER": "lab", "LLADA_TPU_ZONE": "us-east5-a", "LLADA_TPU_TYPE": "v6e-16"}
PLACE = ["--cluster=lab", "--zone=us-east5-a"]
WORKLOAD = ["workload", "create", "--workload", "cpt", "--image", "us/llada:1"]
CREATED = [
    *["xpk", "workload", "create", *PLACE, "--workload=cpt", "--tpu-type=v6e-16"],
    *["--num-slices=1", "--docker-image=us/llada:1", "--max-restarts=10"],
    "--termination-grace-period-seconds=120",
]

COMMANDS = [
    (
        ["cluster", "create"],
        ["xpk", "cluster", "create", *PLACE, "--tpu-type=v6e-16", "--num-slices=1"],
    ),
    (
        [
            *["cluster", "create", "--slices", "2", "--reservation", "mine", "--project", "p"],
            *["--xpk-flag", "--custom-nodepool-arguments=--disk-size=300 --tags=a"],
        ],
        [
            *["xpk", "cluster", "create", *PLACE, "--project=p", "--tpu-type=v6e-16"],
            *["--num-slices=2", "--reservation=mine"],
            "--custom-nodepool-arguments=--disk-size=300 --tags=a",
        ],
    ),
    (["cluster", "delete", "--yes"], ["xpk", "cluster", "delete", *PLACE, "--force"]),
    (
        [*WORKLOAD, "--", "llada-train", "--config", "a b.py"],
        [
            *CREATED,
            "--command=exec /app/launch/worker.sh pod v6e -- llada-train --config 'a b.py'",
        ],
    ),
    (
        [*WORKLOAD, "--storage", "runs", "--spot", "--directory", "/mnt/a b", "--", "llada-train"],
        [
            *[*CREATED, "--storage=runs", "--spot"],
            "--command=exec /app/launch/worker.sh pod v6e --directory '/mnt/a b' -- llada-train",
        ],
    ),
    (["workload", "list"], ["xpk", "workload", "list", *PLACE]),
    (
        ["workload", "delete", "--workload", "cpt", "--yes"],
        ["xpk", "workload", "delete", *PLACE, "--workload=cpt", "--force"],
    ),
]


@pytest.mark.parametrize(("arguments", "command"), COMMANDS)
def test_subcommand_prints_and_runs_one_command(shell, arguments, command):
    dry = [*arguments[:2], "--dry-run", *arguments[2:]]
    assert shell.dry_run("xpk.sh", *dry, **CLUSTER) == [command]
    shell("xpk.sh", *arguments, **CLUSTER)
    assert shell.calls() == [command]


def test_exit_status_of_xpk_is_passed_on(shell):
    shell.answer("xpk", "41")
    shell("xpk.sh", "workload", "list", status=41, **CLUSTER)


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ([], {}, "found subcommand ' '"),
        (["workload", "run"], {}, "found subcommand 'workload run'"),
        (["cluster", "create", "--hue", "1"], {}, "found '--hue'"),
        (["cluster", "create"], {"LLADA_GKE_CLUSTER": ""}, "--cluster is missing"),
        (["cluster", "create"], {"LLADA_TPU_ZONE": ""}, "--zone is missing"),
        (["cluster", "create"], {"LLADA_TPU_TYPE": "h100"}, "--type: found 'h100'"),
        (["cluster", "create", "--spot", "--flex"], {}, "expected at most one"),
        (["cluster", "delete"], {}, "this deletes cluster lab and its workloads; add --yes"),
        (["workload", "delete", "--yes"], {}, "--workload is missing"),
        (["workload", "delete", "--workload", "a"], {}, "this deletes workload a; add --yes"),
        (WORKLOAD[:4], {}, "--image is missing"),
        (WORKLOAD, {}, "no command"),
        ([*WORKLOAD, "--max-restarts", "-1", "--", "a"], {}, "--max-restarts: found '-1'"),
    ],
)
def test_bad_input_is_refused(shell, arguments, changes, message):
    assert message in shell.error("xpk.sh", *arguments, **CLUSTER | changes)
