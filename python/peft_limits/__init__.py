"""Records steps of PyTorch trainers and judges them with `peft-limits validate`.

| name | what | file |
|---|---|---|
| dump_step | records a step into a folder | recorder.py |
| check_step | backward against differences of the trainer's own forward | differences.py |
| validate | runs the program on a recorded step | report.py |
| ValidateCallback | all of it in one line of a Transformers or TRL trainer | callback.py |

Nothing is imported before it is used: `validate` needs no torch, and only the callback needs transformers.
"""

import importlib

__all__ = [
    "CheckResult",
    "NotJudged",
    "Report",
    "ValidateCallback",
    "check_step",
    "dump_step",
    "trainable_snapshot",
    "validate",
]

PLACES = {
    "callback": ("ValidateCallback",),
    "differences": ("CheckResult", "check_step"),
    "recorder": ("dump_step", "trainable_snapshot"),
    "report": ("NotJudged", "Report", "validate"),
}


def __getattr__(name):
    for module, names in PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
