"""Which models are ours."""

import sys

import timm

import s3a  # noqa: F401  registers them


def list_classifiers() -> list[str]:
    """The names of our models for classification, which are those with a table of sizes."""
    modules = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    own = {name: module for name, module in modules.items() if module.startswith("s3a.")}
    return [name for name, module in own.items() if hasattr(sys.modules[module], "SIZES")]
