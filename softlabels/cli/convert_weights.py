"""`softlabels convert-weights SOURCE DESTINATION`: a pickled checkpoint as safetensors; nothing in it is run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command and its arguments."""
    parser = commands.add_parser(
        "convert-weights",
        help="write a pickled checkpoint's weights as safetensors",
        description="Read the weights of a checkpoint (.pt, .pth, .bin, .ckpt), or of a module that was pickled whole, "
        "and write them as a safetensors file. No code in the file is imported or run.",
    )
    parser.add_argument("source", type=Path, help="the checkpoint")
    parser.add_argument("destination", type=Path, help="a new .safetensors file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert, and say how much."""
    from softlabels.precompute.teachers.checkpoints import convert_checkpoint

    state = convert_checkpoint(options.source, options.destination)
    numbers = sum(tensor.numel() for tensor in state.values())
    print(f"{options.destination}: {len(state)} tensors, {numbers:,} numbers")
    return 0
