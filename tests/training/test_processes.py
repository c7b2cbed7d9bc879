"""Training on several processes and machines."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ezhoi_diffusion.training.trainer import TrainingError, train
from helpers import TESTS
from helpers.miniature import free_port
from helpers.trainings import OVERFIT, QUICK, equal, facts, few, low_rank, weights


def test_one_process_instead_of_several_is_refused(tmp_path, monkeypatch):
    """The environment is that of the one process that `accelerate launch --cpu --num_processes 2` starts."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(TrainingError, match="add --multi_gpu"):
        train(low_rank(), QUICK, tmp_path / "out")


def test_gradient_accumulation_and_compilation_of_the_environment_change_nothing(tmp_path, monkeypatch):
    train(low_rank(), QUICK, tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(low_rank(), QUICK, tmp_path / "other")
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "other"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set.*RANK, WORLD_SIZE is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP asks"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED asks"),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, "ACCELERATE_TORCH_DEVICE=meta names a device without values"),
    ],
)
def test_an_environment_that_would_change_the_training_is_refused(tmp_path, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=message):
        train(low_rank(), QUICK, tmp_path / "out")


SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.training.processes import exit_distributed
from ezhoi_diffusion.training.trainer import train
from helpers.trainings import OVERFIT, few
torch.set_num_threads(1)
out, resume, change = json.loads(sys.argv[1])
try:
    train(few(), replace(OVERFIT, **change), Path(out), resume=resume)
    exit_distributed()
except EzhoiDiffusionError as error:
    sys.exit(f"refused: {error}")
"""


def machines(tmp_path, *outs, resume=False, changes=({}, {})):
    """Train on two machines of one process each, as accelerate's documentation starts them, and wait for both."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes",
             "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port,
             str(script), json.dumps([str(out), resume, change])],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS / "training"), *sys.path))},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, (out, change) in enumerate(zip(outs, changes, strict=True))
    ]  # fmt: skip
    said = [process.communicate(timeout=200)[0] for process in started]
    return [process.returncode for process in started], said


@pytest.mark.slow
def test_two_machines_stop_and_resume_as_one_process_and_only_one_sees_the_folder(tmp_path):
    near, far = tmp_path / "near", tmp_path / "file" / "far"
    (tmp_path / "file").write_text("the second machine cannot make a folder here")
    one = train(few(), OVERFIT, tmp_path / "one")
    ended, said = machines(tmp_path, near, far)
    assert ended == [0, 0], said
    assert facts(near)["processes"] == 2
    assert facts(near)["step"] == facts(one)["step"] < 60
    first = weights(near)
    assert all(torch.allclose(value, first[name], atol=1e-5) for name, value in weights(one).items())

    patient = {"patience": 6}
    one = train(few(), replace(OVERFIT, **patient), tmp_path / "one", resume=True)
    ended, said = machines(tmp_path, near, far, resume=True, changes=(patient, patient))
    assert ended == [0, 0], said
    assert facts(near)["step"] == facts(one)["step"]
    found = weights(near)
    assert all(torch.allclose(value, found[name], atol=1e-5) for name, value in weights(one).items())


@pytest.mark.slow
def test_machines_with_different_flags_are_refused(tmp_path):
    ended, said = machines(tmp_path, tmp_path / "a", tmp_path / "b", changes=({}, {"learning_rate": 0.5}))
    assert 0 not in ended
    assert "refused: the processes differ in learning_rate: 0.01 here, 0.5 in process 1" in said[0]
    assert "refused: the processes differ in learning_rate: 0.5 here, 0.01 in process 0" in said[1]
    assert not (tmp_path / "a").exists()
