#!/usr/bin/env python3
"""Reads what peft-limits wrote: gradients of a head, and the table of an experiment.

    peft-limits gradient tests/data/attention_small.safetensors --method dense -o grads.safetensors
    python python/read_gradients.py grads.safetensors tests/data/attention_small.safetensors
    python python/read_gradients.py grads.safetensors --table figures/crossover/table.csv

With a reference file (your kernel's output under the same names), prints the relative gap of every shared tensor.
Needs numpy and safetensors; --table needs pandas.
"""

import argparse

import numpy as np
from safetensors.numpy import load_file


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gradients", help="what `peft-limits gradient -o` wrote")
    parser.add_argument("reference", nargs="?", help="tensors to compare with, by the same names")
    parser.add_argument("--table", help="table.csv of an experiment")
    arguments = parser.parse_args()

    gradients = load_file(arguments.gradients)
    reference = load_file(arguments.reference) if arguments.reference else {}
    for name, value in sorted(gradients.items()):
        line = (
            f"{name:6} {str(value.dtype):8} {str(value.shape):12} norm {np.linalg.norm(value):.6e}"
        )
        if name in reference and reference[name].shape == value.shape:
            gap = np.linalg.norm(value - reference[name]) / max(
                np.linalg.norm(reference[name]), np.finfo(float).tiny
            )
            line += f"  gap {gap:.1e}"
        print(line)

    if arguments.table:
        import pandas as pd

        print(pd.read_csv(arguments.table).to_string(max_rows=8, max_cols=None))


if __name__ == "__main__":
    main()
