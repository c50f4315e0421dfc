"""The Dockerfile, instruction by instruction; nothing is built here."""

import re

import pytest

from tests.launch.conftest import LAUNCH

ROOT = LAUNCH.parent


def instructions() -> list[tuple[str, str]]:
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [
        (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
        for line in lines
        if line and not line.startswith("#")
    ]


def values(name: str) -> list[str]:
    return [value for instruction, value in instructions() if instruction == name]


def test_base_is_a_slim_python_pinned_by_its_version():
    (base,) = values("FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)


def test_every_copied_path_exists_and_is_sent_to_the_builder():
    sent = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    sources = {source for value in values("COPY") for source in value.split()[:-1]}
    assert {"pyproject.toml", "llada_jax", "convert", "launch", "configs"} <= sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in sent
    assert "*" in sent
    assert {line[1:] for line in sent if line.startswith("!")} == sources


def test_scripts_lie_where_the_manifests_call_them():
    assert values("WORKDIR") == ["/app"]
    assert "launch ./launch" in values("COPY")
    assert '"/app/launch' not in (LAUNCH / "jobset.yaml").read_text()
    for script in ("jobset.sh", "xpk.sh"):
        assert "/app/launch/worker.sh" in (LAUNCH / script).read_text()


def test_project_is_installed_with_the_tpu_extra():
    assert [value for value in values("RUN") if "pip" in value] == [
        'pip install --no-cache-dir ".[tpu]"'
    ]


def test_user_is_not_root():
    names = [name for name, _ in instructions()]
    assert values("USER") == ["${RUN_AS}"]
    assert values("ARG") == ["RUN_AS=1000"]
    assert any("useradd --uid 1000" in value for value in values("RUN"))
    assert names[names.index("USER") :] == ["USER", "CMD"]


@pytest.mark.parametrize("word", ["token", "password", "secret", "credential", "api_key", "ADD "])
def test_no_secrets(word):
    assert not [line for line in instructions() if word in " ".join(line)]
