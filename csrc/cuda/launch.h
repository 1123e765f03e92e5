// SPDX-License-Identifier: Apache-2.0
// What the host gives the kernels, and what it knows of them.
#pragma once

#include <cstdint>

#include "cuda/tiling.h"
#include "fastnegate/problem.h"

namespace fastnegate::cuda {

enum class Goal : int { output, moments, norms };

// Planes of the table of inner products, moments [5, E, H, N]; those that the rule does not read are not written.
enum MomentPlane { kZz, kZf, kFf, kAlong, kMass };

struct Launch {
  Problem problem;
  Goal goal;
  CudaTiling tiling;
  float factor, bias_factor;  // of logits: scale * log2(e); of biases, which are added before: 1 / scale
  float per_head;             // 1 / H
  float *moments, *norms;    // for scope `feature`, else null
  float* trace_entries;      // [3, E, H, N] (gate, similarity, mass), cleared; or null
  float* trace_rows;         // [4, B, H, N] (|O - Z|^2, |Z|^2, whether limited, values that are not finite)
};

using Kernel = void (*)(Launch);
// Each dtype T and head_dim is compiled on its own.
template <class T, int D>
Kernel kernel_of(CudaKind kind);

}  // namespace fastnegate::cuda
