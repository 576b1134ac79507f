"""Reads the tables that the experiments saved, for the notebooks. Nothing is computed again here."""

import json
from pathlib import Path

import pandas as pd

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "Cargo.toml").exists())


class Tables:
    """Tables of one results folder ("figures" or "figures/quick"), of the other one where that has none."""

    def __init__(self, results="figures"):
        self.folders = [ROOT / results, ROOT / "figures", ROOT / "figures" / "quick"]

    def read(self, experiment, columns):
        """The named columns of an experiment's table; prints which profile made it, when, and how long that took."""
        for folder in self.folders:
            folder = folder / experiment
            if (folder / "table.csv").exists():
                made = json.loads((folder / "manifest.json").read_text())
                print(
                    f"{experiment}: {made['profile']} profile of {made['started_at'][:10]}, {made['wall_seconds']:.0f} s"
                )
                table = pd.read_csv(folder / "table.csv", usecols=columns)[columns]
                # Text that looks like a number or a formula is written with a quote before it.
                return table.map(lambda x: x.removeprefix("'") if isinstance(x, str) else x)
        raise FileNotFoundError(
            f"no table of {experiment}: run `cargo run --release --bin {experiment}` first"
        )
