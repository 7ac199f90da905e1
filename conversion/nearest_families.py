"""Which families can hold a model: what a table, read backwards and then forwards again, does not give back."""

import math
import reprlib
from typing import Any

from transformers import PreTrainedConfig

from ..model.configuration_hf_moe import HfMoeConfig
from .computation import READ_IF, TRAINING_FIELDS, computation, respelled
from .families import FAMILIES, Family
from .files.source import built

SPELLED = {"router_type", "router_args"}  # fields of more than one spelling


def family_config(family: Family, config: HfMoeConfig) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The family's config that computes what `config` computes, and the training fields that it has no place for.

    Raises a ValueError that names the first field in the way and the families that can hold the model.
    """
    exported, unheld = nearest(family, config)
    needed = in_the_way(unheld)
    if needed:
        others = [fit["family"] for fit in fits(config) if fit["holds"]]
        hint = f"{listed(others)} can" if others else "none that hf_moe writes can"
        raise ValueError(f"{said(family, config, needed[0])}; {hint}.")
    return exported, unheld


def fits(config: HfMoeConfig) -> list[dict[str, Any]]:
    """For each family whether it holds the model, and if not, what comes first of what is in the way.

    Those that hold it come first, then those with the fewest fields in the way, then models of another kind.
    """
    found = []
    for name, family in FAMILIES.items():
        try:
            exported, unheld = nearest(family, config)
        except ValueError as error:  # of no field of ours alone
            found.append((True, 0, fit(name, reason=str(error))))
            continue
        needed = in_the_way(unheld)
        first = (needed[0], getattr(config, needed[0]), f"{said(family, config, needed[0])}.") if needed else ()
        found.append((exported is None, len(needed), fit(name, *first)))
    return [entry for *_, entry in sorted(found, key=lambda entry: entry[:2])]


def fit(family: str, field: str | None = None, value: Any = None, reason: str | None = None) -> dict[str, Any]:
    return {"family": family, "holds": reason is None, "field": field, "value": value, "reason": reason}


def said(family: Family, config: HfMoeConfig, field: str) -> str:
    return f"{family.model_type} cannot hold this model's {field}={reprlib.repr(getattr(config, field))}"


def in_the_way(unheld: dict[str, Any]) -> list[str]:
    """What changes the model's output. A field that is always read says more than one that is read if another is."""
    return sorted((name for name in unheld if name not in TRAINING_FIELDS), key=lambda name: name in READ_IF)


def listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def nearest(family: Family, config: HfMoeConfig) -> tuple[PreTrainedConfig | None, dict[str, Any]]:
    """The family's config nearest to `config`, None where there is none, and the fields that it does not say."""
    what = f"{family.model_type} cannot hold this model"
    ours = computation(config)
    try:
        exported = built(family.config_class, what, **family.family_fields(respelled(config)))
        again = built(HfMoeConfig, what, **built(family.hf_moe_fields, what, exported))
    except ValueError:  # of another kind altogether, or of a value that the family's class or table refuses
        fixed = {name: x for name, x in family.constants.items() if name in ours and name not in SPELLED}
        if unheld := {name: ours[name] for name in fixed.keys() - TRAINING_FIELDS if ours[name] != fixed[name]}:
            return None, {name: unheld[name] for name in fixed if name in unheld}
        raise
    exported.architectures = [family.architecture]
    theirs = computation(again)
    names = [name for name in HfMoeConfig.__annotations__ if name in ours or name in theirs]
    return exported, {name: getattr(config, name) for name in names if not equal(ours.get(name), theirs.get(name))}


def equal(a: Any, b: Any) -> bool:
    numbers = isinstance(a, float) and isinstance(b, (int, float))
    return math.isclose(a, b, rel_tol=1e-9) if numbers else a == b  # a coefficient times K, divided by K
