"""NF4 as bitsandbytes computes it on the CPU: make_nf4.py OUT.safetensors.

Blocks of 64, scales as they are and doubly quantized; f32 and bf16 weights, an odd number of entries, more than 256 blocks
with an outlier, and blocks of zeros. Needs torch, safetensors and bitsandbytes.
"""

import sys

import bitsandbytes
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

CASES = {
    "f32": ((24, 96), torch.float32),
    "bf16": ((40, 64), torch.bfloat16),
    "odd": ((7, 33), torch.float32),
    "large": ((128, 256), torch.float32),
    "zeros": ((5, 70), torch.float32),
}


def case(name, generator):
    shape, dtype = CASES[name]
    weight = (torch.randn(shape, generator=generator) * 0.1).to(dtype)
    if name == "zeros":
        weight[1:3] = 0
        weight.view(-1)[320:] = 0
    else:
        weight.view(-1)[5] = 3.0
    tensors = {"weight": weight}
    for kind in ("single", "double"):
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=kind == "double", quant_type="nf4"
        )
        tensors[f"{kind}.packed"] = packed
        tensors[f"{kind}.absmax"] = state.absmax
        tensors[f"{kind}.dequantized"] = functional.dequantize_4bit(packed, state)
        if kind == "double":
            tensors["double.offset"] = state.offset.reshape(1)
            tensors["double.nested_absmax"] = state.state2.absmax
            tensors["double.nested_code"] = state.state2.code
    return {f"{name}.{key}": value for key, value in tensors.items()} | {"code": state.code}


def main():
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name in CASES:
        tensors |= case(name, generator)
    versions = f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__.split('+')[0]}"
    save_file(
        {n: t.contiguous().clone() for n, t in tensors.items()},
        sys.argv[1],
        metadata={"made_by": versions},
    )


if __name__ == "__main__":
    main()
