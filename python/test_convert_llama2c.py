"""Converted checkpoints give the logits of llama2.c's own forward pass, written here after run.c.

python -m unittest python/test_convert_llama2c.py        # needs numpy, safetensors, torch, transformers
"""

import os
import struct
import subprocess
import sys
import tempfile
import unittest

import numpy as np
import torch
import transformers

HERE = os.path.dirname(os.path.abspath(__file__))
SIZES = dict(
    dim=24, hidden_dim=20, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=16
)


def weights(shared):
    rng = np.random.default_rng(3)
    d, f, n, h, g, v, t = SIZES.values()
    width = d // h
    normal = lambda *shape: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype("<f4")
    w = [
        normal(v, d),
        1 + normal(n, d),
        normal(n, d, d),
        normal(n, g * width, d),
        normal(n, g * width, d),
        normal(n, d, d),
    ]
    w += [1 + normal(n, d), normal(n, f, d), normal(n, d, f), normal(n, f, d), 1 + normal(d)]
    w += [np.zeros((t, width // 2), "<f4"), np.zeros((t, width // 2), "<f4")]
    return w if shared else w + [normal(v, d)]


def forward(w, tokens):
    """Logits of every position: rotation of neighbouring coordinates, keys and values shared by groups of heads."""
    d, _, n, h, g, _, _ = SIZES.values()
    width = d // h
    emb, norm1, wq, wk, wv, wo, norm2, w1, w2, w3, final = (a.astype(np.float64) for a in w[:11])
    rms = lambda x, gain: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain
    x = emb[tokens]
    angle = np.arange(len(tokens))[:, None] * 10000.0 ** (-2.0 * np.arange(width // 2) / width)

    def rotate(a):
        even, odd = a[..., 0::2], a[..., 1::2]
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.stack([even * c - odd * s, even * s + odd * c], -1).reshape(a.shape)

    for i in range(n):
        y = rms(x, norm1[i])
        q = rotate((y @ wq[i].T).reshape(-1, h, width))
        k = rotate((y @ wk[i].T).reshape(-1, g, width))
        v = (y @ wv[i].T).reshape(-1, g, width)
        out = np.zeros_like(q)
        for head in range(h):
            s = q[:, head] @ k[:, head * g // h].T / np.sqrt(width)
            s[np.triu_indices(len(tokens), 1)] = -np.inf
            p = np.exp(s - s.max(1, keepdims=True))
            out[:, head] = p / p.sum(1, keepdims=True) @ v[:, head * g // h]
        x = x + out.reshape(-1, d) @ wo[i].T
        y = rms(x, norm2[i])
        gate = y @ w1[i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w3[i].T)) @ w2[i].T
    return rms(x, final) @ (w[13].astype(np.float64) if len(w) > 13 else emb).T


class Conversion(unittest.TestCase):
    def convert(self, folder, w, shared, cut=0):
        header = list(SIZES.values())
        header[5] *= 1 if shared else -1
        data = struct.pack("<7i", *header) + b"".join(a.tobytes() for a in w)
        with open(os.path.join(folder, "m.bin"), "wb") as file:
            file.write(data[: len(data) - cut])
        pieces = ["<unk>", "\n<s>\n", "\n</s>\n"] + [f"<0x{i:02X}>" for i in range(256)]
        scored = [(p, 0.0) for p in pieces] + [
            (p, -float(i)) for i, p in enumerate(["ab", " a", " ab", "abc"])
        ]
        singles = [c for c in " abc"]
        scored += [(c, -1e6 - i) for i, c in enumerate(singles)]
        scored += [(f"unused{i}", -2e6 - i) for i in range(SIZES["vocab_size"] - len(scored))]
        with open(os.path.join(folder, "t.bin"), "wb") as file:
            file.write(struct.pack("<I", 9))
            for text, score in scored:
                file.write(struct.pack("<fi", score, len(text.encode())) + text.encode())
        command = [
            sys.executable,
            os.path.join(HERE, "convert_llama2c.py"),
            os.path.join(folder, "m.bin"),
        ]
        command += [
            "--tokenizer",
            os.path.join(folder, "t.bin"),
            "--out",
            os.path.join(folder, "hf"),
        ]
        return subprocess.run(command, capture_output=True, text=True)

    def test_logits_and_tokens(self):
        tokens = np.array([1, 7, 299, 40, 3, 3, 150])
        for shared in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                w = weights(shared)
                done = self.convert(folder, w, shared)
                self.assertEqual(done.returncode, 0, done.stderr)
                model = (
                    transformers.AutoModelForCausalLM.from_pretrained(os.path.join(folder, "hf"))
                    .double()
                    .eval()
                )
                with torch.no_grad():
                    got = model(torch.tensor(tokens[None])).logits[0].numpy()
                want = forward(w, tokens)
                self.assertLess(np.linalg.norm(got - want) / np.linalg.norm(want), 1e-6)
                # " abc" is merged by score: "ab" first, then " ab"; "abc" comes too late. "e" falls back to its byte.
                encode = transformers.PreTrainedTokenizerFast(
                    tokenizer_file=os.path.join(folder, "hf/tokenizer.json")
                )
                pieces = encode.convert_ids_to_tokens(encode("abce").input_ids)
                self.assertEqual(pieces, ["<s>", "\u2581ab", "c", "<0x65>"])

    def test_a_short_file_is_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            done = self.convert(folder, weights(True), True, cut=4)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("bytes", done.stderr)
            self.assertFalse(os.path.exists(os.path.join(folder, "hf")))


if __name__ == "__main__":
    unittest.main()
