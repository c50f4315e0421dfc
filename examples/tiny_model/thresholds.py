"""Tokens per forward pass against accuracy: thresholds, and the presets that edit.

    python -m examples.tiny_model.thresholds build/tiny_model/hf

Tokens are those of the answers with their end, passes those of denoising, as the papers count.
"""

from collections.abc import Sequence
from typing import Any

from examples.tiny_model import accuracy, results

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the results."""
    parser = results.flags(__doc__, "thresholds")
    parser.add_argument("--per-task", type=int, default=60, help="items of each task")
    args = parser.parse_args(argv)
    generator = results.load(args)
    items = accuracy.held_out(args, args.per_task)
    settings = {f"threshold {t}": {"strategy": "threshold", "threshold": t} for t in THRESHOLDS} | {
        name: {"strategy": name} for name in ("speed", "quality")
    }
    figures, rows = {}, []
    for name, options in settings.items():
        answers = accuracy.ask(generator, items, **options)
        right = sum(map(accuracy.is_right, items, answers))
        figures[name] = {
            "exact": right / len(items),
            "interval": results.interval(right, len(items)),
            "tokens_per_forward": accuracy.tokens_per_forward(answers),
            "edits": sum(a.stats.edits for a in answers),
        }
        found = figures[name]
        speed = f"{found['tokens_per_forward']:.2f}"
        rows.append([name, results.percent(found["exact"]), speed, found["edits"]])

    def draw(axes: Any) -> None:
        curve = [figures[f"threshold {t}"] for t in THRESHOLDS]
        places = [(f["tokens_per_forward"], f["exact"]) for f in curve]
        axes.plot(*zip(*places, strict=True), marker="o", label="threshold")
        for name, place in zip(THRESHOLDS, places, strict=True):
            axes.annotate(str(name), place, textcoords="offset points", xytext=(4, 4), fontsize=8)
        for name in ("speed", "quality"):
            found = figures[name]
            axes.plot(found["tokens_per_forward"], found["exact"], "s", label=f"{name}, edits")
        axes.set_xlabel("tokens per forward pass")
        axes.set_ylabel("exact match, all tasks")
        axes.legend()

    results.write(
        args,
        {"items": len(items), "settings": figures},
        header=["decoding", "exact", "tokens per forward", "tokens edited"],
        rows=rows,
        draw=draw,
    )


if __name__ == "__main__":
    main()
