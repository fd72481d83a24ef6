"""The command line: ``python -m spanopt inspect package.module:factory``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spanopt.inspection import inspect_model

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; by default those of the process.

    Returns:
        The exit status: 0 if every attention layer can be scaled, 1 if not.
    """
    parser = argparse.ArgumentParser(prog="python -m spanopt")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="list the attention layers of a model and whether they can be scaled",
        description="List the attention layers of a model and whether they can be scaled. The "
        "exit status is 0 only if all can.",
    )
    model = inspect.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "factory",
        nargs="?",
        metavar="package.module:factory",
        help="a callable without arguments that returns a model, or (model, inputs) with the "
        "inputs as a tuple, a dict or one tensor",
    )
    model.add_argument(
        "--hf",
        metavar="CONFIG",
        help="build a transformers model, untrained: a model type such as llama, a config in "
        "JSON, or the path or name of one",
    )
    inspect.add_argument(
        "--attn", metavar="NAME", help="attn_implementation for --hf, such as eager"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        if options.hf is not None:
            subject, inputs = _from_config(options.hf, options.attn), None
        else:
            subject, inputs = _from_factory(options.factory)
    except _Refused as error:
        inspect.error(str(error))
    inspection = inspect_model(subject, inputs)
    print(json.dumps(inspection.as_dict(), indent=2) if options.json else inspection)
    return 0 if inspection.ok else 1


_LARGE = 100_000_000  # parameters of a model that is not built for real


class _Refused(Exception):
    """An argument that gives no model."""


def _from_factory(path: str) -> tuple[nn.Module, Any]:
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise _Refused(f"{path!r} is not of the form package.module:factory")
    sys.path.insert(0, os.getcwd())
    try:
        factory: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            factory = getattr(factory, name)
    except (ImportError, AttributeError) as error:
        raise _Refused(f"cannot import {path!r}: {error}") from error
    made = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise _Refused(f"{path!r} gave {type(made).__name__}, neither a model nor (model, inputs)")
    return model, inputs


def _from_config(source: str, attention: str | None) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise _Refused("--hf needs the transformers library: pip install transformers") from error
    try:
        if source.lstrip().startswith("{") or source.endswith(".json"):
            text = source if source.lstrip().startswith("{") else Path(source).read_text()
            fields = json.loads(text)
            config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        elif source in transformers.CONFIG_MAPPING:
            config = transformers.CONFIG_MAPPING[source]()
        else:
            config = transformers.AutoConfig.from_pretrained(source)
        options = {"attn_implementation": attention} if attention else {}
        with torch.device("meta"):  # shapes are enough, and take no memory
            model = transformers.AutoModel.from_config(config, **options)
        if sum(parameter.numel() for parameter in model.parameters()) > _LARGE:
            return model
        return transformers.AutoModel.from_config(config, **options)
    except Exception as error:  # whatever the library says of a config
        raise _Refused(f"cannot build a model from {source!r}: {error!r}") from error


if __name__ == "__main__":
    sys.exit(main())
