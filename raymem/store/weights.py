"""Weights as safetensors bytes: reading runs no code, and a digest detects changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import safetensors
import safetensors.torch
from torch import Tensor

from raymem.errors import DamagedObjectError

METADATA, CHECKSUM = "raymem", "raymem_checksum"


def encode_weights(weights: Mapping[str, Tensor], about: Mapping[str, object]) -> bytes:
    """safetensors bytes of a state dict on the CPU, `about` and its digest in the metadata."""
    text = json.dumps({**about, "digest": weights_digest(weights)})
    metadata = {METADATA: text, CHECKSUM: _checksum(text)}
    data: bytes = safetensors.torch.save(dict(weights), metadata=metadata)
    return data


def decode_weights(data: bytes, key: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The state dict and what is recorded beside it. Raises DamagedObjectError."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header["__metadata__"]
        if metadata[CHECKSUM] != _checksum(metadata[METADATA]):
            raise ValueError("the checksum of its metadata does not fit")
        about: dict[str, object] = json.loads(metadata[METADATA])
        weights = safetensors.torch.load(data)
        if weights_digest(weights) != about["digest"]:
            raise ValueError("its digest does not fit")
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedObjectError(
            f"{key} does not read back ({error}); run `raymem verify STORE --repair`"
        ) from error
    return weights, about


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        sha.update(safetensors.torch.save({"": tensor}))
    return sha.hexdigest()


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
