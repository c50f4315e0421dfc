"""A profile of a few steps of a run, for TensorBoard or Perfetto."""

import jax

from llada_jax import storage
from llada_jax.train import options

FOLDER = "profile"


class Profile:
    """Traces the steps of the configured window, as far as this process takes them.

    A run that resumes inside the window traces what is left of it, one that resumes past it traces
    nothing; one that ends inside the window keeps the steps it took.

    Args:
      folder: the run's; traces go to its `profile`.
      opts: the window.
    """

    def __init__(self, folder: storage.Folder, opts: options.LogOptions):
        self._folder = folder / FOLDER
        first = opts.profile_first_step
        self._window = range(0) if first is None else range(first, first + opts.profile_steps)
        self._is_running = False

    def before(self, step: int) -> None:
        """Called before a step, counted from 0, is dispatched."""
        if step in self._window and not self._is_running:
            jax.profiler.start_trace(str(self._folder))
            self._is_running = True

    def ends_with(self, step: int) -> bool:
        """Whether a step is the last that is traced."""
        return self._is_running and step + 1 not in self._window

    def after(self, step: int) -> None:
        """Called when a step is dispatched, and is computed if it is the last that is traced."""
        if self.ends_with(step):
            self.close()

    def close(self) -> None:
        """Ends the trace where one is running."""
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
