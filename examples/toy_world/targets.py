"""The targets that were set before the full run, against what it found.

    python -m examples.toy_world.targets docs/toy_world.json

`expected.json` has the bands. A figure comes from every seed or counts as not measured; one without
a band is only reported.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from examples.tiny_model import results as tables

EXPECTED = pathlib.Path(__file__).with_name("expected.json")
REACHED, MISSED, ABSENT, REPORTED = "reached", "not reached", "not measured", "reported"
Stage = Mapping[str, Any]


def _share(counts: list[int]) -> float:
    return counts[0] / counts[1]


def _memorised(stage: Stage) -> float:
    known = stage["knowledge"]
    told = [known["memorised_forward"], known["memorised_backward"]]
    return _share([sum(part) for part in zip(*told, strict=True)])


def _unseen(stage: Stage) -> list[int]:
    known = stage["knowledge"]
    both = (known["unseen_forward"], known["unseen_backward"])
    return [sum(part) for part in zip(*both, strict=True)]


def _fall(at_16: Stage, at_4: Stage, at_1: Stage) -> float:
    bounds = [stage["bounds"][n] for stage, n in ((at_16, "16"), (at_4, "4"), (at_1, "1"))]
    return min(bounds[0] - bounds[1], bounds[1] - bounds[2])


def _ratio(first: str, second: str, reference: str) -> Callable[[Stage], float]:
    return lambda stage: stage[reference][first] / stage[reference][second]


# A figure of one seed: the stages it takes, and what it makes of them.
PER_SEED: Mapping[str, tuple[tuple[str, ...], Callable[..., float]]] = {
    "difference_at_1": (("objective",), lambda o: o["difference_at_1"]),
    "standard_errors": (("objective",), lambda o: o["standard_errors"]),
    "least_fall_of_bound": (("shock_16", "shock_4", "shock_1"), _fall),
    "bound_16_gain": (("C", "B"), lambda c, b: b["bounds"]["16"] - c["bounds"]["16"]),
    "bound_4_gain": (("C", "B"), lambda c, b: b["bounds"]["4"] - c["bounds"]["4"]),
    "bound_1_gain": (("C", "B"), lambda c, b: b["bounds"]["1"] - c["bounds"]["1"]),
    "recall_gain": (("C", "B"), lambda c, b: _memorised(c) - _memorised(b)),
    "flops_ratio": (("C", "B"), lambda c, b: c["run"]["flops"] / b["run"]["flops"]),
    "grad_norm_cut": (
        ("shock_16", "shock_ramp"),
        lambda off, on: (
            off["run"]["largest_grad_norm_of_50"] / on["run"]["largest_grad_norm_of_50"]
        ),
    ),
    "ramp_cost": (
        ("shock_16", "shock_ramp"),
        lambda off, on: on["bounds"]["16"] - off["bounds"]["16"],
    ),
    "left_to_right_memorised": (("A",), _memorised),
    "left_to_right_unseen": (("A",), lambda a: _unseen(a)[0]),
    "infill": (("long",), lambda a: _share(a["knowledge"]["infill"])),
    "cap_speedup": (
        ("base", "cap"),
        lambda base, cap: (
            cap["tau_0.95"]["tokens_per_forward"] / base["tau_0.95"]["tokens_per_forward"]
        ),
    ),
    "cap_cost": (
        ("base", "cap"),
        lambda base, cap: base["tau_0.95"]["accuracy"] - cap["tau_0.95"]["accuracy"],
    ),
    "recovered": (("t2t",), lambda a: a["repair"]["recovered"]),
    "false_edits": (("t2t",), lambda a: a["repair"]["false_edits"]),
    "base_without_editing": (("base",), lambda a: a["tau_0.5"]["accuracy"]),
    "base_with_editing": (("base",), lambda a: a["tau_0.5_edit_0.5"]["accuracy"]),
    "speed_cost": (("t2t",), lambda a: a["quality"]["accuracy"] - a["speed"]["accuracy"]),
    "pairs_gain": (
        ("pairs", "small"),
        lambda pairs, small: pairs["tau_0.95"]["accuracy"] - small["tau_0.95"]["accuracy"],
    ),
    "merge_gain": (("merge",), lambda m: m["last"]["full"] - m["merged"]["full"]),
    "near_shared": (("variance",), _ratio("independent", "shared", "near")),
    "far_shared": (("variance",), _ratio("independent", "shared", "far")),
    "before_shared": (("variance",), _ratio("independent", "shared", "before")),
    "levels_over_masks": (
        ("variance",),
        _ratio("independent_n_masks", "independent_n_levels", "near"),
    ),
    "far_correlation": (("variance",), lambda v: v["far"]["correlation"]),
    "load_with_bias": (("long",), lambda a: a["run"]["max_over_mean_load"]),
    "load_of_skewed_with_bias": (("router_on",), lambda a: a["run"]["max_over_mean_load"]),
    "load_of_skewed_without": (("router_off",), lambda a: a["run"]["max_over_mean_load"]),
}


def figures(results: Stage) -> dict[str, list[float]]:
    """Every figure that all seeds have, one value per seed; pooled ones have one."""
    seeds = [_with_short_names(stages) for stages in results["seeds"].values()]
    found: dict[str, list[float]] = {}
    for name, (needed, make) in PER_SEED.items():
        if seeds and all(set(needed) <= set(stages) for stages in seeds):
            found[name] = [make(*(stages[n] for n in needed)) for stages in seeds]
    if seeds and all("long" in stages for stages in seeds):
        counts = [_unseen(stages["long"]) for stages in seeds]
        right, asked = (sum(part) for part in zip(*counts, strict=True))
        found["unseen"] = [right / asked]
        found["unseen_lower_bound"] = [tables.interval(right, asked)[0]]
    if "resume" in results:
        found["resume_differing"] = [len(results["resume"]["differing"])]
        missed = results["resume"]["phases"] - len(results["resume"]["killed_at"])
        found["phases_not_killed"] = [missed]
    return found


def _with_short_names(stages: Stage) -> dict[str, Any]:
    """Fine-tuning by its arm's name alone; of the short version where there is no other."""
    short = dict(stages)
    for prefix in ("fast_", "sft_"):
        short |= {n.removeprefix(prefix): s for n, s in stages.items() if n.startswith(prefix)}
    return short


def judge(check: Mapping[str, Any], found: Mapping[str, list[float]]) -> str:
    """How a check came out; bands include their ends."""
    if check["figure"] not in found:
        return ABSENT
    low, high = check.get("low"), check.get("high")
    if low is None and high is None:
        return REPORTED
    values = found[check["figure"]]
    if check.get("over", "mean") == "mean":
        values = [statistics.mean(values)]
    is_inside = all(
        (low is None or value >= low) and (high is None or value <= high) for value in values
    )
    return REACHED if is_inside else MISSED


def verdict(states: list[str]) -> str:
    """A target's state from those of its checks; one that failed outweighs one that is missing."""
    for state in (MISSED, ABSENT):
        if state in states:
            return state
    return REACHED


def table(results: Stage) -> str:
    """All targets and their checks in Markdown."""
    found, rows = figures(results), []
    for target in json.loads(EXPECTED.read_text()):
        states = [judge(check, found) for check in target["checks"]]
        guess = "" if target["is_piloted"] else ", not piloted"
        name = f"**{target['target']}. {target['name']}**{guess}"
        rows.append([name, "", "", "", f"**{verdict(states)}**"])
        for check, state in zip(target["checks"], states, strict=True):
            values = found.get(check["figure"], [])
            mean = f"{statistics.mean(values):.3g}" if values else ""
            each = ", ".join(f"{value:.3g}" for value in values) if len(values) > 1 else ""
            rows.append([check["says"], _band(check), mean, each, state])
    return tables.markdown(["target", "wanted", "mean", "each seed", "state"], rows)


def _band(check: Mapping[str, Any]) -> str:
    names = {"low": "at least", "high": "at most"}
    parts = [f"{name} {check[key]:g}" for key, name in names.items() if check.get(key) is not None]
    if parts and check.get("over") == "each":
        parts.append("in every seed")
    return ", ".join(parts)


def main() -> None:
    """Prints the table of a file of results."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("results", type=pathlib.Path)
    print(table(json.loads(flags.parse_args().results.read_text())))


if __name__ == "__main__":
    main()
