"""What `make_accelerator` refuses, and the helpers beside it."""

import json
import os
import time

import pytest
import torch
import yaml
from harness import ROOT
from test_update import fresh_accelerate_state  # noqa: F401  (an autouse fixture)

from cpikan_hr import doctor
from cpikan_hr.errors import UserError
from cpikan_hr.training import backend, operators
from cpikan_hr.training.backend import make_accelerator

FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def deepspeed_file(monkeypatch, tmp_path, config: dict | str):
    path = tmp_path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))


def test_without_a_launcher_there_is_one_process():
    accelerator = make_accelerator()
    assert accelerator.num_processes == 1 and accelerator.is_main_process
    assert backend.precision_of(accelerator) == "no"


def test_ranks_that_were_launched_but_do_not_meet_are_refused(monkeypatch):
    """`accelerate launch` without a process group: every rank would believe to be the only one."""
    accelerator = make_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched, torch.distributed joins 1 and Accelerate counts 1"):
        backend._check_ranks(accelerator)


def test_ranks_that_accelerate_does_not_count_are_refused(monkeypatch):
    accelerator = make_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="torch.distributed joins 2 and Accelerate counts 1"):
        backend._check_ranks(accelerator)


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="precision 'half' is not one of no, bf16, fp16"):
        make_accelerator(precision="half")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{\n 'a': 1}", "line 2 is not JSON"),
        ({"bf16": {}}, "has no zero_optimization section"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "bf16.enabled casts parameters"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "would round parameters to bf16"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "remove the optimizer section"),
    ],
)
def test_a_deepspeed_file_that_would_mislead_is_refused_by_name(monkeypatch, tmp_path, config, message):
    deepspeed_file(monkeypatch, tmp_path, config)
    with pytest.raises(UserError, match=r"ds\.json: .*" + message):
        make_accelerator()


def test_a_missing_deepspeed_file_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds_configs/zero9.json")
    with pytest.raises(UserError, match=r"ds_configs/zero9\.json: no such file"):
        make_accelerator()


def test_the_checkout_s_deepspeed_files_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds_configs/zero3.json")
    assert backend._read_deepspeed_config()["zero_optimization"]["stage"] == 3


def test_the_recipe_s_values_are_written_into_deepspeed_s_configuration(tmp_path):
    file = json.loads((ROOT / "ds_configs/zero3_nvme.json").read_text())
    config = backend._complete(file, "bf16", accumulate=4, clip=0.5, offload_folder=tmp_path)
    assert config["gradient_accumulation_steps"] == 4 and config["gradient_clipping"] == 0.5
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert config["zero_optimization"]["offload_optimizer"]["nvme_path"] == str((tmp_path / "nvme").resolve())
    assert backend._precision_of_config(config, "no") == "bf16"


def test_nvme_offload_without_libaio_says_what_to_install(monkeypatch):
    monkeypatch.setattr(operators, "is_built", lambda name: False)
    monkeypatch.setattr(operators, "libaio_headers", lambda: False)
    file = json.loads((ROOT / "ds_configs/zero3_nvme.json").read_text())
    with pytest.raises(UserError, match="apt-get install libaio-dev; make install"):
        backend._refuse_missing_libaio(file)


def test_shipped_deepspeed_files_leave_nothing_to_guess():
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert '"auto"' not in path.read_text(), path
        assert json.loads(path.read_text())["torch_autocast"]["lower_precision_safe_modules"] == []


def test_a_lock_is_stale_when_it_is_old_and_nobody_works_beside_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert operators.stale_locks() == []  # young: its build may just have begun
    os.utime(lock, (time.time() - 3600,) * 2)
    assert operators.stale_locks() == [lock]
    with pytest.raises(UserError, match=f"rm {lock}"):
        operators.refuse_stale_locks()
    monkeypatch.chdir(lock.parent)  # now somebody does
    assert operators.stale_locks() == []


def test_doctor_names_a_stale_lock_and_returns_2(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    assert doctor.doctor() == 2
    assert f"rm {lock}" in capsys.readouterr().out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_doctor_finds_nothing_wrong_with_the_shipped_files(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert doctor.launch_file_faults(yaml.safe_load(path.read_text())) == []


def test_doctor_knows_the_traps_of_launch_files():
    faults = doctor.launch_file_faults({"distributed_type": "MULTI_CPU"})
    assert len(faults) == 1 and "expects MPI" in faults[0]
    config = {"distributed_type": "DEEPSPEED", "mixed_precision": "bf16", "deepspeed_config": {"zero3_init_flag": True}}
    assert len(doctor.launch_file_faults(config)) == 3


def test_every_shipped_file_has_its_row_in_the_documentation():
    text = (ROOT / "docs" / "backends.md").read_text()
    assert [path.stem for path in FILES if f"| `{path.stem}` |" not in text] == []
