"""The commands of conversions have the options of their functions, with the same defaults."""

import inspect
from dataclasses import MISSING, fields

import pytest
from hf_moe.conversion import exchange_experts, export_checkpoint, grow, import_checkpoint, prune, upcycle
from hf_moe.conversion.options import ExportOptions, ImportOptions, UpcycleOptions
from hf_moe.conversion.reshape.exchange import ExchangeOptions
from hf_moe.conversion.reshape.grow import GrowOptions
from hf_moe.conversion.reshape.prune import PruneOptions
from hf_moe_cli import convert, reshape

NONE = inspect.Parameter.empty
TAKERS = {
    UpcycleOptions: (upcycle, convert.upcycle),
    ImportOptions: (import_checkpoint, convert.import_),
    ExportOptions: (export_checkpoint, convert.export),
    PruneOptions: (prune, reshape.prune),
    GrowOptions: (grow, reshape.grow),
    ExchangeOptions: (exchange_experts, reshape.experts),
}
# Fields that a command says in another way, or leaves out; what a command has besides; what --nearest goes without.
RENAMED = {"verify": "no_verify", "domain_texts": "domain_text"}
OF_PYTHON = {"progress"}
OF_COMMANDS = {"src", "dst", "json", "nearest", "tune_router", "tune_tokens"}
OPTIONAL = {"to"}


@pytest.mark.parametrize("options", TAKERS)
def test_function_and_command_take_the_same(options):
    function, command = (inspect.signature(taker).parameters for taker in TAKERS[options])
    names = {field.name: RENAMED.get(field.name, field.name) for field in fields(options)}
    for field in fields(options):
        default = NONE if field.default is MISSING else field.default
        assert function[field.name].default == default
        if field.name not in OF_PYTHON:
            said = command[names[field.name]].default
            said = not said if field.name == "verify" else said
            nothing = field.name in OPTIONAL or default == ()  # a list that may be empty
            assert said == (None if nothing else default), field.name
    assert command.keys() - OF_COMMANDS == set(names.values()) - OF_PYTHON


def test_an_unknown_keyword_is_refused():
    with pytest.raises(ValueError, match=r"^colour \(3\) has no effect: nothing reads it"):
        import_checkpoint("a", "b", colour=3)
    with pytest.raises(TypeError, match="experts"):
        upcycle("a", "b", top_k=1)
