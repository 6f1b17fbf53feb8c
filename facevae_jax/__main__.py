"""`python -m facevae_jax` lists the commands; `python -m facevae_jax COMMAND ...` runs one.

Installed, `facevae` is the same, and `facevae-COMMAND` runs one.
"""

import difflib
import pathlib
import runpy
import sys

COMMANDS = {  # each is a module of this package
    "prepare": "make a dataset from a folder or archive of images, or verify one",
    "main": "train a model, or resume a run (also `train`)",
    "plan": "compile a run for accelerators that are not here: does it fit, how long may it take",
    "generate": "make pictures or latents with a trained model: sample, reconstruct, interpolate,\n"
    "            morph, edit, traverse, encode",
    "evaluate": "score a trained model: reconstruction, likelihood, latents, samples",
    "report": "write one HTML page about one or more runs",
    "explore": "move the latents of a face with sliders, in a browser",
    "convert": "make a model of weights that others published",
    "export": "write a trained model as safetensors, StableHLO or ONNX",
}


def main() -> None:
    """Lists the commands, or runs the one that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-help", "-h", "help"):
        print("Variational autoencoders of human faces. Commands:\n")
        for command, purpose in COMMANDS.items():
            print(f"  {command:<9} {purpose}")
        print("\nRun one with `python -m facevae_jax.COMMAND`; --help after it explains its flags.")
        return
    module = "main" if name == "train" else name
    if module not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, "train"]) or COMMANDS
        print(f"error: {name!r} is not a command: try {', '.join(near)}.", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    runpy.run_module(f"facevae_jax.{module}", run_name="__main__", alter_sys=True)


def by_name() -> None:
    """Runs the command that the program's name ends in, such as `facevae-train`."""
    sys.argv.insert(1, pathlib.Path(sys.argv[0]).stem.removeprefix("facevae-"))
    main()


if __name__ == "__main__":
    main()
