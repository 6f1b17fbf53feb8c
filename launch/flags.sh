#!/usr/bin/env bash
# Settings of XLA, libtpu and the allocator for this trainer, each with its reason; the one place for them.
#
# Usage, before the trainer is started, from the repository's root:
#   source launch/flags.sh gpu    # or tpu, or cpu
#
# What you have set yourself wins: your XLA_FLAGS come behind these, and the last of two equal flags counts. The trainer
# works without any of this. XLA ends a process that has an unknown flag in XLA_FLAGS: tests/test_launch.py starts the
# installed jaxlib with these, so run it when jax is updated.
#
# The workload they are for: convolutions, two small dense layers each way, and data parallelism with one all-reduce of
# all gradients as a single array (10 to 20 MB) a step, whose result the optimiser needs at once.
#
# Left out, though often copied:
#   --xla_gpu_enable_latency_hiding_scheduler, and the async collective flags of libtpu: they move other work beside an
#       exchange, and here nothing is left to do but wait: the sum is the last thing before the update.
#   --xla_gpu_all_reduce_combine_threshold_bytes: there is one gradient array, so nothing to combine.
#   --xla_tpu_enable_data_parallel_all_reduce_opt, --xla_tpu_scoped_vmem_limit_kib: for large transformers whose
#       gradients are exchanged while the backward pass goes on.
#   --xla_gpu_autotune_level: its default tries the convolutions' algorithms, which is where a step's time goes.
#   NCCL_ALGO, NCCL_PROTO: NCCL picks by size and topology, which it knows and this file does not.

case "${1:-}" in
  gpu)
    # Six matrix products a step, all small: cuBLAS does them as well, and Triton's autotuning, which compiles tens of
    # variants of each, would be waited for at every first start on a kind of GPU.
    export XLA_FLAGS="--xla_gpu_enable_triton_gemm=false ${XLA_FLAGS:-}"
    # The split lives in device memory, in at most half of what is free; by default JAX takes only 75% of the device.
    # The rest is for the CUDA context, cuDNN's and NCCL's own buffers.
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.90}"
    # Without it a host whose driver or plugin is broken would train on its CPU, and the others would wait for it.
    export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
    # A lost peer is first seen by NCCL: its warnings name the host, and it is silent otherwise.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    ;;
  tpu)
    # No flag of libtpu is known to help here (see above), and one that libtpu does not know ends every host at its
    # start: what you put into LIBTPU_INIT_ARGS is left as it is.
    export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-}"
    # Without it a host whose chips are held by a process that is still ending would train on its CPU.
    export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
    ;;
  cpu)
    # Nothing: the trainer asks for huge pages (GLIBC_TUNABLES) itself, and XLA takes as many threads as there are cores.
    ;;
  *)
    echo "error: launch/flags.sh: the platform '${1:-}' must be one of gpu, tpu, cpu." >&2
    # Sourced, this must not end the shell of who typed it.
    # shellcheck disable=SC2317
    return 2 2>/dev/null || exit 2
    ;;
esac
