"""The command line: ``python -m spanopt inspect package.module:factory``."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spanopt import __version__
from spanopt.compare.command import add_command, run_command
from spanopt.importing import Refused, imported, one_line
from spanopt.inspection import inspect_model

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments without the program's name; by default those of the process.

    Returns:
        The exit status of ``inspect``: 0 if a forward pass has shown that every attention layer can
        be scaled; 1 if it has shown that one can't, or there is none; 3 if no forward pass could be
        made. Bad arguments end the process with 2.
    """
    parser = argparse.ArgumentParser(prog="spanopt")
    parser.add_argument("--version", action="version", version=f"spanopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "inspect",
        help="list the attention layers of a model and whether they can be scaled",
        description="List the attention layers of a model and whether they can be scaled. Exit "
        "status: 0 if a forward pass has shown that all can; 1 if one can't, or there is none; 2 "
        "for a mistake in the arguments; 3 if no forward pass could be made, so that what is "
        "listed is unverified.",
    )
    model = command.add_mutually_exclusive_group(required=True)
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
    command.add_argument(
        "--attn", metavar="NAME", help="attn_implementation for --hf, such as eager"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    add_command(commands)
    options = parser.parse_args(arguments)
    if options.command == "compare":
        return run_command(options)
    try:
        if options.hf is not None:
            subject, inputs = _from_config(options.hf, options.attn), None
        else:
            subject, inputs = _from_factory(options.factory)
    except Refused as error:
        command.exit(2, f"{command.prog}: error: {error}\n")
    inspection = inspect_model(subject, inputs)
    print(json.dumps(inspection.as_dict(), indent=2) if options.json else inspection)
    return 3 if not inspection.verified else 0 if inspection.ok else 1


_LARGE = 100_000_000  # a model of more parameters gets shapes only, and no memory


def _from_factory(path: str) -> tuple[nn.Module, Any]:
    """Return the model that a factory makes, and the inputs if it returns any."""
    found = imported(path, "factory")
    made = found
    if not isinstance(found, nn.Module):
        made = _made(path, found)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise Refused(f"{path!r} gave {type(made).__name__}, neither a model nor (model, inputs)")
    return model, inputs


def _made(path: str, factory: Any) -> Any:
    """Return what a factory returns."""
    if inspect.ismodule(factory) or inspect.isbuiltin(factory):
        kind = "a module" if inspect.ismodule(factory) else "a builtin function"
        raise Refused(f"{path!r} is {kind}, neither a model nor a function that returns one")
    if not callable(factory):
        return factory
    try:
        inspect.signature(factory).bind()
    except ValueError:
        pass  # the callable has no signature
    except TypeError as error:
        arguments = inspect.signature(factory)
        raise Refused(
            f"{path!r} needs arguments, {arguments}: name a function that takes none, such as "
            f"one that returns {path.rpartition(':')[2]}(...)"
        ) from error
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise Refused(f"{path!r} raised {one_line(error)}") from error


def _from_config(source: str, attention: str | None) -> nn.Module:
    """Return an untrained model of the transformers library."""
    try:
        import transformers
    except ImportError as error:
        raise Refused("--hf needs the transformers library: pip install transformers") from error
    try:
        config = _config(source, transformers)
        options = {"attn_implementation": attention} if attention else {}
        with torch.device("meta"):  # this makes shapes only, and takes no memory
            model = transformers.AutoModel.from_config(config, **options)
        if sum(parameter.numel() for parameter in model.parameters()) > _LARGE:
            return model
        return transformers.AutoModel.from_config(config, **options)
    except Refused:
        raise
    except Exception as error:  # the library raises many kinds for a bad config
        raise Refused(f"cannot build a model from {source!r}: {one_line(error)}") from error


def _config(source: str, transformers: Any) -> Any:
    """Return the config that JSON, a path, a model type or a name on the hub stands for."""
    if source.lstrip().startswith("{") or source.endswith(".json"):
        text = source if source.lstrip().startswith("{") else Path(source).read_text()
        fields = json.loads(text)
        if "model_type" not in fields:
            raise Refused("the config has no model_type")
        return _config_class(fields["model_type"], transformers).from_dict(fields)
    if "/" not in source and not Path(source).exists():
        return _config_class(source, transformers)()
    return transformers.AutoConfig.from_pretrained(source)


def _config_class(model_type: str, transformers: Any) -> Any:
    """Return the config class of a model type."""
    known = [*transformers.CONFIG_MAPPING.keys()]
    if model_type not in known:
        near = difflib.get_close_matches(str(model_type), known, n=3)
        names = f" Did you mean {' or '.join(near)}?" if near else ""
        raise Refused(
            f"transformers {transformers.__version__} has no model type {model_type!r}.{names} "
            "(A name on the hub is of the form owner/name.)"
        )
    return transformers.CONFIG_MAPPING[model_type]


if __name__ == "__main__":
    sys.exit(main())
