"""A torch model that trains on random tokens, as a worker of compare.py: peers_torch.py NAME SIZES

NAME is plain (hand-written: RMSNorm, rotary positions, SwiGLU or a loop over experts, torch's own attention and fused
AdamW), or a model of transformers: llama, bert, modernbert, mixtral; with -compile, through torch.compile. SIZES is
JSON, as compare.py makes it. bfloat16 is autocast over float32 weights.
"""

import json
import sys
import time

import torch  # pyright: ignore[reportMissingImports]  it is in the peer's environment alone
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from sizes import BATCHES, MASK, NOT_PREDICTED, SPECIAL, TOP, Sizes
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]
from turns import CORES, serve

START = time.perf_counter()


class Rotary(nn.Module):
    """Turns pairs of channels by their position."""

    def __init__(self, seq: int, channels: int) -> None:
        super().__init__()
        turns = torch.outer(torch.arange(seq).float(), 10000.0 ** -(torch.arange(0, channels, 2) / channels))
        self.register_buffer("cos", turns.cos(), persistent=False)
        self.register_buffer("sin", turns.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x turned."""
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1)


class Attention(nn.Module):
    """Torch's own, with no weights but those of its four projections."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.heads, self.causal = s.heads, s.masked is None
        self.qkv = nn.Linear(s.d, 3 * s.d, bias=False)
        self.out = nn.Linear(s.d, s.d, bias=False)
        self.rotary = Rotary(s.seq, s.d // s.heads)

    def forward(self, x: Tensor) -> Tensor:
        """What each position brings together."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


class SwiGLU(nn.Module):
    """A gated MLP."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.up = nn.Linear(s.d, 2 * s.ff, bias=False)
        self.down = nn.Linear(s.ff, s.d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The MLP of each position."""
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Experts(nn.Module):
    """Two experts for each token, none dropped, one expert after the other."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.router = nn.Linear(s.d, s.experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(s) for _ in range(s.experts))

    def forward(self, x: Tensor) -> Tensor:
        """Each position's two experts, weighted."""
        flat = x.reshape(-1, x.shape[-1])
        gates, chosen = self.router(flat).float().softmax(-1).topk(TOP, -1)
        gates = (gates / gates.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(flat[token]) * gates[token, slot, None])
        return out.view_as(x)


class Layer(nn.Module):
    """Attention and an MLP, each after a norm and beside the residual stream."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.RMSNorm(s.d), nn.RMSNorm(s.d)
        self.attention = Attention(s)
        self.mlp = Experts(s) if s.experts else SwiGLU(s)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream after this layer."""
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))


class Plain(nn.Module):
    """What one would write by hand, and its loss."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(s.vocab, s.d)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.d)
        self.head = nn.Linear(s.d, s.vocab, bias=False)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of what is predicted."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NOT_PREDICTED)


class Loss(nn.Module):
    """A model of transformers, as one that gives its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of what is predicted."""
        return self.model(input_ids=tokens, labels=targets).loss


def of_transformers(name: str, s: Sizes) -> nn.Module:
    """Of the same sizes, with random weights; a plain MLP has as many weights as the gated one."""
    import transformers  # pyright: ignore[reportMissingImports]

    shape = {
        "vocab_size": s.vocab,
        "hidden_size": s.d,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "max_position_embeddings": s.seq,
        "attn_implementation": "sdpa",
        "tie_word_embeddings": False,
    }
    decoder = {"intermediate_size": s.ff, "num_key_value_heads": s.heads, "use_cache": False}
    match name:
        case "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **decoder))
        case "mixtral":
            # Asked for by name, it is an error where it is missing, and no slower way is taken silently.
            grouped = {
                "num_local_experts": s.experts,
                "num_experts_per_tok": TOP,
                "experts_implementation": "grouped_mm",
            }
            mixtral = transformers.MixtralConfig(**shape, **decoder, **grouped, sliding_window=None)
            return transformers.MixtralForCausalLM(mixtral)
        case "bert":
            no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            bert = transformers.BertConfig(**shape, **no_dropout, intermediate_size=s.ff * 3 // 2)
            return transformers.BertForMaskedLM(bert)
        case "modernbert":
            special = {f"{which}_token_id": i for i, which in enumerate(("pad", "bos", "eos", "cls", "sep"))}
            modernbert = transformers.ModernBertConfig(**shape, **special, intermediate_size=s.ff)
            return transformers.ModernBertForMaskedLM(modernbert)
    raise SystemExit(f"no such peer: {name}")


def batches(s: Sizes, *, shifted: bool) -> list[tuple[Tensor, Tensor]]:
    """Tokens and targets of some steps; shifted by one where the model does not do that itself."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(BATCHES):
        rows = torch.randint(SPECIAL, s.vocab, (s.rows, s.seq + 1), generator=draw)
        if s.masked is None:
            made.append((rows[:, :-1], rows[:, 1:]) if shifted else (rows[:, :-1], rows[:, :-1]))
            continue
        tokens = rows[:, :-1]
        hidden = torch.rand(tokens.shape, generator=draw) < s.masked
        made.append((torch.where(hidden, MASK, tokens), torch.where(hidden, tokens, NOT_PREDICTED)))
    return made


def main() -> None:
    """Says what it is, then answers until stdin ends."""
    s = Sizes(**json.loads(sys.argv[2]))
    name, _, mode = sys.argv[1].partition("-")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_num_threads(CORES)
    if device.type == "cuda":
        # As JAX does there by itself.
        torch.set_float32_matmul_precision("high")
    model = (Plain(s) if name == "plain" else Loss(of_transformers(name, s))).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    data = [tuple(x.contiguous().to(device) for x in batch) for batch in batches(s, shifted=name == "plain")]
    forward = torch.compile(model) if mode == "compile" else model
    count = 0

    def step() -> float:
        nonlocal count
        tokens, targets = data[count % len(data)]
        count += 1
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=s.dtype == "bfloat16"):
            loss = forward(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    first_loss = step()
    about = {
        "of": f"torch {torch.__version__}",
        "first_loss": first_loss,
        "process_start_to_first_step_s": round(time.perf_counter() - START, 2),
        "parameters": sum(each.numel() for each in model.parameters()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
    serve(about, step)


if __name__ == "__main__":
    main()
