"""The same decoding by transformers: run by decode.py with --peer, in an environment that has torch.

A Llama of the same sizes with random weights, greedy, nothing ends a text early.
"""

import json
import sys

import torch  # pyright: ignore[reportMissingImports]  it is in the peer's environment alone
import transformers  # pyright: ignore[reportMissingImports]
from turns import serve


def main() -> None:
    """Says what it is, then answers until stdin ends."""
    spec = json.loads(sys.argv[1])
    config = transformers.LlamaConfig(
        hidden_size=spec["d_model"],
        intermediate_size=spec["d_ff"],
        num_hidden_layers=spec["n_layers"],
        num_attention_heads=spec["n_heads"],
        num_key_value_heads=spec["n_heads"],
        vocab_size=spec["vocab_size"],
        max_position_embeddings=spec["prompt"] + spec["new"],
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(5, spec["vocab_size"], (spec["rows"], spec["prompt"]))
    seen = torch.ones_like(tokens)
    about = {
        "of": "transformers",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
    }

    def texts() -> None:
        with torch.inference_mode():
            made = model.generate(tokens, attention_mask=seen, max_new_tokens=spec["new"], do_sample=False)
        assert made.shape == (spec["rows"], spec["prompt"] + spec["new"]), made.shape

    texts()
    serve(about, texts)


if __name__ == "__main__":
    main()
