"""What the pages show works as it stands there, and what they link to exists."""

import importlib.metadata
import pathlib
import re
import shlex
from collections.abc import Callable

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "convert/*.md", "launch/**/*.md", "tests/golden/*.md")
    for path in ROOT.glob(pattern)
)
# Commands of an installation, which the test run itself has gone through.
SET_UP = {"make", "pip", "python3"}
# A model and texts that take seconds; the flags of the pages stay, of two the last counts.
SMALL = {
    "llada-bench generate": (
        "--hidden-size 32 --layers 2 --dense-width 32 --heads 2 --kv-heads 1 --experts 4 "
        "--experts-per-token 2 --expert-width 16 --expert-groups 2 --vocab-size 64 "
        "--gen-length 64 --repeats 1"
    ),
    "llada-train --config": "--config configs/tiny_cpu.py:0.03",
    "llada-bench experts": "--hidden-size 32 --expert-width 16 --repeats 1",
}


def blocks(page: str, language: str) -> list[str]:
    """The contents of a page's fenced blocks of a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_commands(page: str) -> list[list[str]]:
    """Words of every command in a page's shell blocks; `&&` separates commands."""
    commands = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                place = words.index("&&")
                commands.append(words[:place])
                words = words[place + 1 :]
            if words:
                commands.append(words)
    return commands


def entry_point(name: str) -> Callable[[list[str]], int]:
    """The function behind a console command."""
    (found,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    return found.load()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "convert/README.md"])
def test_shell_examples_run(page, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    ran = 0
    for words in shell_commands(page):
        if words[0] in SET_UP or words[0] == ".":
            continue
        small = SMALL.get(" ".join(words[:2]), "").split()
        argv = [re.sub(r"^/tmp(?=/)", str(tmp_path), word) for word in words[1:]]
        status = entry_point(words[0])([*argv, *small])
        assert status == 0, (shlex.join(words), capfd.readouterr().err)
        ran += 1
    assert ran >= 6


def test_make_targets_of_the_pages_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {w[1] for page in PAGES for w in shell_commands(page) if w[0] == "make"}
    assert {"demo", "test"} <= named <= set(targets)


@pytest.mark.slow
def test_python_examples_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    examples = blocks("README.md", "python")
    assert examples
    for example in examples:
        names: dict = {"__name__": "example"}
        exec(compile(example, "README.md", "exec"), names)
        assert len(names["answers"]) == 2
        assert names["logits"].shape == (1, 4, 512)
    assert "length" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, target
