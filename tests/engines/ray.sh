#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Ray Serve's environment (400 MB, in build/engines/ray) beside the one that runs this, and the tests in it:
#     tests/engines/ray.sh [python [pytest's options]]     python: where the package is installed (.venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${1:-.venv/bin/python}"
folder="$PWD/build/engines/ray"
[ -d "$folder/ray" ] || "$python" -m pip install -q --target "$folder" -c constraints.txt "ray[serve]==2.60.0"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$folder" RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled
# On busy cores: replicas are not to wait for everybody else, and the proxy may take its time to start and answer.
export RAY_worker_niceness=0 RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=120 RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S=60
exec "$python" -m pytest -m engines tests/engines/test_ray.py "${@:2}"
