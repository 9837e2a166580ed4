"""A checkpoint as an evaluation sees it: opened read-only, on any mesh, weights and nothing else.

What a checkpoint says is data: its run is read as JSON and validated, its tokenizer is the file beside it.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax.alphabet import ACT_AXES, check_divisible
from llm_jax.checkpoint import CheckpointError, Checkpoints
from llm_jax.config import ConfigError, from_json, override
from llm_jax.data import tokenizer as tokenizers
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.eval.dropless import dropless
from llm_jax.mesh import make_mesh
from llm_jax.model.backends import resolve
from llm_jax.model.config import ModelConfig
from llm_jax.model.decode import unrolled
from llm_jax.model.paths import Tree, from_tree, placed, to_tree
from llm_jax.model.transformer import Weights, abstract_model
from llm_jax.run import Run, check_axes, check_weights, mesh_sizes
from llm_jax.run_directory import Refused
from llm_jax.train.config import MeshConfig

# The meaning of a checkpoint's record and of its arrays' names.
FORMAT = 1

# What an evaluation may change: where and how it computes, never what was trained.
FREE = ("eval", "mesh", "data.dir", "model.attention", "model.moe.exchange", "model.moe.grouped_matmul")


class Missing(Refused):
    """There is no such checkpoint, or no longer."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint, before any of its weights is read."""

    directory: Path
    """The run directory."""
    step: int
    run: Run
    """As it was trained; its mesh and its attention backend are the trainer's."""
    tokenizer: Tokenizer
    data_fingerprint: str
    verified: bool
    """Whether every file of it was read already, so that restoring need not do so again."""


def find(run_dir: str | Path, step: int | None = None) -> Found:
    """A run directory's checkpoint of that step; of None the newest intact one, damaged ones being told on stderr.

    Raises ConfigError where there is no such directory, Missing where there is no such checkpoint, Refused where it
    cannot be understood, CheckpointError where it is damaged.
    """
    directory = Path(run_dir)
    if not directory.is_dir():
        raise ConfigError(f"{run_dir}: no such run directory")
    with closing(Checkpoints(directory / "checkpoints", read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise Missing(f"{run_dir} has no checkpoint yet; llm-jax train saves one every checkpoint.every updates")
        verified = step is None
        if step is None:
            step = checkpoints.newest_intact()
            if step is None:
                raise CheckpointError(f"{run_dir}: every checkpoint is damaged")
        elif step not in steps:
            raise Missing(f"{run_dir} has no checkpoint {step}; there are {', '.join(map(str, steps))}")
        meta = checkpoints.meta(step)
    run = run_of(meta, f"checkpoint {step} of {run_dir}")
    return Found(directory, step, run, tokenizer_of(directory, meta), meta["data"], verified)


def run_of(meta: dict[str, Any], whose: str) -> Run:
    """The run that a checkpoint's record holds. Raises Refused where it was written by another version of the code."""
    if meta.get("format") != FORMAT:
        raise Refused(f"{whose} has format {meta.get('format')!r}; this version of llm_jax reads format {FORMAT}")
    try:
        return from_json(Run, json.dumps(meta["run"]))
    except ConfigError as error:
        raise Refused("\n  ".join([f"{whose} was written by another version of llm_jax:", *error.lines])) from None


def tokenizer_of(directory: Path, meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer that lies in the run directory. Raises Refused where it is not the one that the weights know."""
    path = directory / "tokenizer.model"
    if not path.is_file():
        raise Refused(f"{path} is missing; without it the weights mean nothing")
    tokenizer = tokenizers.load(path)
    if tokenizer.fingerprint != meta["tokenizer"]:
        raise Refused(f"{path} is not the tokenizer that the weights were trained with")
    return tokenizer


def adapt(run: Run, overrides: Sequence[str], n_devices: int, platform: str) -> tuple[Run, dict[str, int]]:
    """The run as it is evaluated here, and its mesh's axis sizes; backends and mesh are settled for these devices.

    The mesh is the run's own where it takes exactly these devices, else all of them as fsdp; overrides of mesh.* start
    from data=-1. Experts drop nothing. Raises ConfigError for an override that an evaluation may not make, or a mesh
    that does not fit.
    """
    for wish in overrides:
        path = wish.partition("=")[0].strip()
        if not any(path == free or path.startswith(f"{free}.") for free in FREE):
            raise ConfigError(f"{wish}: an evaluation can only change {', '.join(FREE)}; the rest was trained")
    names_mesh = any(wish.strip().startswith("mesh") for wish in overrides)
    mesh = MeshConfig() if names_mesh else default_mesh(run.mesh, n_devices)
    model = unsettled(dropless(run.model))
    run = override(run.model_copy(update={"mesh": mesh, "model": model}), overrides)
    run.eval.check(run.data.seq_len)
    check_axes(run.mesh)
    sizes = mesh_sizes(run.mesh, n_devices)
    check_weights(run.model, sizes)
    check_divisible({"T": ("data.seq_len", run.data.seq_len)}, sizes, ACT_AXES)
    return run.model_copy(update={"model": resolve(run.model, platform, sizes["expert"])}), sizes


def unsettled(cfg: ModelConfig) -> ModelConfig:
    """The config with what the trainer's machine decided to be settled anew."""
    moe = cfg.moe
    if moe is not None:
        moe = moe.model_copy(update={"grouped_matmul": "auto", "exchange": "auto"})
    return cfg.model_copy(update={"attention": "auto", "moe": moe})


def default_mesh(trained: MeshConfig, n_devices: int) -> MeshConfig:
    """The trained one where it takes all n_devices; else fsdp over all, since then whatever fits in them all fits.

    Which devices a fast network joins is for these devices to say.
    """
    try:
        if math.prod(mesh_sizes(trained, n_devices).values()) == n_devices:
            return trained.model_copy(update={"slices": None})
    except ConfigError:
        pass
    return MeshConfig(data=1, fsdp=-1)


def mesh_of(sizes: dict[str, int], slices: int | None) -> Mesh:
    """The mesh on the job's devices; one process may leave some idle, and says so.

    Raises ConfigError where several processes would, or where the devices are no such slices.
    """
    used, there = math.prod(sizes.values()), jax.device_count()
    if used < there:
        if jax.process_count() > 1:
            raise ConfigError(f"the mesh takes {used} of {there} devices; with several processes it must take all")
        print(f"the mesh takes {used} of {there} devices", file=sys.stderr)
    return make_mesh(sizes, slices=slices)


def row_parts(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are divided: what a number of rows must be a multiple of."""
    return math.prod(mesh.shape[axis] for axis in ACT_AXES["B"])


def restore_weights(found: Found, cfg: ModelConfig, mesh: Mesh) -> Weights:
    """The weights on the mesh, which must be set; the optimizer's state is not read. Raises CheckpointError."""
    _, params, balance = abstract_model(cfg)
    abstract = {"params": params, "balance": balance}
    wanted = placed(jax.eval_shape(to_tree, abstract), mesh)
    with closing(Checkpoints(found.directory / "checkpoints", read_only=True)) as checkpoints:
        tree = checkpoints.restore(found.step, wanted, verified=found.verified)
    return _assembled(tree, cfg)


@functools.partial(jax.jit, static_argnums=1)
def _assembled(tree: Tree, cfg: ModelConfig) -> Weights:
    """The weights of a checkpoint's arrays; compiled once for all checkpoints of a run."""
    _, params, balance = abstract_model(cfg)
    restored = from_tree(tree, {"params": params, "balance": balance})
    return restored["params"], restored["balance"]


@functools.partial(jax.jit, static_argnums=1)
def _unrolled(weights: Weights, cfg: ModelConfig) -> Weights:
    """The weights in the form of unrolled(cfg), as cfg."""
    _, *abstract = abstract_model(cfg)
    return from_tree(to_tree(weights), tuple(abstract))


@contextmanager
def for_decoding(weights: Weights, cfg: ModelConfig) -> Iterator[tuple[Weights, ModelConfig]]:
    """The weights in the form that decoding wants, and the config of that form, on a mesh without a context axis.

    One token at a time has no positions to divide: the devices of that axis divide rows and weights instead.
    """
    mesh = jax.sharding.get_mesh()
    alone = unrolled(cfg)
    weights = _unrolled(weights, alone)
    sizes = dict(mesh.shape)
    if sizes["context"] > 1:
        sizes |= {"context": 1, "fsdp": sizes["fsdp"] * sizes["context"]}
        mesh = make_mesh(sizes, list(mesh.devices.flat))
        with jax.set_mesh(mesh):
            _, *abstract = abstract_model(alone)
        wanted = placed(tuple(abstract), mesh)
        weights = jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), weights, wanted)
    with jax.set_mesh(mesh):
        yield weights, alone
