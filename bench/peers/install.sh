#!/usr/bin/env bash
# install.sh VENV: what the CPU benchmarks compare with, in an environment that has torch: bitsandbytes,
# and ggml built for this CPU from the sources that llama-cpp-python ships, into VENV/ggml.
set -euo pipefail
venv=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Whatever depends on torch keeps the build that is there.
"$venv/bin/python" -m pip freeze | grep '^torch==' >"$work/constraints.txt"
export PIP_CONSTRAINT=$work/constraints.txt
"$venv/bin/python" -m pip install -q numpy "bitsandbytes>=0.50"

if [ ! -f "$venv/ggml/libggml-cpu.so" ]; then
  "$venv/bin/python" -m pip download -q --no-deps --no-binary llama-cpp-python -d "$work" llama-cpp-python==0.3.36
  tar -xf "$work"/llama_cpp_python-*.tar.gz -C "$work"
  # ggml configures a thread's AMX tiles once; torch and llmkern configure them for themselves in between.
  sed -i 's/if (done) {/if (false) {/' "$work"/llama_cpp_python-*/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
  fix="-w -include $here/tile_config.h"
  cmake -S "$work"/llama_cpp_python-*/vendor/llama.cpp -B "$work/build" -Wno-dev \
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS="$fix" \
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_SERVER=OFF >"$work/cmake.log" || { cat "$work/cmake.log"; exit 1; }
  cmake --build "$work/build" -j "$(nproc)" --target ggml ggml-base ggml-cpu
  mkdir -p "$venv/ggml"
  cp -L "$work"/build/bin/libggml*.so "$venv/ggml/"
fi
