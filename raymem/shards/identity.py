"""What makes the shards scored with a model comparable: curvature/MODEL/_about.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raymem.curvature import CHECKED, CurvatureRule, pick_mode
from raymem.errors import ExamplesError, StudyMismatchError
from raymem.shards.models import ScoringModel
from raymem.shards.readers import read_shard
from raymem.shards.records import Shard
from raymem.shards.work import decode
from raymem.store import Store
from raymem.training import as_input
from raymem.version import VERSION


def identity_of(
    store: Store, model: ScoringModel, rule: CurvatureRule, seed: int, shards: Sequence[Shard]
) -> dict[str, Any]:
    """curvature/MODEL/_about.json, made or checked: what makes its shards comparable."""
    # With an underscore, so that Arrow and pandas read the folder as one table, this left out.
    key = f"curvature/{model.name}/_about.json"
    # Names of shards are relative to the set: another set's would be taken for done.
    about = {"data": shards[0].root, **model.as_dict(), "rule": rule.as_dict(), "seed": seed}
    here = json.loads(json.dumps(about))
    if not store.files.exists(key):
        mode = rule.mode if rule.mode != "auto" else _pick_mode(model, shards, seed)
        text = json.dumps({**here, "mode": mode, "raymem": VERSION}, indent=1)
        store.files.create(key, text.encode() + b"\n")
    there: dict[str, Any] = json.loads(store.files.read(key))
    differences = [
        f"{name}: there {there.get(name)}, here {here[name]}"
        for name in here
        if there.get(name) != here[name]
    ]
    if differences:
        raise StudyMismatchError(
            f"curvature/{model.name} in {store.url} was made otherwise ({'; '.join(differences)}); "
            "choose another --name or --store, or go back to those settings"
        )
    return there


def _pick_mode(model: ScoringModel, shards: Sequence[Shard], seed: int) -> str:
    """From the first few images that can be read."""
    found: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    first = ""
    for record in (record for shard in shards for record in read_shard(shard)):
        pixels, error = decode(record, model.transform, model.n_classes)
        first = first or (error and f"; the first, {record.example_id}: {error}")
        if pixels is not None:
            found.append(pixels)
            labels.append(record.label or 0)
        if len(found) == CHECKED:
            break
    if not found:
        raise ExamplesError(
            "no image of the set can be read and has a label of the model"
            f"{first}; check --data and --model"
        )
    x = as_input(torch.from_numpy(np.stack(found)), torch.contiguous_format)
    return pick_mode(model.net.cpu(), x, torch.tensor(labels), seed=seed)
