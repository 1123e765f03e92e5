#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# cache-dit (3 MB, in build/engines/cache-dit) beside the environment that runs this, and the tests with it:
#     tests/engines/cache_dit.sh [python]      the Python that the package is installed in; default: .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${1:-.venv/bin/python}"
folder="$PWD/build/engines/cache-dit"
[ -d "$folder/cache_dit" ] || "$python" -m pip install -q --no-deps --target "$folder" "cache-dit==1.5.3"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$folder"
exec "$python" -m pytest -m engines tests/integrations/features/test_caches.py
