"""What training takes of Transformers' Trainer, TRL, PEFT and Accelerate is as the installed ones have it."""

import importlib
import inspect
import pkgutil
import re
from dataclasses import fields

import hf_moe.training
import pytest
import trl
from hf_moe.training import host, host_trl
from transformers import Trainer

from hf_moe.model.host import arguments, differences

TABLES = host.PRIVATE | host_trl.owned()
ROWS = [
    pytest.param(owner, name, written, id=f"{owner.__name__.rpartition('.')[2]}.{name}")
    for owner, methods in TABLES.items()
    for name, (written, _) in methods.items()
]


@pytest.mark.parametrize(("owner", "name", "written"), ROWS)
def test_the_host_calls_it_as_written(owner, name, written):
    assert arguments(getattr(owner, name)) == written


def classes():
    """Every class of hf_moe.training."""
    found = set()
    for module in pkgutil.walk_packages(hf_moe.training.__path__, "hf_moe.training."):
        names = vars(importlib.import_module(module.name)).values()
        found |= {x for x in names if isinstance(x, type) and x.__module__.startswith("hf_moe.training")}
    return found


def overridden():
    """Owner -> names of its private methods that a class of ours overrides, as itself or as a part of another."""
    found = {}
    for ours in classes():
        theirs = [
            base for base in ours.__mro__ if base.__module__.split(".")[0] in ("transformers", "trl", "accelerate")
        ]
        for part in ours.__mro__:
            if part.__module__.startswith("hf_moe.training"):
                for name in vars(part):
                    owner = next((base for base in theirs if name in vars(base)), None)
                    if name.startswith("_") and not name.startswith("__") and owner is not None:
                        found.setdefault(owner, set()).add(name)
    return found


def test_every_private_method_that_is_overridden_is_listed():
    found = {
        (owner.__name__, name) for owner, names in overridden().items() for name in names if callable_of(owner, name)
    }
    assert ("Trainer", "_save") in found
    listed = {(owner.__name__, name) for owner, methods in TABLES.items() for name in methods}
    assert found <= listed, f"list in training/host.py or host_trl.py: {sorted(found - listed)}"


def callable_of(owner, name):
    return inspect.isfunction(vars(owner)[name])


class Moved:
    """A Trainer that has lost a method, and takes more in another."""

    _save = lambda self, output_dir, state_dict, token: None  # noqa: E731


def test_a_difference_is_named():
    table = {Moved: {name: host.PRIVATE[Trainer][name] for name in ("_save", "_load_best_model")}}
    assert differences(table) == [
        "Moved._save takes (self, output_dir, state_dict, token), not (self, output_dir, state_dict)",
        "Moved._load_best_model is gone",
    ]


@pytest.mark.parametrize("installed", ["1.15.9", "1.17.0"], ids=["older", "newer"])
def test_another_release_is_said_and_one_that_differs_is_refused(installed, caplog, monkeypatch):
    said = []
    monkeypatch.setattr(host.logger, "warning_once", said.append)
    tested = ((1, 16), (1, 16))
    host.check_version("trl", tested, lambda: [], "1.16.3")
    assert not said
    host.check_version("trl", tested, lambda: [], installed)
    assert said == [f"hf_moe's training was tested with trl 1.16; this is {installed}."]
    with pytest.raises(
        ImportError, match=rf"trl {installed} is not what .* 1.16, and differs: A.b is gone; pip"
    ) as error:
        host.check_version("trl", tested, lambda: ["A.b is gone"], installed)
    assert error.value.name is None and "\n" not in str(error.value)  # a line of the command, not a traceback


@pytest.mark.parametrize(("config", "name"), [(x, name) for x, names in host_trl.VALUES.items() for name in names])
def test_values_of_an_argument_are_those_that_its_trainer_reads(config, name):
    """What TRL compares the argument with, or a part of it, and what its help names."""
    source = inspect.getsource(importlib.import_module(getattr(trl, config).__module__.replace("_config", "_trainer")))
    compared = set(re.findall(rf'\b{name} == "(\w+)"', source))
    for group in re.findall(rf"\b{name} in \[(.*?)\]", source):
        compared |= set(re.findall(r'"(\w+)"', group))
    known = set(host_trl.VALUES[config][name])
    help_ = next(x for x in fields(getattr(trl, config)) if x.name == name).metadata["help"]
    assert compared <= known and known <= compared | set(re.findall(r"\w+", help_))
