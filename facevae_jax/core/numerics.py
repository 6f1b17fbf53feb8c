"""JAX's settings that change types, precision or random bits: those of a run do not depend on the shell.

Commands take JAX's own defaults, and say which variables they ignore. From Python the settings are the caller's, and
those with which a checkpoint or a sample would be another are refused.
"""

import os
import sys

from facevae_jax.core.errors import UserError

# Settings that change what is drawn or stored, with the values of all runs.
FIXED = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}
# Others that change numbers, or raise where a run would skip a step.
OTHERS = (
    "jax_allow_f16_reductions",
    "jax_debug_infs",
    "jax_debug_key_reuse",
    "jax_debug_nans",
    "jax_default_dtype_bits",
    "jax_default_matmul_precision",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_enable_checks",
    "jax_enable_custom_prng",
    "jax_error_checking_behavior_divide",
    "jax_error_checking_behavior_nan",
    "jax_error_checking_behavior_oob",
    "jax_exec_time_optimization_effort",
    "jax_explicit_x64_dtypes",
    "jax_high_dynamic_range_gumbel",
    "jax_legacy_prng_key",
    "jax_no_execution",
    "jax_no_tracing",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_optimization_level",
    "jax_softmax_custom_jvp",
    "jax_threefry_gpu_kernel_lowering",
    "jax_transfer_guard",
    "jax_transfer_guard_device_to_device",
    "jax_transfer_guard_device_to_host",
    "jax_transfer_guard_host_to_device",
)


def ignore_variables() -> None:
    """Takes the variables of these settings out of the environment, before JAX reads it, and says which."""
    for name in (*FIXED, *OTHERS):
        if (value := os.environ.pop(name.upper(), None)) is not None:
            print(f"note: {name.upper()}={value} is ignored: a run's numbers do not depend on it", file=sys.stderr)


def check() -> None:
    """Raises a UserError where a setting is not that of all runs, as it may be in a notebook."""
    import jax

    for name, value in FIXED.items():
        if (found := getattr(jax.config, name)) != value:
            raise UserError(
                f"{name} is {found!r}, with which a model draws and stores other numbers: "
                f"call jax.config.update({name!r}, {value!r}) first."
            )
