#!/usr/bin/env bash
# Settings of XLA, libtpu and the allocator for this trainer, each with its reason.
#
# Usage, before the trainer starts, from the repository's root:
#   source launch/flags.sh gpu    # or tpu, or cpu
#
# Your own settings win: your XLA_FLAGS follow these, and the last of two equal flags counts. The trainer works without
# any of this. XLA aborts a process that has an unknown flag in XLA_FLAGS: after an update of jax run
# tests/test_launch.py, which starts the installed jaxlib with these.
#
# The workload: convolutions, two small dense layers each way, and data parallelism with one all-reduce per step of all
# gradients (10 to 20 MB), which the optimizer needs at once.
#
# Omitted, though often copied:
#   --xla_gpu_enable_latency_hiding_scheduler, and the async collective flags of libtpu: they overlap an exchange with
#       other work, and here there is none: the sum is the last operation before the update.
#   --xla_gpu_all_reduce_combine_threshold_bytes: a GPU has one gradient array, so nothing to combine.
#   --xla_tpu_enable_data_parallel_all_reduce_opt, --xla_tpu_scoped_vmem_limit_kib: for large transformers whose
#       gradients are exchanged during the backward pass.
#   --xla_gpu_autotune_level: its default tunes the convolutions, which take most of a step's time.
#   NCCL_ALGO, NCCL_PROTO: NCCL chooses by size and topology.

case "${1:-}" in
  gpu)
    # A step has six matrix products, all small: cuBLAS is as fast, and Triton's autotuning compiles tens of variants of
    # each, which delays the first start on each kind of GPU.
    export XLA_FLAGS="--xla_gpu_enable_triton_gemm=false ${XLA_FLAGS:-}"
    # The split is in device memory, in at most half of the free part; JAX's default is 75% of the device. The rest is
    # for the CUDA context and the buffers of cuDNN and NCCL.
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.90}"
    # Otherwise a host with a broken driver or plugin would train on its CPU, and the others would wait for it.
    export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
    # NCCL is the first to see a lost peer; its warnings name the host.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    ;;
  tpu)
    # No flag of libtpu is known to help here (see above), and an unknown one aborts every host: your value is kept.
    export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-}"
    # Otherwise a host whose chips another process still holds would train on its CPU.
    export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
    ;;
  cpu)
    # Nothing: the trainer sets huge pages (GLIBC_TUNABLES) itself, and XLA uses a thread per core.
    ;;
  *)
    echo "error: launch/flags.sh: the platform '${1:-}' must be one of gpu, tpu, cpu." >&2
    # When sourced, this must not end the user's shell.
    # shellcheck disable=SC2317
    return 2 2>/dev/null || exit 2
    ;;
esac
