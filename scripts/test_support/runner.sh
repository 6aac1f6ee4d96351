# shellcheck shell=bash
# How scripts/test runs its steps: one after the other, each into a log of its own, counting tests. The environment with
# PyTorch is made beside the Rust steps, because it mostly waits for the network. What the steps do is in steps.sh.
# shellcheck disable=SC2154  # quick, gpu, only, torch, offline, root come from scripts/test

target=${CARGO_TARGET_DIR:-$root/target}
state=$root/.sire
logs=$state/logs
lint_venv=$state/venv-lint
passed=0 failed=0
failed_steps=() failed_tests=() summary=()
env_job=''
started=$SECONDS

# However this ends, the jobs end with it.
trap end_jobs EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

die() {
    echo "scripts/test: $1" >&2
    exit 2
}

# Which steps run: all that apply, or those that were named and what they need, in the order of steps.sh.
select_steps() {
    local step name
    selected=()
    declare -gA wanted=()
    if [ -n "$only" ]; then
        for name in ${only//,/ }; do
            [[ " ${all_steps[*]} " == *" $name "* ]] || die "no step is called '$name'; scripts/test --list names them"
            want "$name"
        done
    else
        for name in "${all_steps[@]}"; do
            ((quick)) && [[ " $pytorch_steps " == *" $name "* ]] && continue
            [ "$name" = gpu-suite ] && ! ((gpu)) && continue
            [ "$name" = bench ] && continue # on request: --only bench
            want "$name"
        done
    fi
    for step in "${all_steps[@]}"; do
        [ -n "${wanted[$step]:-}" ] && selected+=("$step")
    done
}

want() {
    local need
    wanted[$1]=1
    for need in ${needs[$1]:-}; do want "$need"; done
}

# The tools without which nothing works; everything else is installed by the steps themselves.
prepare_machine() {
    export CARGO_TERM_COLOR=never PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONDONTWRITEBYTECODE=1
    unset LD_PRELOAD SIRE_HOOK_MODE SIRE_REGION SIRE_SIM_DIR SIRE_SIM_FAULTS PYTHONPATH
    if ! command -v cargo >/dev/null && [ -x "${HOME:-/root}/.cargo/bin/cargo" ]; then
        export PATH="${HOME:-/root}/.cargo/bin:$PATH"
    fi
    command -v cargo >/dev/null || die "'cargo' is not on the PATH. Install Rust 1.90 or newer with rustup, or from your distribution"
    command -v cc >/dev/null || die "'cc' is not on the PATH. Install a C compiler, for example: apt-get install gcc g++"
    python=${SIRE_TEST_PYTHON:-python3}
    "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        die "'$python' is not Python 3.10 or newer with venv and ensurepip. On Debian and Ubuntu: apt-get install python3-venv"
    mkdir -p "$logs"
    ulimit -S -c 0
    # Tests find the products here, whatever the target directory is called.
    export SIRE_ALLOC_SO=$target/release/libsire_alloc.so SIRE_SIM_SO=$target/release/libsire_sim_cuda.so
    export SIRE_DRIVER_SO=$target/release/libsire_driver.so
}

announce() {
    echo "scripts/test: ${#selected[@]} steps: ${selected[*]}"
    echo "Downloads, the first time: Rust crates about 30 MB, lint tools 60 MB$( ((quick)) || echo ", PyTorch 540 MB and packages 250 MB")."
    echo "Disk in target/ and .sire/: about $(if ((quick)); then echo 2; else echo 5; fi) GB. Memory: up to $(if ((quick)); then echo 3; else echo 8; fi) GB."
    echo "Time on 2 cores: about $(if ((quick)); then echo "5 to 15 minutes cold"; else echo "20 to 30 minutes cold"; fi). Logs: .sire/logs/"
}

# Starts a job, $!, in a process group of its own, so that it can be ended with all that it has started: what a shell has in the
# background is deaf to Ctrl-C otherwise.
start() {
    local log=$1
    shift
    set -m
    ("$@") >"$log" 2>&1 </dev/null &
    set +m
}

# Ends what still runs: kindly, and after three seconds in any case.
end_jobs() {
    local groups=() group waited=0
    trap '' HUP INT TERM
    for group in $(jobs -pr); do groups+=("-$group"); done
    ((${#groups[@]})) || return 0
    kill -TERM -- "${groups[@]}" 2>/dev/null
    while kill -0 -- "${groups[@]}" 2>/dev/null && ((waited++ < 30)); do sleep 0.1; done
    kill -KILL -- "${groups[@]}" 2>/dev/null
    wait 2>/dev/null
}

# Starts the environment with PyTorch in the background, as soon as its parts are built.
start_env() {
    [ -n "${wanted[env]:-}" ] && [ -z "$env_job" ] || return 0
    start "$logs/env.log" step_env
    env_job=$!
}

# Runs one step, unless something that it needs has failed.
run_step() {
    local step=$1 need begin=$SECONDS log=$logs/$1.log status=0
    for need in ${needs[$step]:-}; do
        if [[ " ${failed_steps[*]-} " == *" $need "* ]]; then
            record "$step" skipped 0 "needs $need"
            return
        fi
    done
    printf '==> %s\n' "$step"
    if [ "$step" = env ]; then
        start_env
        watch "$env_job" "$log" || status=$?
    else
        start "$log" "step_${step//-/_}"
        watch $! "$log" || status=$?
    fi
    count "$step" "$log" "$status" $((SECONDS - begin))
    [ "$step" = build ] && [ "$status" = 0 ] && start_env
    return 0
}

# Waits for a job and shows every half minute that it lives.
watch() {
    local job=$1 log=$2 waited=0
    while kill -0 "$job" 2>/dev/null; do
        sleep 1
        waited=$((waited + 1))
        ((waited % 30)) || printf '    %3d s  %s\n' "$waited" "$(tail -n 1 "$log" 2>/dev/null | tr -d '\r' | cut -c1-110)"
    done
    wait "$job"
}

# Adds a step's tests to the sums; a step without tests counts as one.
count() {
    local step=$1 log=$2 status=$3 seconds=$4 ok bad skips
    read -r ok bad skips < <("$python" scripts/test_support/count.py "$log")
    if ((status)) && ((bad == 0)); then bad=1; fi
    if ((ok + bad == 0)); then ok=1; fi
    passed=$((passed + ok)) failed=$((failed + bad))
    if ((status)); then
        failed_steps+=("$step")
        record "$step" FAILED "$seconds" "$ok passed, $bad failed"
        echo "    --- what failed:"
        "$python" scripts/test_support/failures.py "$log" | sed 's/^/    | /'
        mapfile -t -O "${#failed_tests[@]}" failed_tests < <("$python" scripts/test_support/failures.py --names "$log" | sed "/./s/^/$step: /;/^$/d")
        echo "    --- the end of $log:"
        tail -n 60 "$log" | sed 's/^/    | /'
    else
        record "$step" ok "$seconds" "$ok passed$( ((skips)) && echo ", $skips skipped")"
    fi
}

record() {
    local line
    line=$(printf '%-8s %-14s %5s s  %s' "$2" "$1" "$3" "$4")
    summary+=("$line")
    printf '    %s\n' "$line"
    [ "$2" = skipped ] && failed_steps+=("$1")
    return 0
}

finish() {
    printf '\n'
    printf '%s\n' "${summary[@]}"
    ((${#failed_tests[@]})) && printf 'failed: %s\n' "${failed_tests[@]}"
    printf 'total %s s\n' $((SECONDS - started))
    printf '%d passed, %d failed\n' "$passed" "$failed"
    [ ${#failed_steps[@]} -eq 0 ]
}
