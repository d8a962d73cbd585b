"""The command of this room: ``jsparse convert``."""

from jsparse.models.convert import ConvertConfig, is_adapter
from jsparse.models.convert import convert as convert_folder
from jsparse.reports.console import parse


def convert(options: list[str]) -> None:
    config = parse(ConvertConfig, "convert", options)
    left = convert_folder(config)
    what = "adapter" if is_adapter(config.model) else "model"
    print(f"{config.output}: the {what} in safetensors{', without ' if left else ''}{', '.join(left)}")
