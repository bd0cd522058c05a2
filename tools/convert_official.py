"""Converts an official checkpoint: python tools/convert_official.py SOURCE.pth --model NAME --output FOLDER."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

import tyro

from s3a.support.command_line import run_command
from s3a.weights.folder import save_folder
from s3a.weights.official import convert, find_data_config, find_key_table, read_checkpoint


@dataclass(frozen=True, kw_only=True)
class Options:
    """Converts an official checkpoint into a weights folder; every key must be known on both sides."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE.pth")]
    """The official checkpoint: a state dict, bare or under "model"."""
    model: str
    """The model that the weights are of, such as ssvit_tiny."""
    output: Path
    """The folder to write; created where it does not exist."""
    image_size: int | None = None
    """Side in pixels of the images that the weights are for; None is what the checkpoint says of its training, or else
    the model's own."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image-size is {self.image_size}: it must be above 0")


def main(options: Options) -> None:
    """Reads the checkpoint, converts it and writes the folder."""
    table = find_key_table(options.model)
    checkpoint = read_checkpoint(options.source)
    model = convert(checkpoint.state, options.model, table)
    image_size = options.image_size or checkpoint.image_size
    data_config = find_data_config(options.model, image_size) if image_size else None
    save_folder(model, options.output, data_config=data_config)

    folder, parameters = str(options.output), sum(parameter.numel() for parameter in model.parameters())
    print(
        f"wrote {options.model} with {parameters:,} parameters and {model.num_classes} classes to {folder}; load it "
        f'with s3a.{type(model).__name__}.from_pretrained("{folder}") '
        f'or timm.create_model("local-dir:{folder}", pretrained=True)'
    )


if __name__ == "__main__":
    run_command(Options, main)
