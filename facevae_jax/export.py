"""From a trained model to files that other programs read.

python -m facevae_jax.export --workdir=/tmp/quickstart --output=exported --onnx

  model.safetensors, config.json        the parameters; what facevae_jax.load("exported") reads
  encoder.stablehlo, decoder.stablehlo  programs for JAX on CPU, GPU and TPU that do not need this package
  encoder.onnx, decoder.onnx            with --onnx, for ONNX Runtime and others
  artifacts/                            the learned prior, if the run has one: samples then need no data

Of a run the best checkpoint by validation loss is taken, and its averaged parameters where the run kept them.
"""

from absl import flags

from facevae_jax.core import command_line, startup
from facevae_jax.core.errors import UserError, expand_home
from facevae_jax.latents.priors import FLOW

flags.DEFINE_string("workdir", None, "Directory of the run, or of an exported model.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; it must not exist yet, or be empty.")
_ONNX = flags.DEFINE_boolean("onnx", False, "Write ONNX graphs too; needs the extra `onnx`.")


def main(arguments: list[str]) -> None:
    """Writes the folder and says how far each program in it is from the model."""
    workdir = command_line.workdir_of(arguments)
    if not _OUTPUT.value:
        raise UserError("--output is missing: give the folder to write.")
    output = expand_home(_OUTPUT.value, name="--output")

    from facevae_jax.exporting import publishing  # after the flags are checked: jax takes seconds to import
    from facevae_jax.trained import weights
    from facevae_jax.trained.loading import load

    startup.keep_compiled_programs()
    publishing.check_output(output)
    if _ONNX.value:
        publishing.require_onnx()
    trained = load(workdir)
    restored = trained.portable()
    differences = publishing.export(restored, output, onnx=_ONNX.value)
    trained.artifacts.copy(f"prior-{FLOW}", output)
    kind = "averaged parameters" if weights.is_averaged(restored.config) else "parameters"
    print(f"{output}: {kind} of step {restored.step:,}")
    for path in sorted(path for path in output.iterdir() if path.is_file()):
        difference = differences.get(path.name)
        checked = f"  at most {difference.largest:.1e} from the model" if difference else ""
        print(f"  {path.name:17} {path.stat().st_size / 1e6:8.2f} MB{checked}")


if __name__ == "__main__":
    command_line.run(main)
