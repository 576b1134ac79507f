"""Runs `peft-limits validate` on a recorded step and reads its report."""

import json
import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field


class NotJudged(ValueError):
    """The program refused the dump: its message says what is missing or not supported."""


def program():
    """Path of the program: PEFT_LIMITS, that of the wheel, or the one on the PATH."""
    name = "peft-limits" + (".exe" if os.name == "nt" else "")
    inside = [
        os.path.join(sysconfig.get_path("scripts", scheme), name)
        for scheme in (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    ]
    for path in [os.environ.get("PEFT_LIMITS"), *inside, shutil.which(name)]:
        if path and os.path.isfile(path):
            return path
    raise FileNotFoundError(
        "the program peft-limits is neither in this Python environment nor on the PATH; PEFT_LIMITS may name it"
    )


def require_known(config):
    """Raises NotJudged for a config.json of a model that the program does not know; without the program nothing is asked."""
    try:
        done = subprocess.run(
            [program(), "memory", "--config", config, "--json"], capture_output=True, text=True
        )
    except OSError:
        return
    # Other refusals are of the prediction, not of the model.
    if done.returncode == 2 and "config.json" in done.stderr:
        what = done.stderr.strip().split("config.json: ", 1)[-1]
        raise NotJudged(f"the model's config: {what}; check_step judges the backward of any model")


@dataclass
class Report:
    """What `peft-limits validate --json` says."""

    name: str
    passed: bool
    rungs: list
    diagnoses: list
    own_forward: dict | None = None
    rest: dict = field(default_factory=dict)

    @property
    def faults(self):
        """Names of the faults that were found, the best explanation first."""
        return [d["fault"] for d in self.diagnoses]

    def __str__(self):
        lines = [f"peft-limits: {self.name}: {'PASS' if self.passed else 'FAIL'}"]
        for rung in self.rungs:
            share = max(
                (t["share"] if t["share"] is not None else float("inf") for t in rung["tensors"]),
                default=None,
            )
            note = f"share {share:.3g} of the tolerance" if share is not None else ""
            if rung["status"] == "skipped":
                note = rung["why"]
            lines.append(f"  {rung['name']:<18} {rung['status']:<8} {note}".rstrip())
            lines += [f"  {'':<18} {problem}" for problem in rung["problems"][:2]]
        if self.own_forward:
            lines.append(
                f"  {'own forward':<18} {self.own_forward['status'].replace('_', ' '):<8} {self.own_forward['why']}"
            )
        for d in self.diagnoses:
            lines += [f"  {d['fault']}: {d['what']}", f"      {d['fix']}"]
        return "\n".join(lines)


def validate(dump, *options):
    """Validates a dump; further options are those of the command line. Raises NotJudged where the program refuses it."""
    done = subprocess.run(
        [program(), "validate", str(dump), *options, "--json"], capture_output=True, text=True
    )
    if done.returncode not in (0, 1):
        raise NotJudged(
            done.stderr.strip().removeprefix("peft-limits: ") or f"exit code {done.returncode}"
        )
    found = json.loads(done.stdout)
    known = {
        k: found.pop(k)
        for k in ("name", "passed", "rungs", "diagnoses", "own_forward")
        if k in found
    }
    return Report(**known, rest=found)
