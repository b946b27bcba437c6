"""`python -m dmd COMMAND`, also installed as `dmd`."""

import importlib
import sys

COMMANDS = {
    "train": ("dmd.cli.train", "main", "the whole chain: teacher, pairs, distillation, comparison, report"),
    "sample": ("dmd.cli.sample", "main", "images from a student or teacher"),
    "teach": ("dmd.cli.parts", "teach", "train a teacher on real images"),
    "pairs": ("dmd.cli.parts", "pairs", "make noise-image pairs with a teacher"),
    "captions": ("dmd.cli.captions", "main", "captions by templates or a language model"),
    "synthesize": ("dmd.cli.synthesize", "main", "captions to a data set of images"),
    "export": ("dmd.cli.export", "main", "a student for diffusers, ComfyUI and A1111"),
    "clipgen": ("dmd.cli.clipgen", "main", "text to image learnt from images without captions"),
    "represent": ("dmd.cli.represent", "main", "a backbone learnt from captioned or generated images"),
    "probe": ("dmd.cli.probe", "main", "what frozen features are good for: kNN, linear probes, pictures"),
    "evaluate": ("dmd.cli.evaluate", "main", "figures of networks and images against a reference"),
    "report": ("dmd.cli.parts", "report", "write report.html of a run again"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: dmd COMMAND [--help]\n")
        print("\n".join(f"  {command:10} {text}" for command, (_, _, text) in COMMANDS.items()))
        return
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module, function, _ = COMMANDS[name]
    getattr(importlib.import_module(module), function)(sys.argv[2:], f"dmd {name}")


if __name__ == "__main__":
    main()
