"""Model directories: an Orbax checkpoint, with config and tokenizer files beside it.

    DIRECTORY/llada_jax.json         what this is, and where it came from
    DIRECTORY/params/                Orbax PyTree checkpoint of the model's tree, as plain dicts
    DIRECTORY/config.json            the published config
    DIRECTORY/generation_config.json, tokenizer files    as published, where there are any

A directory is written under another name and renamed when it is complete, so one that has its name
is whole. Nothing in it is ever executed.
"""

import contextlib
import fcntl
import fnmatch
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from llada_jax import config, sharding, storage
from llada_jax.model import formulation as formulations
from llada_jax.model import transformer

FORMAT_NAME = "llada_jax model"
FORMAT_VERSION = 1
DESCRIPTION_FILE = "llada_jax.json"
PARAMS_FOLDER = "params"
# Chunks that a reader with little memory can still take one by one.
_CHUNK_BYTES = 16 * 2**20

# Files that go along with a model. They are data; code and pickles never go along.
CARRIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
)

PathLike = storage.PathLike


class StoredArray(NamedTuple):
    """What a checkpoint's metadata says of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


def load_config(directory: PathLike) -> config.ModelConfig:
    """The architecture in a directory's config.json, published or ours.

    Where config.json has no mask id or end-of-text id, generation_config.json may tell them.

    Raises:
      ValueError: a file is missing, is no JSON object, or describes nothing that we support.
    """
    path = storage.local(directory) / "config.json"
    try:
        cfg = config.ModelConfig.from_hf(read_json(path))
        path = path.with_name("generation_config.json")
        generation = read_json(path) if path.is_file() else {}
        mask, eos = generation.get("mask_token_id"), generation.get("eos_token_id")
        if cfg.mask_token_id is None and mask is not None:
            cfg = cfg.replace(mask_token_id=mask)
        if not cfg.eos_token_ids and eos is not None:
            cfg = cfg.replace(eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,))
    except (TypeError, ValueError) as error:  # a value of another type than it should have
        raise ValueError(f"{path}: {error}") from error
    return cfg


def published_config(cfg: config.ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a checkpoint that is converted, with this dtype.

    Ids that `load_config` found in generation_config.json stay there, so that a checkpoint's
    config.json comes back from a conversion as it was.
    """
    published = json.loads(cfg.hf_json)
    if published:
        source = config.ModelConfig.from_hf(published)
        cfg = cfg.replace(mask_token_id=source.mask_token_id, eos_token_ids=source.eos_token_ids)
    return cfg.replace(dtype=dtype).to_hf()


def is_model_directory(directory: PathLike) -> bool:
    """Whether this is a complete model directory, by the files that it has."""
    directory = epath.Path(os.fspath(directory))
    return not is_incomplete(directory) and all(
        (directory / name).is_file()
        for name in (DESCRIPTION_FILE, "config.json", f"{PARAMS_FOLDER}/_METADATA")
    )


def load_model(
    directory: PathLike,
    *,
    rules: sharding.AxisRules,
    formulation: formulations.Formulation = formulations.PLAIN,
    dtype: str | None = None,
) -> transformer.LLaDA2:
    """The model in a model directory, read straight into arrays sharded over the current mesh.

    Args:
      directory: as `llada-convert import` or `save_model` writes it.
      rules: how parameters are split over the mesh, which `jax.set_mesh` has entered.
      formulation: how the model is computed.
      dtype: dtype to convert to; by default each parameter keeps its stored dtype. The router's
        bias always does.

    Raises:
      ValueError: the directory is no complete model directory, or its parameters are not those of
        its config.
    """
    directory = pathlib.Path(directory).absolute()
    check_model_directory(directory)
    cfg = load_config(directory)
    stored = stored_arrays(directory / PARAMS_FOLDER)
    model = transformer.abstract_model(cfg, rules, formulation)
    abstract = nnx.to_pure_dict(nnx.state(model))
    problems = tree_problems(tree_shapes(abstract), stored)
    problems += chunk_problems(directory / PARAMS_FOLDER, stored)
    if problems:
        raise ValueError("\n  ".join((f"{directory}: damaged, or of another config", *problems)))

    def as_stored(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = dotted(path)
        target = target_dtype(name, stored[name].dtype, dtype)
        return jax.ShapeDtypeStruct(leaf.shape, target, sharding=leaf.sharding)

    target = jax.tree_util.tree_map_with_path(as_stored, abstract)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(directory / PARAMS_FOLDER, target)
    return build_model(cfg, rules, params, formulation)


def build_model(
    cfg: config.ModelConfig,
    rules: sharding.AxisRules,
    params: Any,
    formulation: formulations.Formulation = formulations.PLAIN,
) -> transformer.LLaDA2:
    """The model with these arrays, nested dicts by path; its dtype is the embedding's."""
    cfg = cfg.replace(dtype=str(params["embed"]["kernel"].dtype))
    model = transformer.abstract_model(cfg, rules, formulation)
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def target_dtype(path: str, stored: np.dtype, dtype: str | None) -> np.dtype:
    """The dtype of a parameter after conversion; the router's bias keeps the stored one."""
    if dtype is None or path.endswith("expert_bias"):
        return stored
    if dtype not in config.DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {config.DTYPES}")
    return np.dtype(jax.numpy.dtype(dtype))


def save_model(
    model: transformer.LLaDA2,
    directory: PathLike,
    *,
    beside: PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model that is in memory as a model directory; every process calls it.

    Args:
      model: the model.
      directory: where; a complete directory appears there, or none. In a bucket it grows in place,
        and is no model directory before its last object, the description, is written.
      beside: directory whose generation config and tokenizer files go along.
      overwrite: whether to replace a model directory that is already there.

    Raises:
      ValueError: the directory exists.
    """
    target = storage.folder(directory)
    is_disk = isinstance(target, pathlib.Path)
    tree = nnx.to_pure_dict(nnx.state(model))
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    is_first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        partial = incomplete_path(target) if is_disk else target
        if is_first and is_disk:
            stack.enter_context(written_beside(target, overwrite=overwrite))
        elif is_first:
            _clear_in_bucket(partial, overwrite=overwrite)
        _barrier("save_model: directory made")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / PARAMS_FOLDER, tree, save_args=save_args)
        if is_first:
            cfg = model.cfg.replace(dtype=str(model.embed.kernel[...].dtype))
            dtypes = {dotted(p): str(a.dtype) for p, a in jax.tree_util.tree_leaves_with_path(tree)}
            write_side_files(partial, cfg.to_hf(), dtypes, source_layout="llada_jax", beside=beside)
        _barrier("save_model: parameters written")
    _barrier("save_model: directory renamed")


def _clear_in_bucket(target: storage.Folder, *, overwrite: bool) -> None:
    """Deletes what a target in a bucket holds, the description first."""
    assert isinstance(target, epath.Path)
    found = {path.name for path in target.iterdir()} if target.exists() else set()
    if found and not overwrite:
        raise ValueError(f"{target}: already exists; choose another name, or overwrite it")
    ours = {PARAMS_FOLDER, "config.json", DESCRIPTION_FILE}
    others = sorted(name for name in found - ours if not is_carried(name))
    if others:
        raise ValueError(f"{target}: holds {others}, so it is not overwritten")
    (target / DESCRIPTION_FILE).unlink(missing_ok=True)
    if found:
        target.rmtree()


def write_side_files(
    directory: storage.Folder,
    hf_config: Mapping[str, Any],
    dtypes: Mapping[str, str],
    *,
    source_layout: str,
    beside: PathLike | None,
) -> None:
    """Writes everything of a model directory but its parameters, the description last."""
    if beside is not None:
        copy_carried_files(storage.local(beside), directory)
    write_json(directory / "config.json", hf_config)
    description = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "source_layout": source_layout,
        "dtypes": dict(sorted(dtypes.items())),
    }
    write_json(directory / DESCRIPTION_FILE, description)


def copy_carried_files(source: pathlib.Path, target: storage.Folder) -> None:
    """Copies the tokenizer's and the generation config's files."""
    for path in sorted(source.iterdir()):
        if path.is_file() and is_carried(path.name):
            (target / path.name).write_bytes(path.read_bytes())


def is_carried(name: str) -> bool:
    """Whether a file of this name goes along with a model, config.json aside."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in CARRIED_FILES)


def check_model_directory(directory: pathlib.Path) -> None:
    """Raises a ValueError that says what a directory lacks to be a model directory."""
    if is_model_directory(directory):
        description = read_json(directory / DESCRIPTION_FILE)
        if description.get("format") != FORMAT_NAME or description.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{directory / DESCRIPTION_FILE}: format {description.get('format')!r} version "
                f"{description.get('version')!r}; this library reads {FORMAT_NAME!r} version "
                f"{FORMAT_VERSION}"
            )
        return
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    if is_incomplete(directory):
        raise ValueError(f"{directory}: left by a conversion that did not finish; run it again")
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.safetensors.index.json")):
        raise ValueError(
            f"{directory}: a Hugging Face checkpoint; convert it with `llada-convert import "
            f"{directory} TARGET`, or let llada_jax.generate.Generator read it as it is"
        )
    raise ValueError(
        f"{directory}: no model directory: {DESCRIPTION_FILE}, config.json and "
        f"{PARAMS_FOLDER}/_METADATA must all be there"
    )


def stored_arrays(folder: storage.Folder) -> dict[str, StoredArray]:
    """Shape, dtype and chunks of each array of an Orbax tree, by dotted path; reads no data."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            item = checkpointer.metadata(folder).item_metadata
        tree = item.tree if hasattr(item, "tree") else item
        return {
            dotted(path): StoredArray(
                tuple(array.shape), np.dtype(array.dtype), tuple(array.storage.chunk_shape)
            )
            for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
    except Exception as error:  # Orbax and tensorstore raise many kinds for damaged files
        raise ValueError(f"{folder}: cannot be read as an Orbax checkpoint: {error}") from error


def tree_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf, by dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {dotted(path): leaf.shape for path, leaf in leaves}


def tree_problems(
    wanted: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredArray],
    *,
    wanted_by: str = "config.json",
) -> list[str]:
    """A line for every array whose presence or shape is not what is wanted."""
    problems = [f"{path}: missing" for path in sorted(wanted.keys() - stored.keys())]
    problems += [f"{path}: unexpected" for path in sorted(stored.keys() - wanted.keys())]
    return problems + [
        f"{path}: shape {stored[path].shape}, {wanted_by} wants {wanted[path]}"
        for path in sorted(wanted.keys() & stored.keys())
        if stored[path].shape != wanted[path]
    ]


def chunk_problems(params: pathlib.Path, stored: Mapping[str, StoredArray]) -> list[str]:
    """A line for every chunk file that is missing or cut short.

    Only uncompressed chunks tell by their size, which are what `llada-convert import` writes.
    """
    problems: list[str] = []
    if (params / "manifest.ocdbt").exists():
        return problems
    for path, array in stored.items():
        if read_json(params / path / ".zarray").get("compressor") is not None:
            continue
        num_bytes = math.prod(array.chunk_shape) * array.dtype.itemsize
        sizes = zip(array.shape, array.chunk_shape, strict=True)
        for index in np.ndindex(*(-(-size // chunk) for size, chunk in sizes)):
            name = ".".join(map(str, index))
            chunk = params / path / name
            found = chunk.stat().st_size if chunk.is_file() else None
            if found != num_bytes:
                size = "missing" if found is None else f"{found} bytes instead of {num_bytes}"
                problems.append(f"{path}: chunk {name} is {size}")
    return problems


def dotted(path: Iterable[Any]) -> str:
    """A tree path as one name, as in "moe_layers.mlp.experts.gate_proj"."""
    return ".".join(str(key.key) for key in path)


def incomplete_path(target: pathlib.Path) -> pathlib.Path:
    """Where a directory is written before it takes its name."""
    return target.with_name(f"{target.name}.incomplete")


def is_incomplete(directory: storage.Folder) -> bool:
    """Whether a directory was still being written when its writer stopped."""
    return directory.name.endswith(".incomplete")


@contextlib.contextmanager
def written_beside(target: PathLike, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Yields a directory that takes the target's name once the block ends without an error.

    What an interrupted run left is removed first; a lock beside it tells that it is ours and that
    nobody is writing it now.

    Raises:
      ValueError: the target exists and may not be overwritten, or is being written.
    """
    target = storage.local(target).absolute()
    partial = incomplete_path(target)
    replaced = partial.with_name(f"{partial.name}.replaced")
    lock_path = partial.with_name(f"{partial.name}.lock")
    for path in (partial, replaced):
        if os.path.lexists(path) and not lock_path.exists():
            raise ValueError(f"{path}: in the way, and not left by us; move it elsewhere")
    _check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock_path, target):
        if replaced.exists() and not os.path.lexists(target):
            replaced.rename(target)  # an overwriting run was killed between its two renames
            _check_target(target, overwrite=overwrite)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _sync(partial)
            _check_target(target, overwrite=overwrite)
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
            _sync_one(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if target.exists():
                shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _locked(lock_path: pathlib.Path, target: pathlib.Path) -> Iterator[None]:
    """Holds a lock that the system gives back when the process dies; the file goes at the end."""
    lock = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(lock_path)  # gone if its owner has just finished
        except OSError as error:
            raise ValueError(f"{target}: another process is writing it now") from error
        try:
            yield
        finally:
            lock_path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _check_target(target: pathlib.Path, *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ValueError(
            f"{target}: already exists; choose another name, or overwrite it (--overwrite)"
        )
    is_checkpoint = (target / "config.json").is_file() and (
        (target / DESCRIPTION_FILE).is_file() or any(target.glob("*.safetensors"))
    )
    if target.is_symlink() or not target.is_dir() or (any(target.iterdir()) and not is_checkpoint):
        raise ValueError(f"{target}: holds no checkpoint, so it is not overwritten")


def _sync(directory: pathlib.Path) -> None:
    """Brings a directory's files and names to the disk, so that a renamed one is whole."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync_one(os.path.join(folder, name))
        _sync_one(folder)


def _sync_one(path: PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: storage.Folder, value: Mapping[str, Any]) -> None:
    """Writes a JSON object as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; a ValueError says what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing in {path.parent}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return value


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
