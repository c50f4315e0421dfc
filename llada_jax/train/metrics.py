"""Where a run's figures go: a jsonl file, TensorBoard, and a line on the console."""

import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Writes metrics, named `group/name`, from the first process; the others write nothing.

    Args:
      folder: the run's; files are appended to.
      first_step: the step the run goes on from. What an interrupted run wrote past it is dropped,
        so that no step stands twice.
      tensorboard: whether to write TensorBoard files too.
    """

    def __init__(self, folder: pathlib.Path, *, first_step: int, tensorboard: bool):
        self._file, self._board = None, None
        if jax.process_index():
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if path.exists():
            _drop_after(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(
                str(folder / "tensorboard"), purge_step=first_step + 1
            )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics after `step` steps; arrays become lists."""
        if self._file is None:
            return
        plain = {name: _plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **plain}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in plain.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
                elif isinstance(value, str):
                    self._board.add_text(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's jsonl file."""
    text = (folder / METRICS_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _drop_after(path: pathlib.Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue  # the line that a killed run was writing
    partial = path.with_name(path.name + ".incomplete")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool):
        return value
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else array.tolist()


class Clock:
    """Wall time of a run, and the share of it that trained.

    Args:
      trained_seconds: of earlier stretches of the run.
      wall_seconds: likewise.
    """

    def __init__(self, *, trained_seconds: float = 0.0, wall_seconds: float = 0.0):
        self.trained_seconds = trained_seconds
        self._earlier = wall_seconds
        self._start = time.monotonic()

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run began, those between its stretches left out."""
        return self._earlier + time.monotonic() - self._start

    @property
    def goodput(self) -> float:
        """Share of the wall time spent in steps: not starting, compiling, saving, evaluating."""
        return self.trained_seconds / max(self.wall_seconds, 1e-9)


def log_line(
    step: int, num_steps: int, phase: str, metrics: Mapping[str, Any], tokens_per_second: float
) -> None:
    """One line for whoever watches."""
    seconds_left = metrics["time/seconds_left"]
    left = time.strftime("%H:%M:%S", time.gmtime(seconds_left))
    if seconds_left >= 86400:
        left = f"{int(seconds_left // 86400)}d {left}"
    mfu = f"mfu {metrics['time/mfu']:.1%}  " if "time/mfu" in metrics else ""
    logging.info(
        "step %d/%d %s  loss %.4f  nll %.4f  grad %.3g  lr %.3g  %.0f tokens/s  %sload %.2f  "
        "left %s",
        step,
        num_steps,
        phase,
        metrics["train/loss"],
        metrics["train/masked_nll"],
        metrics["train/grad_norm"],
        metrics["train/learning_rate"],
        tokens_per_second,
        mfu,
        metrics.get("router/max_over_mean_load", 0.0),
        left,
    )
