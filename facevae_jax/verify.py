"""`python -m facevae_jax.prepare verify`: the checks of a prepared dataset, in words."""

from facevae_jax.data import dataset, verification
from facevae_jax.data.parallel import available_cpus
from facevae_jax.errors import UserError, expand_home, some


def verify(*, name: str | None, resolution: int | None, data_dir: str, output: str | None = None) -> None:
    """Checks a prepared dataset and prints what was found. The arguments are the flags.

    Raises:
      UserError: there is no such dataset, something is wrong with it, or `output` cannot be written to.
    """
    there = {name: list(sizes) for name, sizes in dataset.prepared_datasets(data_dir).items()}
    if resolution not in there.get(name or "", []):
        known = ", ".join(f"--name={name} --resolution={size}" for name, sizes in there.items() for size in sizes)
        raise UserError(
            f"--name={name or ''} --resolution={resolution or ''}: no such dataset is prepared in "
            f"--data_dir={data_dir!r}; choose one of: {known or 'none, so prepare it first'}."
        )
    directory = dataset.find_dataset(data_dir, name=str(name), resolution=int(resolution or 0))
    folder = expand_home(output, name="--output") if output else directory / "verification"
    report = verification.verify_dataset(directory, output=folder, threads=available_cpus() + 1)
    for line in report.summary:
        print(line)
    print(f"written: {folder} (report.json, duplicates.jsonl and a contact sheet of every split)")
    if problems := report.problems:
        # Preparing it anew removes the stores too.
        only_stores = len(problems) == sum(map(bool, report.stores.values()))
        delete = f"delete {directory / 'pixels'}, which the next run makes anew"
        remedy = delete if only_stores else "prepare it anew with --overwrite"
        raise UserError(
            f"{directory}: {len(problems)} problem{'s' * (len(problems) > 1)} ({some(problems)}), all are listed in "
            f"{folder / verification.REPORT}: {remedy}."
        )
    print(f"whole: {directory}")
