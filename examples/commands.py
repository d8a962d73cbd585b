"""The command of this room: ``jsparse demo``."""

from jsparse.examples.settings import DemoConfig, ShippedDemoConfig
from jsparse.reports.console import parse

TRAIN = "--train"


def demo(options: list[str]) -> None:
    """Run the demo of the shipped model or, with ``--train``, the whole path from a random model on."""
    if TRAIN not in options:
        shipped = parse(ShippedDemoConfig, "demo", options)
        from jsparse.examples.shipped import run_shipped_demo  # late, for it imports jax

        run_shipped_demo(shipped)
        print("try\n  jsparse generate --prompt 'import os' --temperature 0.7\n  jsparse demo --train")
        return
    config = parse(DemoConfig, f"demo {TRAIN}", [option for option in options if option != TRAIN])
    from jsparse.examples.demo import run_demo

    run_demo(config)
    print(f"model, plot and numbers are in {config.output}: try")
    print(f"  jsparse generate --model {config.output / 'long'} --prompt 'import os' --temperature 0.7")
