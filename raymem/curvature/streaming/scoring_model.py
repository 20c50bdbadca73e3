"""A model to score shards with: its name, its net, the transform that comes with it.

`identity_of` records what makes the shards scored with it comparable: curvature/MODEL/_about.json.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from raymem.curvature import CurvatureRule, pick_mode
from raymem.curvature.streaming.blocks import Sample
from raymem.data.shards.transform import PAPER, Transform, of_timm
from raymem.errors import RecipeError, StoreError, StudyMismatchError, first_line
from raymem.models import Normalize, build_model, identity
from raymem.retry import open_fs, open_patiently
from raymem.store import Store, TrialKey
from raymem.store.study_record import StudyRecord
from raymem.store.weights import weights_digest
from raymem.training import as_input
from raymem.version import VERSION

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")


@dataclass(frozen=True, kw_only=True)
class ScoringModel:
    """A model, ready to score: takes float images in [0, 1], normalizes inside, in eval mode."""

    name: str
    """Name of its folder in the store."""
    net: nn.Module = field(repr=False)
    """The network, with its normalization."""
    transform: Transform
    n_classes: int
    classes: tuple[str, ...] | None = None
    """Names of classes, where they are known."""
    digest: str = ""
    """SHA-256 of the weights and the normalization."""
    channels_last: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.\-]*", self.name):
            raise StoreError(
                f"{self.name!r} cannot name a folder; take letters, digits, dots and dashes, not "
                "starting with one of the latter"
            )
        object.__setattr__(self, "digest", weights_digest(self.net.eval().state_dict()))

    @property
    def pixels(self) -> tuple[object, ...]:
        """What it asks of images: models with the same can be scored in one pass."""
        return self.transform, self.n_classes, self.classes

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights."""
        return sum(tensor.nbytes for tensor in self.net.state_dict().values())

    def as_dict(self) -> dict[str, object]:
        """The record of the model beside its scores."""
        return {
            "model": self.name,
            "weights": self.digest,
            "n_classes": self.n_classes,
            "transform": self.transform.as_dict(),
        }

    @classmethod
    def of_store(
        cls, store: Store, key: TrialKey, *, name: str | None = None, paper: bool = False
    ) -> ScoringModel:
        """A model that a study kept, with the size and channels of the study's images.

        Raises StoreError if its weights were not kept, RecipeError if it cannot be built again.
        """
        study = store.study()
        weights, recipe = store.weights(key), study.recipe
        H, W, C = study.image_shape
        if "code" in recipe["model"] and ":" not in recipe["model"]["name"]:
            raise RecipeError(
                f"the study's model is the function {recipe['model']['name']}, which cannot be "
                "found by its name alone; give studies whose models are to be kept a model "
                "'module:function'"
            )
        if identity(recipe["model"]["name"]) != recipe["model"]:
            raise StudyMismatchError(
                f"the code of {recipe['model']['name']} is not what {store.url} was trained with; "
                "go back to that code"
            )
        net = build_model(
            recipe["model"]["name"],
            n_classes=len(study.classes),
            image_shape=(H, W, C),
            mean=recipe["mean"],
            std=recipe["std"],
        )
        _load(net, weights, f"{store.url} {key}")
        return cls(
            name=name or key.name,
            net=net,
            transform=PAPER if paper else transform_of(study),
            n_classes=len(study.classes),
            classes=study.classes,
            channels_last=recipe["channels_last"],
        )

    @classmethod
    def of_timm(
        cls,
        architecture: str,
        *,
        weights: str | None = None,
        n_classes: int = 1000,
        name: str | None = None,
        paper: bool = False,
    ) -> ScoringModel:
        """A model of timm with its pretrained weights, or with those in a file (any fsspec URL).

        The file is safetensors, or what `torch.save` made of a state dict; no code in it is run.
        Raises RecipeError for unknown names and for weights that do not fit.
        """
        import timm

        if not timm.is_model(architecture):
            near = ", ".join(timm.list_models(f"*{architecture[:8]}*")[:5])
            raise RecipeError(
                f"timm has no model {architecture!r}" + (f"; near it are {near}" if near else "")
            )
        try:
            net = timm.create_model(
                architecture,
                pretrained=weights is None,
                **({} if weights is None else {"num_classes": n_classes}),
            )
        except Exception as error:  # downloads fail in many ways
            raise RecipeError(
                f"the pretrained weights of {architecture} cannot be loaded ({error}); without "
                "internet give --weights FILE"
            ) from error
        if weights is not None:
            _load(net, read_weights(weights), weights)
        config = timm.data.resolve_model_data_config(net)
        whole = nn.Sequential(Normalize(config["mean"], config["std"]), net)
        return cls(
            name=name or architecture,
            net=whole,
            transform=PAPER if paper else of_timm(config),
            n_classes=int(net.num_classes),
        )


def transform_of(study: StudyRecord) -> Transform:
    """The pixels of a study's own images: what models that it kept take."""
    H, W, C = study.image_shape
    return Transform(size=(H, W), way="fit", grey=C == 1)


def read_weights(url: str) -> dict[str, Tensor]:
    """A state dict from a safetensors file or one of `torch.save`, without running code in it.

    Wrappers such as {"state_dict": ...} and the prefix "module." are taken off.
    """
    try:
        fs, path = open_fs(url)
        with open_patiently(fs, path) as file:
            data = file.read()
        if url.endswith(".safetensors"):
            found: Any = safetensors.torch.load(data)
        else:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RecipeError(f"there is no file {url}; check --weights") from error
    except StoreError:  # the network, not the file
        raise
    except Exception as error:  # unpicklers and file systems raise many kinds
        raise RecipeError(
            f"{url} cannot be read as weights ({first_line(error)}); save "
            "model.state_dict() with safetensors or torch.save"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise RecipeError(f"{url} holds no state dict; save model.state_dict()")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def _load(net: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"the weights of {source} do not fit the model ({problem}); check --model and "
            "--n-classes"
        ) from error


def about_key(model: str) -> str:
    """Key of the record of a model's scores."""
    # With an underscore, so that Arrow and pandas read the folder as one table, this left out.
    return f"curvature/{model}/_about.json"


def identity_of(
    store: Store,
    model: ScoringModel,
    rule: CurvatureRule,
    seed: int,
    data: str,
    sample: Callable[[], Sample],
) -> dict[str, Any]:
    """The record of a model's scores, made or checked: what makes its shards comparable.

    `sample` gives images of the set at `data` to choose the trace's mode with, if that is not
    recorded yet. Raises StudyMismatchError if the record is of other scores.
    """
    key = about_key(model.name)
    # Names of shards are relative to the set: those of another set would count as done.
    about = {"data": data, **model.as_dict(), "rule": rule.as_dict(), "seed": seed}
    here = json.loads(json.dumps(about))
    if not store.files.exists(key):
        mode = rule.mode if rule.mode != "auto" else _pick_mode(model, sample(), seed)
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


def _pick_mode(model: ScoringModel, sample: Sample, seed: int) -> str:
    """The mode of the trace that suits the model."""
    # Copied, as what Ray's object store hands out cannot be written to.
    x = as_input(torch.tensor(sample.pixels), torch.contiguous_format)
    return pick_mode(model.net.cpu(), x, torch.tensor(sample.labels), seed=seed)
