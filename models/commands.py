"""The command of this room: ``jsparse convert``."""

from jsparse.models.convert import ConvertConfig
from jsparse.models.convert import convert as convert_folder
from jsparse.reports.console import parse


def convert(options: list[str]) -> None:
    config = parse(ConvertConfig, "convert", options)
    left = convert_folder(config)
    print(f"{config.output}: the model in safetensors{', without ' if left else ''}{', '.join(left)}")
