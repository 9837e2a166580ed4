"""A JAX model that trains on random tokens, as a worker of compare.py: peers_jax.py NAME SIZES

NAME is jax (hand-written: plain_jax.py), nanodo, levanter or maxtext. With experts, none drops a token; jax and maxtext
also come with -dense, where every expert sees every token and what was not chosen counts nothing, which on a CPU may be
the faster way. Nothing is recomputed in the backward pass: it is not memory that is measured.
SIZES is JSON, as compare.py makes it. bfloat16 is what is computed in, over float32 weights.
"""

import functools
import importlib.metadata
import importlib.resources
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

START = time.perf_counter()
# Nothing is fetched and nobody is told.
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "DECOUPLE_GCLOUD": "TRUE"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax import Array  # noqa: E402
from plain_jax import drawn, make_loss  # noqa: E402
from sizes import BATCHES, MASK, NOT_PREDICTED, SPECIAL, TOP, Sizes  # noqa: E402
from turns import serve  # noqa: E402

Tree = Any
# tokens_BT, targets_BT
Batch = tuple[np.ndarray, np.ndarray]
LR, B1, B2, EPS, DECAY = 3e-4, 0.9, 0.95, 1e-8, 0.1


class Peer(NamedTuple):
    """A model in training: put makes a batch what step wants; a step's loss is there when the step is done."""

    put: Callable[[Batch], Any]
    step: Callable[[Any], float]
    parameters: int
    of: str


def batches(s: Sizes) -> list[Batch]:
    """Tokens and targets of some steps, int32 [rows, seq]."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(BATCHES):
        rows = draw.integers(SPECIAL, s.vocab, (s.rows, s.seq + 1), dtype=np.int32)
        tokens = rows[:, :-1]
        if s.masked is None:
            made.append((tokens, rows[:, 1:]))
            continue
        hidden = draw.random(tokens.shape) < s.masked
        made.append((np.where(hidden, MASK, tokens), np.where(hidden, tokens, NOT_PREDICTED).astype(np.int32)))
    return made


def count(weights: Tree) -> int:
    """The numbers in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(weights))


def release(package: str) -> str:
    """A package and its version."""
    return f"{package} {importlib.metadata.version(package)}"


def trained(weights: Tree, loss_of: Callable[[Tree, Array, Array], Array], of: str) -> Peer:
    """A peer of a loss and weights, by optax's AdamW in one program that takes the old state's place."""
    optimizer = optax.adamw(LR, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)
    state = (weights, jax.jit(optimizer.init)(weights))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: tuple[Tree, Tree], tokens: Array, targets: Array) -> tuple[tuple[Tree, Tree], Array]:
        weights, moments = state
        loss, gradient = jax.value_and_grad(loss_of)(weights, tokens, targets)
        change, moments = optimizer.update(gradient, moments, weights)
        return (optax.apply_updates(weights, change), moments), loss

    def step(batch: tuple[Array, Array]) -> float:
        nonlocal state
        state, loss = update(state, *batch)
        return float(loss)

    return Peer(jax.device_put, step, count(weights), of)


def nanodo(s: Sizes) -> Peer:
    """Its MLP has no gate, so it is wider; its embedding is the head, too, and its positions are learned."""
    from nanodo.model import DoConfig, TransformerDo  # pyright: ignore[reportMissingImports]

    model = TransformerDo(
        DoConfig(D=s.d, H=s.heads, L=s.seq, N=s.layers, V=s.vocab, F=s.ff * 3 // 2, dtype=s.dtype, fsdp_enabled=False)
    )

    def loss_of(weights: Tree, tokens: Array, targets: Array) -> Array:
        logits = model.apply({"params": weights}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    tokens = jnp.zeros((1, s.seq), jnp.int32)
    return trained(jax.jit(model.init)(jax.random.key(0), tokens)["params"], loss_of, f"nanodo, {release('flax')}")


def levanter(s: Sizes) -> Peer:
    """Llama, or with experts Qwen3-MoE, through Levanter's own trainer."""
    import haliax  # pyright: ignore[reportMissingImports]
    import jmp  # pyright: ignore[reportMissingImports]
    from levanter.layers.attention import AttentionMask  # pyright: ignore[reportMissingImports]
    from levanter.models.lm_model import LmExample  # pyright: ignore[reportMissingImports]
    from levanter.optim import AdamConfig  # pyright: ignore[reportMissingImports]
    from levanter.tracker import NoopConfig  # pyright: ignore[reportMissingImports]
    from levanter.trainer import Trainer, TrainerConfig  # pyright: ignore[reportMissingImports]

    os.chdir(tempfile.mkdtemp(prefix="levanter"))
    config = levanter_model(s)
    endless = 10**6
    trainer_config = TrainerConfig(
        seed=0,
        mp=jmp.get_policy("f32" if s.dtype == "float32" else "params=f32,compute=bf16,output=f32"),
        tracker=NoopConfig(),
        train_batch_size=s.rows,
        num_train_steps=endless,
        require_accelerator=False,
        log_jaxprs=False,
        log_xla_hlo=False,
        load_checkpoint=False,
    )
    trainer_config.initialize()
    adam = AdamConfig(
        learning_rate=LR, weight_decay=DECAY, beta1=B1, beta2=B2, epsilon=EPS, max_grad_norm=None,
        lr_schedule="constant", warmup=0.0,
    )  # fmt: skip

    def loss_of(model: Any, example: Any, *, key: Array | None = None) -> Any:
        return model.compute_next_token_loss(example, key=key)

    trainer = Trainer(trainer_config, adam.build(endless), loss_of, add_default_hooks=False)
    trainer.__enter__()
    vocab, rows, positions = haliax.Axis("vocab", s.vocab), haliax.Axis("batch", s.rows), config.max_Pos
    state = trainer.initial_state(jax.random.key(0), model_init=lambda: config.build(vocab, key=jax.random.key(1)))

    def put(batch: Batch) -> Any:
        return LmExample(
            tokens=haliax.named(jnp.asarray(batch[0]), (rows, positions)),
            loss_weight=LmExample.causal_loss_mask(positions).broadcast_axis(rows).astype(jnp.float32),
            attn_mask=AttentionMask.causal(),
        )

    def step(example: Any) -> float:
        nonlocal state
        made = trainer.train_step(state, example)
        state = made.state
        return float(made.loss)

    return Peer(put, step, count(state.model), release("marin-levanter"))


def levanter_model(s: Sizes) -> Any:
    """Its config of a model; its Mixtral does not train (a callback in it has no derivative)."""
    shape = {
        "max_seq_len": s.seq,
        "hidden_dim": s.d,
        "intermediate_dim": s.ff,
        "num_layers": s.layers,
        "num_heads": s.heads,
        "num_kv_heads": s.heads,
        "tie_word_embeddings": False,
        "gradient_checkpointing": False,
        "scan_layers": False,
    }
    if not s.experts:
        from levanter.models.llama import LlamaConfig  # pyright: ignore[reportMissingImports]

        return LlamaConfig(**shape)
    from levanter.models.qwen3_moe import Qwen3MoeConfig  # pyright: ignore[reportMissingImports]

    shape |= {"num_experts": s.experts, "num_experts_per_tok": TOP, "moe_intermediate_dim": s.ff}
    return Qwen3MoeConfig(**shape, head_dim=s.d // s.heads)


def maxtext_fields(s: Sizes, folder: str, *, dense: bool) -> dict[str, Any]:
    """Its config, as fields over base.yml."""
    fields = {
        "run_name": "peer",
        "base_output_directory": folder,
        "hardware": "cpu",
        "skip_jax_distributed_system": "true",
        "dataset_type": "synthetic",
        "enable_checkpointing": "false",
        "steps": 10**6,
        "log_config": "false",
        "per_device_batch_size": s.rows,
        "max_target_length": s.seq,
        "vocab_size": s.vocab,
        "base_emb_dim": s.d,
        "base_num_query_heads": s.heads,
        "base_num_kv_heads": s.heads,
        "head_dim": s.d // s.heads,
        "base_num_decoder_layers": s.layers,
        "base_mlp_dim": s.ff,
        "mlp_activations": "['silu','linear']",
        "attention": "dot_product",
        "dtype": s.dtype,
        "weight_dtype": "float32",
        "remat_policy": "minimal_with_context",
        "scan_layers": "false",
        "opt_type": "adamw",
        "adam_b1": B1,
        "adam_b2": B2,
        "adam_eps": EPS,
        "adam_weight_decay": DECAY,
        "learning_rate": LR,
        "warmup_steps_fraction": 0.0,
        "learning_rate_final_fraction": 1.0,
        "gradient_clipping_threshold": 0.0,
        "logits_via_embedding": "false",
        "enable_dropout": "false",
        "dropout_rate": 0.0,
        "enable_goodput_recording": "false",
        "monitor_goodput": "false",
        "tokenizer_path": "none",
        "sharding_tolerance": 1.0,
        "packing": "false",
        "jax_cache_dir": "",
        "decoder_block": "mixtral" if s.experts else "llama2",
    }
    if s.experts:
        fields |= {"num_experts": s.experts, "num_experts_per_tok": TOP, "base_moe_mlp_dim": s.ff}
        fields |= {"megablox": "false", "sparse_matmul": "false" if dense else "true", "capacity_factor": -1.0}
    return fields


def maxtext(s: Sizes, *, dense: bool) -> Peer:
    """Llama 2, or with experts Mixtral, through MaxText's own step."""
    from flax import nnx
    from maxtext.trainers.pre_train import train  # pyright: ignore[reportMissingImports]
    from maxtext.utils import sharding, train_utils  # pyright: ignore[reportMissingImports]

    folder = tempfile.mkdtemp(prefix="maxtext")
    os.chdir(folder)
    fields = [f"{name}={value}" for name, value in maxtext_fields(s, folder, dense=dense).items()]
    base = importlib.resources.files("maxtext") / "configs" / "base.yml"
    config, recorder, *_ = train.initialize(["", str(base), *fields])
    _, _, shardings, _, mesh, *_, state = train_utils.setup_train_loop(config, recorder)
    graph, state = nnx.split(state)
    weight_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    update, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, train.eval_step, None, weight_shardings
    )
    parameters = count(nnx.split(nnx.merge(graph, state).model, nnx.Param, ...)[1])
    jax.set_mesh(mesh)
    train.logical_axis_rules(config.logical_axis_rules).__enter__()

    def put(batch: Batch) -> Any:
        ones = np.ones_like(batch[0])
        position = np.broadcast_to(np.arange(s.seq, dtype=np.int32), ones.shape)
        fields = {}
        for name, tokens in zip(("inputs", "targets"), batch, strict=True):
            fields |= {name: tokens, f"{name}_position": position, f"{name}_segmentation": ones}
        return jax.device_put(fields, sharding.get_input_data_sharding(config, mesh))

    def step(batch: Any) -> float:
        nonlocal state
        state, metrics = update(state, batch)
        return float(metrics["scalar"]["learning/loss"])

    return Peer(put, step, parameters, release("maxtext"))


def made(name: str, s: Sizes) -> Peer:
    """The peer of a name."""
    match name:
        case "jax" | "jax-dense":
            weights = jax.jit(lambda: drawn(jax.random.key(0), s))()
            return trained(weights, make_loss(s, dense=name == "jax-dense"), "by hand")
        case "nanodo":
            return nanodo(s)
        case "levanter":
            return levanter(s)
        case "maxtext" | "maxtext-dense":
            return maxtext(s, dense=name == "maxtext-dense")
    raise SystemExit(f"no such peer: {name}")


def main(arguments: Sequence[str]) -> None:
    """Says what it is, then answers until stdin ends."""
    name, sizes = arguments
    s = Sizes(**json.loads(sizes))
    peer = made(name, s)
    data = [peer.put(batch) for batch in batches(s)]
    made_so_far = 0

    def step() -> float:
        nonlocal made_so_far
        made_so_far += 1
        return peer.step(data[(made_so_far - 1) % len(data)])

    first_loss = step()
    about = {
        "of": peer.of,
        "first_loss": first_loss,
        "process_start_to_first_step_s": round(time.perf_counter() - START, 2),
        "parameters": peer.parameters,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    serve(about, step)


if __name__ == "__main__":
    main(sys.argv[1:])
