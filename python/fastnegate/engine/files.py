# SPDX-License-Identifier: Apache-2.0
"""Files of concept banks: safetensors with JSON metadata, bound to the fingerprint of the text encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .concepts import Concept, Directions, Fingerprint

FORMAT = 1


class Contents(NamedTuple):
    """What is in a file: the text encoder that its concepts are of, the concepts by name, neutral tokens."""

    encoder: Fingerprint
    concepts: Mapping[str, Concept]
    neutral: Tensor | None


def contents(path: str | Path) -> Contents:
    """Read a bank file without a pipeline, to look at it.

    Raises:
        ValueError: not a bank file (pickles are refused unread).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with torch.inference_mode(False), safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["fastnegate"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r}: this version reads {FORMAT}")
        for name in ("encoder", "denoiser"):
            if not isinstance(facts := header.get(name, {}), dict):
                raise ValueError(f"{name} is a {type(facts).__name__}: must be facts by name")
        for name, tensor in tensors.items():
            kind = torch.int8 if name.endswith(".roles") else torch.float32
            if tensor.dtype != kind:
                raise ValueError(f"{name} is {tensor.dtype}: must be {kind}")
        names = [item["name"] for item in header["concepts"]]
        if len({*names}) < len(names):
            raise ValueError("two concepts have the same name")
        concepts = {}
        for i, item in enumerate(header["concepts"]):
            prototypes = tuple(tensors[f"{i}.prototype.{j}"] for j in range(item["prototypes"]))
            directions = None
            if "directions" in item:
                layers = {layer: tensors[f"{i}.direction.{j}"] for j, layer in enumerate(item["directions"])}
                directions = Directions(layers, Fingerprint(header["denoiser"], tensors["denoiser"]))
            if not isinstance(members := item["members"], list):
                raise ValueError(f"members of {item['name']!r} is {members!r}: must be a list of phrases")
            concepts[item["name"]] = Concept(
                tensors[f"{i}.prompt"], tensors[f"{i}.roles"], prototypes, tuple(members), directions
            )
        return Contents(
            Fingerprint(header["encoder"], tensors["fingerprint"]), concepts, tensors.get("neutral")
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path={str(path)!r} is not a concept bank: {error!r}") from error


def write(path: str | Path, bank: Contents) -> None:
    """Write a bank file; the same contents give the same bytes."""
    from safetensors.torch import save_file

    tensors = {"fingerprint": bank.encoder.sample}
    if bank.neutral is not None:
        tensors["neutral"] = bank.neutral
    items: list[dict[str, Any]] = []
    for i, (name, concept) in enumerate(bank.concepts.items()):
        tensors[f"{i}.prompt"], tensors[f"{i}.roles"] = concept.prompt, concept.roles
        tensors.update({f"{i}.prototype.{j}": p for j, p in enumerate(concept.prototypes)})
        items.append({"name": name, "members": concept.members, "prototypes": len(concept.prototypes)})
        if concept.directions is not None:
            layers = concept.directions.layers
            tensors.update({f"{i}.direction.{j}": layers[layer] for j, layer in enumerate(layers)})
            items[-1]["directions"] = [*layers]
    header = {"format": FORMAT, "encoder": dict(bank.encoder.facts), "concepts": items}
    if (directions := directions_of(bank.concepts)) is not None:
        header["denoiser"] = dict(directions.model.facts)
        tensors["denoiser"] = directions.model.sample
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, str(path), metadata={"fastnegate": json.dumps(header, sort_keys=True)})


def directions_of(concepts: Mapping[str, Concept]) -> Directions | None:
    """Of one of the concepts: those that have any agree in model and layers."""
    return next((c.directions for c in concepts.values() if c.directions is not None), None)
