"""From weights that others published to a model that every command takes.

python -m facevae_jax.convert --from=vdvae --checkpoint=ffhq256-iter-1700000-model-ema.th --output=vdvae_ffhq256

vdvae: the networks of "Very deep VAEs generalize autoregressive models" (Child 2021). Those of FFHQ-256, ImageNet-64
and CIFAR-10 are found by their sizes; for another give --config=vdvae_ffhq256 with overrides, such as
--config.model.width=64. The file is read as tensors alone, by the extra `torch`. The output is an exported model: pass
it as --workdir.
"""

import shlex

from absl import flags

from facevae_jax import main as train_command  # defines --config
from facevae_jax.config import RunConfig, check_overrides
from facevae_jax.core import command_line, named_configs, startup
from facevae_jax.core.errors import UserError, check_choice, expand_home

SOURCES = {"vdvae": ("vdvae_ffhq256", "vdvae_imagenet64", "vdvae_cifar10")}  # with the configs of what is published
_FROM = flags.DEFINE_string("from", None, f"Whose weights: {', '.join(SOURCES)}.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "File of the weights, as published.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; it must not exist yet, or be empty.")


def main(arguments: list[str]) -> None:
    """Converts, and says what was written."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: flags look like --name=value.")
    if not _FROM.value or not _CHECKPOINT.value or not _OUTPUT.value:
        raise UserError("--from, --checkpoint or --output is missing: give all, such as --from=vdvae.")
    check_choice(_FROM.value, list(SOURCES), name="--from")
    output = expand_home(_OUTPUT.value, name="--output")
    if flags.FLAGS["config"].present:
        candidates = {"the network of --config": train_command.read_config()}
    else:
        candidates = {name: _config(name) for name in SOURCES[_FROM.value]}

    from facevae_jax.exporting import published, publishing  # after the flags are checked: jax takes seconds to import

    startup.keep_compiled_programs()
    publishing.check_output(output)
    tensors = published.read_torch(expand_home(_CHECKPOINT.value, name="--checkpoint"))
    name, restored = published.restored_from(tensors, candidates)
    differences = publishing.export(restored, output, onnx=False)
    print(f"{output}: {name}, {sum(tensor.size for tensor in tensors.values()):,} parameters")
    for file, difference in differences.items():
        print(f"  {file}  at most {difference.largest:.1e} from the model")
    words = ["python", "-m", "facevae_jax.generate", "sample", f"--workdir={output}", "--prior=standard"]
    print(f"next: {shlex.join(words)}")


def _config(name: str) -> RunConfig:
    """The project's config of that name."""
    return RunConfig.from_config_dict(named_configs.read(name))


if __name__ == "__main__":
    command_line.run(main, check_arguments=check_overrides)
