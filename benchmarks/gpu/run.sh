#!/usr/bin/env bash
# All tests and measurements that need a GPU, the most valuable first:
#     run.sh OUT [--dry-run] [--only STAGE ... | --call N]
# It can be run again: stages that ended well are skipped. `--call 1`, `--call 2`, ... take nine minutes each. It needs
# vLLM, this package and, for the stages on real text, TARGET=<directory of SmolLM2-135M-Instruct>. With PROMPTS=<files of
# prompts, separated by colons> the last stage trains the head on them.
set -euo pipefail
cd "$(dirname "$0")/../.."
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" benchmarks/gpu/stages.py "$@"
