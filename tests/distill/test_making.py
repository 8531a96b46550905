"""What lightning.Trainer refuses is a sentence before a model is loaded."""

import lightning
import pytest
import torch

from rerail.distill.making import check_arguments, check_machine
from rerail.distill.schedule import Schedule
from rerail.distill.settings import RouterKD
from rerail.distill.trainer import trainer_argument_names
from rerail.errors import InputError

SETTINGS = RouterKD(batch_size=4, epochs=2)
SCHEDULE = Schedule.of(16, SETTINGS)
CPU = {"accelerator": "cpu", "devices": 1}

WRONG = {
    "accelerator": ["abc", 3],
    "strategy": [3],
    "devices": [1.5],
    "num_nodes": ["a"],
    "precision": ["abc", 8, "64-true", "bf16-true", "16-true"],
    "logger": ["abc"],
    "callbacks": ["abc", [1]],
    "fast_dev_run": [-1, "a"],
    "max_epochs": [1],
    "min_epochs": ["a"],
    "max_steps": [0, -2, "a"],
    "min_steps": [1.5],
    "max_time": ["abc", {"seconds": "x"}, {"abc": 1}],
    "limit_train_batches": [0, 0.0, -1, 1.5, True],
    "limit_val_batches": [0, -1],
    "limit_test_batches": [-1, "a"],
    "limit_predict_batches": [-5],
    "overfit_batches": [-1, 2.5],
    "val_check_interval": [0, -1, 1000, "abc"],
    "check_val_every_n_epoch": [0, -1, 100, 1.5],
    "num_sanity_val_steps": [0],
    "log_every_n_steps": ["a"],
    "enable_checkpointing": [True],
    "enable_progress_bar": ["abc", 1],
    "enable_model_summary": [True],
    "accumulate_grad_batches": [2],
    "gradient_clip_val": ["abc"],
    "gradient_clip_algorithm": ["abc"],
    "deterministic": ["abc", 1],
    "benchmark": ["abc"],
    "inference_mode": ["x"],
    "use_distributed_sampler": [True],
    "profiler": ["abc"],
    "detect_anomaly": ["a"],
    "barebones": [True],
    "plugins": ["abc", [1]],
    "sync_batchnorm": ["a"],
    "reload_dataloaders_every_n_epochs": [1],
    "default_root_dir": [3],
    "enable_autolog_hparams": ["a"],
    "model_registry": [3],
}


def test_every_argument_of_the_trainer_is_tried():
    assert WRONG.keys() == set(trainer_argument_names())


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_cannot_be_used_is_a_sentence(name):
    for value in WRONG[name]:
        with pytest.raises(InputError, match=r"^trainer[.:]") as refused:
            check_arguments({**CPU, name: value}, SCHEDULE, SETTINGS)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["devices", "num_nodes", "accelerator"])
def test_what_this_machine_or_one_process_has_not_is_a_sentence(name):
    values = {
        "devices": ["abc", 0, -1, 2, "2", [0]],
        "num_nodes": [0, 2],
        "accelerator": ["mps", "tpu"],
    }
    for value in values[name]:
        check_arguments({**CPU, name: value}, SCHEDULE, SETTINGS)  # another machine may have it
        with pytest.raises(InputError, match=r"^trainer[.:]"):
            check_machine({**CPU, name: value}, SCHEDULE, SETTINGS)


def test_trainers_that_can_be_made_are_and_leave_the_flags_of_torch_alone():
    for trainer in ({"deterministic": True}, {"benchmark": True}, {"precision": "bf16-mixed"}):
        check_arguments({**CPU, **trainer}, SCHEDULE, SETTINGS)
        check_machine({**CPU, **trainer}, SCHEDULE, SETTINGS)
        assert not torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    for trainer in ({}, {"strategy": "fsdp2", "devices": 8}, {"callbacks": lightning.Callback()}):
        check_arguments(trainer, SCHEDULE, SETTINGS)
