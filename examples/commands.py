"""The command of this room: ``jsparse demo``."""

from jsparse.examples.demo import DemoConfig, run_demo
from jsparse.examples.shipped import ShippedDemoConfig, run_shipped_demo
from jsparse.reports.console import parse

TRAIN = "--train"


def demo(options: list[str]) -> None:
    """Run the demo of the shipped model or, with ``--train``, the whole path from a random model on."""
    if TRAIN not in options:
        run_shipped_demo(parse(ShippedDemoConfig, "demo", options))
        print("try\n  jsparse generate --prompt 'import os' --temperature 0.7\n  jsparse demo --train")
        return
    config = parse(DemoConfig, f"demo {TRAIN}", [option for option in options if option != TRAIN])
    run_demo(config)
    print(f"model, plot and numbers are in {config.output}: try")
    print(f"  jsparse generate --model {config.output / 'long'} --prompt 'import os' --temperature 0.7")
