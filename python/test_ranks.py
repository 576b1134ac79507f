#!/usr/bin/env python3
"""Steps of several processes (torch.distributed, gloo) through the recorder and `peft-limits validate`.

    PEFT_LIMITS=target/release/peft-limits python python/test_ranks.py

Needs torch, transformers and peft. Makes every dump of tests/data/ranks anew, in a temporary folder: right ones pass, and the
planted fault is named first. RANK_DUMPS names the script that makes them, where this file was copied elsewhere.
"""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import unittest

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from peft_limits import NotJudged, Report, ValidateCallback, dump_step, validate  # noqa: E402
from small_models import llama, lora, padded  # noqa: E402

SCRIPT = os.environ.get("RANK_DUMPS") or os.path.join(
    os.path.dirname(os.path.abspath(__file__)), "../tests/data/ranks/make_dumps.py"
)
spec = importlib.util.spec_from_file_location("make_dumps", SCRIPT)
make_dumps = importlib.util.module_from_spec(spec)
sys.modules["make_dumps"] = make_dumps
spec.loader.exec_module(make_dumps)


def planted(name):
    """The fault in a dump's name."""
    fault = name.split("/")[1]
    for end in ("-f32", "-bf16", "-replicas", "-adapter", "-mlp", "-attention", "-alone"):
        fault = fault.removesuffix(end)
    return fault


def small():
    import peft

    return peft.get_peft_model(llama(layers=2), lora())


def train(settings, folder):
    """One process of a Trainer; the first writes what the callback reports."""
    import transformers

    lengths = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(24):
        ids = torch.randint(
            3, 61, (int(torch.randint(5, 25, (1,), generator=lengths)),), generator=lengths
        ).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)})

    callback = ValidateCallback(folder=os.path.join(folder, "dumps"), out=io.StringIO())
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-3,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        **settings,
    )
    transformers.Trainer(
        small(), arguments, train_dataset=rows, data_collator=padded, callbacks=[callback]
    ).train()
    if int(os.environ["RANK"]) == 0:
        with open(os.path.join(folder, "reports.json"), "w") as file:
            json.dump(
                [
                    [isinstance(r, Report), getattr(r, "passed", None), str(r)]
                    for r in callback.reports
                ],
                file,
            )


def one_fails(rank, size, folder):
    """Rank 1 cannot record; all go on training."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    if rank == 1:
        os.makedirs(f"{folder}/dump/rank-1.writing")
        open(f"{folder}/dump/rank-1", "w").close()
    wrapped = torch.nn.parallel.DistributedDataParallel(small())
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    with dump_step(wrapped, f"{folder}/dump") as step:
        ids = torch.randint(0, 61, (2, 7 + rank))
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert (step.error is not None) == (rank == 1), step.error
    if rank == 1:
        os.remove(f"{folder}/dump/rank-1")
    dist.barrier()
    dist.destroy_process_group()


class RanksTest(unittest.TestCase):
    def folder(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return folder.name

    def test_right_steps_pass_and_faults_are_named_first(self):
        folder = self.folder()
        make_dumps.make(list(make_dumps.DUMPS), folder)
        for name in make_dumps.DUMPS:
            with self.subTest(name):
                report = validate(os.path.join(folder, name))
                if name.startswith("clean/"):
                    self.assertTrue(report.passed and not report.faults, str(report))
                else:
                    self.assertFalse(report.passed)
                    self.assertEqual(report.faults[:1], [planted(name)], str(report))

    def test_trainer_under_torchrun(self):
        for settings in (
            {},
            {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05},
            {"bf16": True},
            {"average_tokens_across_devices": False},
        ):
            with self.subTest(**settings):
                folder = self.folder()
                command = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node",
                    "2",
                    os.path.abspath(__file__),
                    "--trainer",
                    json.dumps(settings),
                    folder,
                ]
                done = subprocess.run(command, capture_output=True, text=True, timeout=600)
                self.assertEqual(done.returncode, 0, done.stderr[-3000:])
                with open(os.path.join(folder, "reports.json")) as file:
                    reports = json.load(file)
                self.assertEqual(len(reports), 2, reports)
                for judged, passed, text in reports:
                    self.assertTrue(judged and passed, text)

    def test_a_process_that_cannot_record_holds_nobody_up(self):
        folder = self.folder()
        mp.spawn(one_fails, args=(2, folder), nprocs=2)
        with self.assertRaises(NotJudged) as refused:
            validate(os.path.join(folder, "dump"))
        self.assertRegex(str(refused.exception), "rank-1.*exists already")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--trainer"]:
        train(json.loads(sys.argv[2]), sys.argv[3])
    else:
        unittest.main()
