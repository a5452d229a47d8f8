"""The card of merged weights: what was merged, how, from which files, under which licence."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from momo.weights import Card

from .audit import is_made
from .plan import MergePlan

NO_LICENCE = "NOASSERTION"  # SPDX for "nothing says"


def merged_card(plan: MergePlan) -> Card:
    """Returns the card of a merge, its hash still empty.

    Sensors, data fingerprints and licences are the union over the parents. Normalisation and objective are those the
    parents agree on. Without cards of the parents the card says no more than their hashes.
    """
    ordered = sorted(plan.parents, key=lambda parent: parent.name)
    cards = [parent.card for parent in ordered if parent.card is not None]
    base = plan.base.card if plan.base is not None else None
    trained = cards[0] if cards and (base is None or is_made(base)) else base
    sensors = _sensors(cards)
    normalisation = dict((cards[0] if len(sensors) == 1 else trained).normalisation) if cards and trained else {}
    if len(sensors) > 1 and normalisation:
        normalisation |= {"mean": None, "std": None}
    everyone = [*([plan.base] if plan.base is not None else []), *ordered]
    return Card(
        kind="merged",
        architecture=next((dict(card.architecture) for card in (base, *cards) if card is not None), {}),
        contents=_contents(plan),
        normalisation=normalisation,
        objective=dict(trained.objective) if trained is not None else {},
        sensors=sensors,
        data_fingerprints={key: value for card in cards for key, value in card.data_fingerprints.items()},
        synthetic=any(card.synthetic for card in (base, *cards) if card is not None),
        parents=[
            {
                "role": parent.role,
                "name": parent.name,
                "sha256": parent.source.sha256,
                "samples": parent.card.samples if parent.card is not None else None,
            }
            for parent in everyone
        ],
        method=_method(plan),
        licence=" AND ".join(sorted({parent.source.licence or NO_LICENCE for parent in everyone})),
    )


def card_metadata(card: Card) -> dict[str, str]:
    """Returns the metadata that a safetensors file of these weights carries."""
    card = dataclasses.replace(card, sha256="")
    return {"format": "pt", "momo_card": json.dumps(card.to_dict(), sort_keys=True)}


def _sensors(cards: list[Card]) -> list[dict[str, Any]]:
    sensors: list[dict[str, Any]] = []
    for card in cards:
        sensors += [sensor for sensor in card.sensors if sensor not in sensors]
    return sensors


def _contents(plan: MergePlan) -> list[str]:
    encoder = any(name.startswith("patch_embed.") for name in plan.names)
    decoder = any(name.startswith("decoder_pred.") for name in plan.names)
    return [part for part, there in (("encoder", encoder), ("decoder", decoder)) if there]


def _method(plan: MergePlan) -> dict[str, Any]:
    config, method = plan.config, plan.method
    used: dict[str, Any] = {"name": method.name, "reference": method.reference, "precision": config.precision}
    if "coefficients" in method.uses:
        factors = set(plan.factors.values())
        used |= {"coefficient": factors.pop()} if len(factors) == 1 else {"coefficients": dict(plan.factors)}
        used |= {"layers": dict(config.layers)} if config.layers else {}
        used |= {"ramp": list(config.ramp)} if config.ramp else {}
    if "density" in method.uses:
        used["density"] = config.used_density
    used |= {key: getattr(config, key) for key in ("outliers", "trim", "seed") if key in method.uses}
    if "fisher" in method.uses:
        sources = zip(plan.parents, plan.fisher_sources, strict=True)
        used["fisher"] = {parent.name: source.sha256 for parent, source in sources}
    if plan.rest or plan.dropped:
        used["scope"] = config.scope
        used["taken_over"] = dict(plan.rest)
        used["dropped"] = list(plan.dropped)
    return used
