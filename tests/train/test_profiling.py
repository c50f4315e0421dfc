"""A profile covers its window, wherever runs begin and end."""

import jax
import pytest

from llada_jax.train import options, profiling


@pytest.fixture
def calls(monkeypatch):
    """Calls of the profiler, which fails where JAX's would."""
    made = []

    def start(folder):
        assert not made or made[-1] == "stop", "a trace is running"
        made.append(folder)

    def stop():
        assert made, "no trace was started"
        assert made[-1] != "stop", "no trace is running"
        made.append("stop")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    return made


@pytest.mark.parametrize(
    ("first", "last", "wanted"),
    [
        (0, 9, [4, 5, 6]),
        (5, 9, [5, 6]),  # resumed inside the window
        (6, 9, [6]),
        (7, 9, []),  # and past it
        (0, 3, []),
        (0, 4, [4]),  # ended inside it
    ],
)
def test_traces_the_steps_of_the_window_that_this_process_takes(
    tmp_path, calls, first, last, wanted
):
    opts = options.LogOptions(profile_first_step=4, profile_steps=3)
    profile = profiling.Profile(tmp_path, opts)
    traced = []
    for step in range(first, last + 1):
        profile.before(step)
        if calls and calls[-1] != "stop":
            traced.append(step)
        assert profile.ends_with(step) == (step == 6 and bool(traced))
        profile.after(step)
    profile.close()
    profile.close()
    assert traced == wanted
    assert calls == ([str(tmp_path / "profile"), "stop"] if wanted else [])


def test_without_a_window_nothing_is_traced(tmp_path, calls):
    profile = profiling.Profile(tmp_path, options.LogOptions())
    profile.before(0)
    profile.after(0)
    profile.close()
    assert calls == []
