# Shared by the scripts of this folder, which source it. Needs bash 4.4 or later.
# shellcheck shell=bash
set -euo pipefail

# Set by --dry-run: commands are printed and not run.
dry_run=''

# Bad input: says what was found, what was expected and what to do.
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints words as one line that a shell reads back as the same words.
quoted() {
  local word line=''
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      line+=" $word"
    else
      line+=" ${word@Q}"
    fi
  done
  printf '%s\n' "${line# }"
}

# Every command that changes or asks anything outside goes through here.
run_or_print() {
  if [ -n "$dry_run" ]; then
    quoted "$@"
  else
    "$@"
  fi
}

# A remark between the printed commands; still fine to paste.
remark() {
  if [ -n "$dry_run" ]; then
    printf '# %s\n' "$*"
  fi
}

# The comment at the top of a script is its help.
print_help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"
}

# need VALUE FLAG HOW: an option that must be given.
need() {
  [ -n "$1" ] || die "$2 is missing; $3"
}

# take FLAG VALUE...: the argument after a flag, in `value`.
take() {
  if [ $# -lt 2 ] || [ -z "$2" ]; then
    die "$1 has no value; write $1 VALUE"
  fi
  # shellcheck disable=SC2034  # read by the script that calls
  value=$2
}

check_name() {
  [[ $2 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "$1: found ${2@Q}, expected at most 40 lower-case letters, digits and hyphens, with a letter first; choose such a name"
}

check_count() {
  [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] ||
    die "$1: found ${2@Q}, expected a whole number from 1 to 9999; write $1 NUMBER"
}

# An accelerator type, as gcloud and xpk write it -> the generation that env.sh knows.
generation_of() {
  case $1 in
    v5p-[1-9]*) printf v5p ;;
    v5litepod-[1-9]*) printf v5e ;;
    v6e-[1-9]*) printf v6e ;;
    *) die "--type: found ${1@Q}, expected v5p-N (N TensorCores), v5litepod-N or v6e-N (N chips); give the accelerator type of your slice" ;;
  esac
}
