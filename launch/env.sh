#!/usr/bin/env bash
# Compiler flags of a TPU generation, for the process that will import JAX.
#
#   source launch/env.sh v5p|v5e|v6e [multislice]
#   launch/env.sh --dry-run v5e          prints the exports
#
# Flags of the TPU compiler go to LIBTPU_INIT_ARGS. Not to XLA_FLAGS: jaxlib reads that one, knows
# no flag named xla_tpu_*, and ends the process. What LIBTPU_INIT_ARGS held before stays at the
# end, where it wins. libtpu ends the process at a flag that it does not know; these were read by
# libtpu 0.0.52.
#
# This file is sourced, so it leaves the shell's options alone.

_llada_env() {
  local print_only='' generation='' slices='' flags=()
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) print_only=1 ;;
      multislice) slices=many ;;
      *)
        if [ -n "$generation" ]; then
          printf 'error: env.sh: found %s after %s, expected at most "multislice"; name one generation\n' \
            "${1@Q}" "$generation" >&2
          return 2
        fi
        generation=$1
        ;;
    esac
    shift
  done

  case $generation in
    v5p)
      # No flag: lax.ragged_dot is the grouped kernel here by default, and gathers of weights are
      # already asynchronous. Whoever measures a gain adds a line.
      ;;
    v5e)
      # Reason: the experts' lax.ragged_dot becomes the grouped kernel. Without it a v5e gets an
      # older lowering, a masked convolution over all groups.
      # Source: both compiled for v5e:2x4 by libtpu 0.0.52 (tests/launch/test_env_compiles.py).
      flags+=(--xla_tpu_enable_ragged_dot_kernel=true)
      # Reason: all-reduces, such as those of gradients that every chip holds whole, run beside
      # computation; on a v5e this is off by default.
      # Source: OpenXLA's flags guidance, "v5e/Async" (openxla.org/xla/flags_guidance).
      flags+=(--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true)
      ;;
    v6e)
      # Reason: as for v5e, the grouped kernel in place of a masked convolution.
      # Source: both compiled for v6e:2x4 by libtpu 0.0.52 (tests/launch/test_env_compiles.py).
      flags+=(--xla_tpu_enable_ragged_dot_kernel=true)
      ;;
    *)
      printf 'error: env.sh: found generation %s, expected v5p, v5e or v6e; name the one of your slice\n' \
        "${generation@Q}" >&2
      return 2
      ;;
  esac

  if [ -n "$slices" ]; then
    # Reason: all-reduces of gradients between slices cross the data centre's network; this lets
    # them run beside the computation of the next layers.
    # Source: MaxText, benchmarks/xla_flags_library.py, DATA_PARALLEL_OVERLAP.
    flags+=(--xla_tpu_enable_data_parallel_all_reduce_opt=true)
    # Reason: the same for gradients of different sizes, as a model's are.
    # Source: as above; the two are used together.
    flags+=(--xla_tpu_data_parallel_opt_different_sized_ops=true)
  fi

  local value="${flags[*]}"
  # A second sourcing adds nothing.
  if [ -n "${LIBTPU_INIT_ARGS:-}" ] && [ "${LIBTPU_INIT_ARGS#"$value"}" = "$LIBTPU_INIT_ARGS" ]; then
    value="${value:+$value }$LIBTPU_INIT_ARGS"
  elif [ -n "${LIBTPU_INIT_ARGS:-}" ]; then
    value=$LIBTPU_INIT_ARGS
  fi
  if [ -n "$print_only" ]; then
    printf 'export LIBTPU_INIT_ARGS=%s\n' "${value@Q}"
  elif [ "${BASH_SOURCE[0]}" = "$0" ]; then
    printf 'error: env.sh: found it run as a command, expected it to be sourced; write: source launch/env.sh %s\n' \
      "$generation" >&2
    return 2
  else
    export LIBTPU_INIT_ARGS=$value
  fi
}

_llada_env "$@"
