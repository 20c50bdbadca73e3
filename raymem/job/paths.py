"""Paths on command lines, made absolute."""

from __future__ import annotations

import os
from pathlib import Path

from raymem.errors import StoreError


def absolute_store(store: str, option: str = "--store") -> str:
    """The path of an option made absolute, or its URL; relative ones are refused in submitted jobs.

    A submitted job runs in a temporary copy of the working folder, where results would vanish.
    """
    if "://" in store or Path(store).is_absolute():
        return store
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise StoreError(
            f"{option} {store} is relative, and a submitted job runs in a temporary folder; give "
            "an absolute path that all nodes see, or a URL"
        )
    return str(Path(store).expanduser().absolute())
